"""Drive a program of the ragged form by its reference: page tables in numpy, sequences that grow step by step.

What the runtime does at scale, in its plainest shape; verification and tests compare programs with it. Everything that
may not be read holds NaN: the scratch page, pages never written, slots past the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["Pages"]


class Pages:
    """The pages of one state group: which sequence holds which, in what order.

    `count` pages, of which page 0 is scratch; they are handed out in a shuffled order, so that a program which takes a
    page's place for its number is found out. With a window or a chunk, pages that no later token can see go back at
    once and their entry names the scratch page.
    """

    def __init__(self, page_size: int, count: int, window: int = 0, chunk: int = 0, seed: int = 0):
        self.page_size, self.window, self.chunk = page_size, window, chunk
        self.free = [int(p) + 1 for p in np.random.default_rng(seed).permutation(count - 1)]
        self.held: dict[object, list[int]] = {}
        self.length: dict[object, int] = {}

    def first_seen(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        start = max(0, position - self.window + 1) if self.window else 0
        return max(start, position // self.chunk * self.chunk) if self.chunk else start

    def extend(self, new: Mapping[object, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Makes room for new[s] tokens of each sequence s; returns kv_indptr, kv_indices, kv_last_page_len (int32)."""
        indptr, indices, last = [0], [], []
        for sequence, count in new.items():
            pages, length = self.held.setdefault(sequence, []), self.length.get(sequence, 0)
            unseen = self.first_seen(length) // self.page_size
            for i in range(min(unseen, len(pages))):
                if pages[i]:
                    self.free.insert(0, pages[i])
                    pages[i] = 0
            length += count
            while len(pages) * self.page_size < length:
                pages.append(self.free.pop())
            self.length[sequence] = length
            indptr.append(indptr[-1] + len(pages))
            indices += pages
            last.append(length - (len(pages) - 1) * self.page_size)
        return tuple(np.array(a, "int32") for a in (indptr, indices, last))
