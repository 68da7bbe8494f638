"""Which tokens are computed in the next step: continuous batching with chunked prefill.

Sequences run in the order of their arrival. Every running sequence that decodes gets its token; what is left of the
step's budget goes to prompts, cut into chunks, and then to waiting sequences while there are pages for their prompts.
When a running sequence needs a page and there is none, the newest running one gives all of its back and waits at the
head of the line; it is computed again from its tokens later (less what is still known of its pages, usually most). The
oldest is never preempted, so there is always progress.
"""

from collections import deque

import numpy as np

from .pages import Holding, Pages


class Sequence:
    """Tokens to be computed. buffer[:length] are known; `limit` is the most that will ever be computed."""

    __slots__ = ("buffer", "every_row", "holding", "length", "limit", "reused")

    def __init__(self, tokens: np.ndarray, limit: int, every_row: bool = False):
        """tokens [n] i32, n <= limit. every_row: logits are wanted at every token, so that all are computed."""
        self.buffer = np.empty(limit, np.int32)
        self.length = len(tokens)
        self.buffer[: self.length] = tokens
        self.limit = limit
        self.every_row = every_row
        self.holding: Holding = None  # type: ignore[assignment]  # it has one while it runs
        self.reused: int | None = None  # tokens found computed when it was first admitted


Plan = list[tuple[Sequence, int, int]]  # sequence, its first token of this step, how many


class Scheduler:
    """Sequences that wait and sequences that run, and the pages they share."""

    def __init__(self, pages: Pages, max_tokens: int = 512, max_sequences: int = 128):
        """max_tokens, max_sequences: of one step."""
        self.pages = pages
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first; all are older than those waiting
        self.preemptions = 0
        self._refused: tuple[Sequence, list[int], int] | None = None

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def lacking(self, tokens: int) -> tuple[int, int] | None:
        """None if a sequence of that many tokens can run, alone if need be; else (cache it needs, cache there is)."""
        pools, size = self.pages.pools, self.pages.page_size
        for needed, pool in zip(self.pages.required(tokens), pools, strict=True):
            if needed > pool.capacity - 1:
                return needed * size, (pool.capacity - 1) * size
        return None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is done, or not wanted any more: its pages come back."""
        if sequence.holding is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def schedule(self) -> Plan:
        """The next step; empty only when no sequence is there. `pages.copies` are to be made before it is run."""
        running, pages = self.running, self.pages
        behind = [s for s in running if s.length - s.holding.computed > 1]
        order = [s for s in running if s.length - s.holding.computed == 1] + behind if behind else list(running)
        parts: dict[Sequence, int] = {}
        budget, preempted = self.max_tokens, False
        for sequence in order:
            holding = sequence.holding
            if holding is None:
                continue  # preempted for an older one
            want = min(sequence.length - holding.computed, budget)
            if not want:
                break
            while not (count := pages.room(holding, want)):
                victim = running.pop()
                budget += parts.pop(victim, 0)
                self._release(victim)
                self.waiting.appendleft(victim)
                preempted = True
                self.preemptions += 1
                if victim is sequence:
                    break
            if count:
                pages.extend(holding, count)
                parts[sequence] = count
                budget -= count
        for sequence, count in parts.items():
            self._publish(sequence, count)
        if self.waiting and not preempted:
            self._admit(parts, budget)
        return [(sequence, sequence.holding.computed, count) for sequence, count in parts.items()]

    def advance(self, plan: Plan) -> None:
        """The step has been run."""
        for sequence, start, count in plan:
            self.pages.advance(sequence.holding, sequence.buffer, start + count)

    def _admit(self, parts: dict[Sequence, int], budget: int) -> None:
        pages = self.pages
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if self._still_refused(sequence):
                return
            tokens = sequence.buffer[: sequence.length]
            holding = pages.open(tokens, sequence.limit, share=not sequence.every_row)
            if self.running and not self._fits(sequence, holding):
                pages.close(holding, tokens)
                self._refused = (sequence, [pool.available for pool in pages.pools], len(self.running))
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.holding = holding
            if not sequence.every_row:
                pages.copy_partial(holding, tokens)
            if sequence.reused is None:
                sequence.reused = holding.computed
            count = pages.room(holding, min(sequence.length - holding.computed, budget))
            pages.extend(holding, count)
            parts[sequence] = count
            budget -= count
            self._publish(sequence, count)

    def _fits(self, sequence: Sequence, holding: Holding) -> bool:
        """Whether there are pages for all its tokens known so far, the next, and a page more for each running one."""
        size, pages = self.pages.page_size, self.pages
        whole = sequence.length // size + 1 - holding.count
        spans = pages.required(sequence.length + 1)
        chunk = -(-self.max_tokens // size)
        return all(
            min(whole, span + chunk) + len(self.running) <= pool.available
            for span, pool in zip(spans, pages.pools, strict=True)
        )

    def _still_refused(self, sequence: Sequence) -> bool:
        if self._refused is None or self._refused[0] is not sequence:
            return False
        _, available, running = self._refused
        more = any(pool.available > before for pool, before in zip(self.pages.pools, available, strict=True))
        if more or len(self.running) < running:
            self._refused = None
            return False
        return True

    def _publish(self, sequence: Sequence, count: int) -> None:
        if not sequence.every_row:
            self.pages.publish(sequence.holding, sequence.buffer, sequence.holding.computed + count)

    def _release(self, sequence: Sequence) -> None:
        self.pages.close(sequence.holding, sequence.buffer)
        sequence.holding = None  # type: ignore[assignment]
