"""The loop: schedule the sequences of a step, run the compiled step, take the sampled tokens.

It runs on a thread of its own, the only one that calls compiled code (TVM's worker threads belong to the thread that
calls them). Jobs come in from any thread and join the batch at the next step.
"""

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from .errors import RequestError
from .executor import Draws, Executor, Table, aligned
from .pages import Pages
from .request import Job
from .sampler import GREEDY, Draw
from .scheduler import Plan, Scheduler, Sequence


class Answers(NamedTuple):
    """What a step gave: logits [m, vocab] where a job asked for them, tokens [m] of the jobs in `drawn`."""

    logits: Any
    tokens: Any
    drawn: set[Job]


class Engine:
    """Runs jobs on an executor until it is closed."""

    def __init__(
        self, executor: Executor, *, max_tokens: int = 512, max_sequences: int = 128, keep_idle: int | None = None
    ):
        """max_tokens, max_sequences: of one step. keep_idle: pages kept for their content, at most; None: all."""
        self.executor = executor
        self.pages = Pages(executor.groups, executor.pages, keep_idle)
        self._scheduler = Scheduler(self.pages, max_tokens, max_sequences)
        self._batch = Batch(len(executor.groups), self.pages.page_size, max_tokens, max_sequences)
        self._jobs: dict[Sequence, Job] = {}
        self._inbox: deque[Job] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._closing = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)
        self._thread.start()

    @property
    def preemptions(self) -> int:
        """How often a sequence gave its pages back to be computed again."""
        return self._scheduler.preemptions

    def submit(self, *jobs: Job) -> None:
        """Let jobs join the batch. Raises RequestError if one can never fit the cache, RuntimeError if closed."""
        for job in jobs:
            lacking = self._scheduler.lacking(job.sequence.limit)
            if lacking:
                raise RequestError(
                    f"the cache is too small for this request: prompt and max_tokens together, {job.sequence.limit} "
                    f"tokens, need {lacking[0]} tokens of cache, there are {lacking[1]}; "
                    "load with a larger cache_tokens, or lower max_tokens"
                )
        with self._lock:
            if self._closing:
                raise RuntimeError("the model is closed")
            self._inbox.extend(jobs)
        self._wake.set()

    def wake(self, job: Job) -> None:
        """A job was cancelled: look at it before the next step."""
        self._inbox.append(job)
        self._wake.set()

    def close(self) -> None:
        """Cancel what runs, end the thread, let go of the executor. May be called twice."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a fault of the engine's own: whoever waits must hear of it
            with self._lock:
                self._closing = True
            for job in dict.fromkeys([*self._jobs.values(), *self._inbox]):
                if not job.done:
                    job.finish(error)
            raise
        finally:
            self.executor.close()

    def _loop(self) -> None:
        while self._ready():
            plan = self._scheduler.schedule()
            try:
                answers = self._step(plan)
            except Exception as error:
                self._fail(plan, error)
            else:
                self._take(plan, answers)

    def _ready(self) -> bool:
        """Wait until there is something to compute; False when the engine closes."""
        while True:
            while self._inbox:
                self._join(self._inbox.popleft())
            if self._closing:
                with self._lock:
                    left = [*self._jobs.values(), *(job for job in self._inbox if not job.done)]
                for job in dict.fromkeys(left):
                    self._end(job)
                return False
            if self._scheduler.busy:
                return True
            self._wake.wait()
            self._wake.clear()

    def _join(self, job: Job) -> None:
        if job.cancelled:
            if not job.done:
                self._end(job)
        elif job.sequence not in self._jobs:
            self._jobs[job.sequence] = job
            self._scheduler.add(job.sequence)

    def _step(self, plan: Plan) -> Answers:
        executor, pages = self.executor, self.pages
        if pages.copies:
            for group in range(len(pages.groups)):
                pairs = [(c.source, c.target) for c in pages.copies if c.group == group]
                if pairs:
                    executor.copy_pages(group, *zip(*pairs, strict=True))
            pages.copied()
        tokens, positions, qo_indptr, logit_rows, tables = self._batch.fill(plan)
        self.steps += 1
        logits = executor.step(executor.embed(tokens), positions, qo_indptr, logit_rows, tables)
        if not executor.samples:
            return Answers(executor.fetch(logits), None, set())
        asking = [(self._jobs[s], rows) for s, first, count in plan if (rows := wanted_rows(s, first, count))]
        draws = [(job.draw(), rows) for job, rows in asking]
        drawn = {job for (job, _), (draw, _) in zip(asking, draws, strict=True) if draw is not None}
        # What a request draws may not depend on the others: a row that can be drawn there is, whoever wants logits.
        chosen = executor.sample(logits, columns(draws)) if drawn else None
        return Answers(executor.fetch(logits) if len(drawn) < len(asking) else None, chosen, drawn)

    def _take(self, plan: Plan, answers: Answers) -> None:
        self._scheduler.advance(plan)
        start = 0
        for sequence, first, count in plan:
            rows = wanted_rows(sequence, first, count)
            if not rows:
                continue
            job = self._jobs[sequence]
            try:
                done = (
                    job.take(int(answers.tokens[start]))
                    if job in answers.drawn
                    else job.accept(answers.logits[start : start + rows])
                )
            except Exception as error:
                self._end(job, error)
            else:
                if done:
                    self._end(job)
            start += rows

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        if self._jobs.pop(job.sequence, None) is not None:
            self._scheduler.remove(job.sequence)
        job.finish(error)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step went wrong: its sequences fail with the error, and no page of theirs is trusted; the others go on."""
        self.pages.copied()
        for sequence, _, _ in plan:
            self._end(self._jobs[sequence], error)
        self.pages.forget()


def columns(draws: list[tuple[Draw | None, int]]) -> Draws:
    """Draws and their rows as arrays; rows of no draw are as good as any."""
    rows = [draw or GREEDY for draw, count in draws for _ in range(count)]
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.float32)
    return Draws(*(np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)))


def wanted_rows(sequence: Sequence, first: int, count: int) -> int:
    """How many of the last of these tokens need logits."""
    if sequence.every_row:
        return count
    return 1 if first + count == sequence.length else 0


class Batch:
    """The arrays of a step, int32, kept from step to step."""

    def __init__(self, groups: int, page_size: int, max_tokens: int, max_sequences: int):
        self._page_size = page_size
        self._tokens, self._positions = aligned(max_tokens), aligned(max_tokens)
        self._rows, self._indptr = aligned(max_tokens), aligned(max_sequences + 1)
        self._tables = [
            Table(aligned(max_sequences + 1), aligned(max_sequences * 64), aligned(max_sequences))
            for _ in range(groups)
        ]
        self._count = np.arange(max_tokens, dtype=np.int32)

    def fill(self, plan: Plan):
        """-> tokens [n], positions [1, n], qo_indptr [b+1], logit_rows [m], a Table a group: until the next call."""
        size, n, m, pages = self._page_size, 0, 0, 0
        for table in self._tables:
            table.kv_indptr[0] = 0
        needed = sum(sequence.holding.count for sequence, _, _ in plan)
        if needed > len(self._tables[0].kv_indices):
            self._tables = [t._replace(kv_indices=aligned(2 * needed)) for t in self._tables]
            for table in self._tables:
                table.kv_indptr[0] = 0
        for i, (sequence, first, count) in enumerate(plan):
            end, holding = first + count, sequence.holding
            self._tokens[n : n + count] = sequence.buffer[first:end]
            self._positions[n : n + count] = self._count[:count]
            self._positions[n : n + count] += first
            n += count
            self._indptr[i + 1] = n
            rows = wanted_rows(sequence, first, count)
            self._rows[m : m + rows] = self._count[:rows]
            self._rows[m : m + rows] += n - rows
            m += rows
            used = -(-end // size)
            last = end - (used - 1) * size
            for g, table in enumerate(self._tables):
                table.kv_indices[pages : pages + used] = holding.tables[g, :used]
                table.kv_indptr[i + 1] = pages + used
                table.kv_last_page_len[i] = last
            pages += used
        b = len(plan)
        tables = [Table(t.kv_indptr[: b + 1], t.kv_indices[:pages], t.kv_last_page_len[:b]) for t in self._tables]
        return self._tokens[:n], self._positions[:n].reshape(1, n), self._indptr[: b + 1], self._rows[:m], tables
