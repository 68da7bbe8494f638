"""Pages of the cache: handed out, counted, shared by content, copied when only a part is shared, given back.

A page holds the state of `page_size` consecutive tokens in one group of layers. A page that is full is known by the
tokens it holds and all tokens before them (a hash chain), so that a sequence with the same beginning takes the page
instead of computing it. Only full pages are shared, and only the last, unfilled page of a sequence is ever written: a
sequence that shares a part of a page gets a copy of it.

A page nobody holds is free, or idle if its content is known: idle pages are found by content until room is needed,
the longest unused first. Free pages are handed out lowest first, so that a pool that grows on demand stays dense.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from .artifact import StateGroup

SCRATCH = 0  # padded rows and fallen-out table entries point here; never handed out
ROOT = b""  # the key before the first page


class Copy(NamedTuple):
    """Copy page `source` to page `target` in `group`, before the next step."""

    group: int
    source: int
    target: int


class PagePool:
    """The pages 1..capacity-1 of one group, each held by as many sequences as `holders` says."""

    def __init__(self, capacity: int, keep_idle: int | None = None):
        """keep_idle: how many idle pages are kept at most; None: all there is room for."""
        self.capacity = capacity
        self.keep_idle = capacity if keep_idle is None else keep_idle
        self.holders = [0]
        self.by_key: dict[bytes, int] = {}
        self._free: list[int] = []
        self._idle: OrderedDict[int, bytes] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self.forgotten: list[bytes] = []  # keys whose page is gone, for whoever keeps an index of keys

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle) + self.capacity - len(self.holders)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.capacity - 1 - self.available

    def take(self) -> int:
        """A page for one sequence to write; there must be one available."""
        if self._free:
            page = heapq.heappop(self._free)
        elif len(self.holders) < self.capacity:
            page = len(self.holders)
            self.holders.append(0)
        else:
            page = self._evict()
        self.holders[page] = 1
        return page

    def share(self, page: int) -> None:
        """One holder more."""
        if not self.holders[page]:
            del self._idle[page]
        self.holders[page] += 1

    def give(self, page: int) -> None:
        """One holder less."""
        self.holders[page] -= 1
        if self.holders[page]:
            return
        key = self._key_of.get(page)
        if key is None:
            heapq.heappush(self._free, page)
            return
        self._idle[page] = key
        if len(self._idle) > self.keep_idle:
            heapq.heappush(self._free, self._evict())

    def publish(self, page: int, key: bytes) -> bool:
        """Let the page be found by its content; False if another page already is."""
        if key in self.by_key or page in self._key_of:
            return self.by_key.get(key) == page
        self.by_key[key] = page
        self._key_of[page] = key
        return True

    def is_idle(self, page: int) -> bool:
        return not self.holders[page]

    def forget(self) -> None:
        """Nothing is known of any page's content any more."""
        for page in self._idle:
            heapq.heappush(self._free, page)
        self._idle.clear()
        self._key_of.clear()
        self.forgotten.extend(self.by_key)
        self.by_key.clear()

    def _evict(self) -> int:
        page, key = self._idle.popitem(last=False)
        del self.by_key[key], self._key_of[page]
        self.forgotten.append(key)
        return page


class Holding:
    """The pages one sequence holds: row g of `tables` is the page table of group g, `count` entries long."""

    __slots__ = ("computed", "count", "first", "keys", "tables")

    def __init__(self, groups: int, capacity: int):
        self.tables = np.zeros((groups, max(capacity, 1)), np.int32)
        self.count = 0  # table entries
        self.computed = 0  # tokens whose state the pages hold
        self.first = [0] * groups  # the first table entry that is a page; those before fell out of the window
        self.keys: list[bytes] = []  # of its full pages, as far as they are published


class Pages:
    """The pages of all groups, which share one page size: table entry i of every group stands for the same tokens."""

    def __init__(self, groups: Sequence[StateGroup], capacities: Sequence[int], keep_idle: int | None = None):
        sizes = {group.page_size for group in groups}
        if len(sizes) != 1:
            raise ValueError(f"expected state groups of one page size, found {sorted(sizes)}")
        self.groups = tuple(groups)
        self.page_size = sizes.pop()
        self.pools = [PagePool(capacity, keep_idle) for capacity in capacities]
        self.copies: list[Copy] = []
        self._pinned: list[tuple[int, int]] = []  # sources of copies, held until the copies are done
        self._children: dict[bytes, dict[bytes, bytes]] = {}  # key -> {key of a page after it: that page's tokens}
        self._parent: dict[bytes, bytes] = {}

    @property
    def held(self) -> int:
        """Pages that sequences hold, in all groups."""
        return sum(pool.held for pool in self.pools)

    def first_visible(self, group: StateGroup, position: int) -> int:
        """The first position that a token at `position` sees in a group."""
        first = max(0, position - group.window + 1) if group.window else 0
        return max(first, position // group.chunk * group.chunk) if group.chunk else first

    def required(self, tokens: int) -> list[int]:
        """Pages a sequence of that length needs at once, a group each, when it is alone and in no hurry."""
        whole = -(-tokens // self.page_size)
        spans = [min(s for s in (g.window, g.chunk) if s) if g.window or g.chunk else 0 for g in self.groups]
        return [min(whole, -(-(s - 1) // self.page_size) + 1) if s else whole for s in spans]

    def room(self, holding: Holding, tokens: int) -> int:
        """How many of `tokens` further tokens there are pages for."""
        slack = holding.count * self.page_size - holding.computed
        if tokens <= slack:
            return tokens
        return min(tokens, slack + min(pool.available for pool in self.pools) * self.page_size)

    def extend(self, holding: Holding, tokens: int) -> None:
        """Take pages until `tokens` further tokens fit; see `room` first."""
        count = -(-(holding.computed + tokens) // self.page_size)
        for i in range(holding.count, count):
            for g, pool in enumerate(self.pools):
                holding.tables[g, i] = pool.take()
        holding.count = max(holding.count, count)

    def publish(self, holding: Holding, tokens: np.ndarray, computed: int) -> None:
        """Let the full pages of the first `computed` tokens be found. This step may still be about to compute them: a
        sequence that joins the same step may share them, since a layer appends all its tokens before it attends."""
        size = self.page_size
        for i in range(len(holding.keys), computed // size):
            key = chain(holding.keys[-1] if holding.keys else ROOT, tokens[i * size : (i + 1) * size])
            holding.keys.append(key)
            for g, pool in enumerate(self.pools):
                if page := int(holding.tables[g, i]):
                    pool.publish(page, key)

    def advance(self, holding: Holding, tokens: np.ndarray, computed: int) -> None:
        """The first `computed` tokens are computed now: their full pages may be copied from, and pages that no later
        token sees are given back."""
        size = self.page_size
        for i in range(holding.computed // size, min(computed // size, len(holding.keys))):
            self._index(holding.keys[i - 1] if i else ROOT, holding.keys[i], tokens[i * size : (i + 1) * size])
        holding.computed = computed
        for g, group in enumerate(self.groups):
            if group.window or group.chunk:
                self._drop(holding, g, self.first_visible(group, computed) // size)

    def _drop(self, holding: Holding, g: int, first: int) -> None:
        for i in range(holding.first[g], min(first, holding.count)):
            self.pools[g].give(int(holding.tables[g, i]))
            holding.tables[g, i] = SCRATCH
        holding.first[g] = max(holding.first[g], min(first, holding.count))

    def open(self, tokens: np.ndarray, capacity: int, share: bool = True) -> Holding:
        """A holding for a sequence of at most `capacity` tokens, with what is known of its beginning; at least one
        token is left to compute."""
        size = self.page_size
        holding = Holding(len(self.groups), -(-capacity // size))
        if not share:
            return holding
        keys, tables = self._match(tokens)
        for g, (pool, group) in enumerate(zip(self.pools, self.groups, strict=True)):
            holding.first[g] = self.first_visible(group, len(keys) * size) // size
            for i in range(holding.first[g], len(keys)):
                pool.share(tables[g][i])
                holding.tables[g, i] = tables[g][i]
        holding.keys, holding.count, holding.computed = keys, len(keys), len(keys) * size
        return holding

    def _match(self, tokens: np.ndarray) -> tuple[list[bytes], list[list[int]]]:
        """-> keys of the longest known beginning, and each group's pages of it (0 where none is known, nor needed)."""
        size, keys, key = self.page_size, [], ROOT
        tables: list[list[int]] = [[] for _ in self.groups]
        best, run = 0, [0] * len(self.groups)
        for i in range((len(tokens) - 1) // size):
            key = chain(key, tokens[i * size : (i + 1) * size])
            pages = [pool.by_key.get(key, 0) for pool in self.pools]
            if not any(pages) or any(
                not p and not (g.window or g.chunk) for p, g in zip(pages, self.groups, strict=True)
            ):
                break
            keys.append(key)
            for g, page in enumerate(pages):
                tables[g].append(page)
                run[g] = run[g] + 1 if page else 0
            ends = [self.first_visible(group, (i + 1) * size) // size for group in self.groups]
            if all(run[g] >= i + 1 - ends[g] for g in range(len(ends))):
                best = i + 1
        return keys[:best], [table[:best] for table in tables]

    def copy_partial(self, holding: Holding, tokens: np.ndarray) -> None:
        """If the page after those a new holding shares begins as a known page does, take a page and have it copied."""
        self._unindex()
        size, start = self.page_size, holding.computed
        wanted = tokens[start : min(start + size, len(tokens) - 1)]
        best, length = None, 0
        for key, content in self._children.get(holding.keys[-1] if holding.keys else ROOT, {}).items():
            there = np.frombuffer(content, np.int32)[: len(wanted)]
            differ = np.flatnonzero(there != wanted[: len(there)])
            common = int(differ[0]) if len(differ) else len(there)
            if common > length:
                best, length = key, common
        if best is None or not all(pool.available > pool.is_idle(pool.by_key[best]) for pool in self.pools):
            return
        for g, pool in enumerate(self.pools):
            source = pool.by_key[best]
            pool.share(source)
            self._pinned.append((g, source))
            target = pool.take()
            self.copies.append(Copy(g, source, target))
            holding.tables[g, holding.count] = target
        holding.count += 1
        holding.computed = start + length

    def copied(self) -> None:
        """The copies are done."""
        self.copies.clear()
        for g, page in self._pinned:
            self.pools[g].give(page)
        self._pinned.clear()

    def close(self, holding: Holding, tokens: np.ndarray) -> None:
        """Give all pages back. What the last, unfilled page holds may still be copied from."""
        size, full = self.page_size, holding.computed // self.page_size
        if holding.computed % size and full == len(holding.keys):
            parent, content = holding.keys[-1] if full else ROOT, tokens[full * size : holding.computed]
            key = chain(parent, content)
            if all(pool.publish(int(holding.tables[g, full]), key) for g, pool in enumerate(self.pools)):
                self._index(parent, key, content)
        for g, pool in enumerate(self.pools):
            for i in reversed(range(holding.first[g], holding.count)):  # the beginning is the last to be evicted
                pool.give(int(holding.tables[g, i]))
            holding.tables[g] = SCRATCH
        holding.count = holding.computed = 0
        holding.first = [0] * len(self.groups)
        holding.keys = []
        self._unindex()

    def _index(self, parent: bytes, key: bytes, content: np.ndarray) -> None:
        if key not in self._parent and all(key in pool.by_key for pool in self.pools):
            self._parent[key] = parent
            self._children.setdefault(parent, {})[key] = content.tobytes()

    def _unindex(self) -> None:
        for pool in self.pools:
            for key in pool.forgotten:
                parent = self._parent.pop(key, None)
                if parent is not None:
                    children = self._children[parent]
                    del children[key]
                    if not children:
                        del self._children[parent]
            pool.forgotten.clear()

    def forget(self) -> None:
        """Nothing is known of any page's content any more."""
        for pool in self.pools:
            pool.forget()
        self._unindex()


def chain(parent: bytes, tokens: np.ndarray) -> bytes:
    """The key of a page: of its tokens (int32) and everything before them."""
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()
