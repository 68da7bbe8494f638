"""What a tiled product brings to shared memory, step by step along the depth: rows of x, rows of W.

A step's piece of floats is copied as it stands. Of codes a thread brings a run; before the step is multiplied it
decodes what it brought, and puts numbers of the matrix unit's dtype into the piece. The pieces of two steps lie side by
side, so that a step is put while others still multiply the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from .machine import Machine, Registers, i64, when
from .matrix_units import MatrixUnit, ptx
from .memory import Memory
from .quantized_layout import Layout
from .quantized_rows import QuantizedRows, words_of_run

COPY = {16: "cp.async.cg.shared.global", 8: "cp.async.ca.shared.global", 4: "cp.async.ca.shared.global"}


class Side(Protocol):
    """One operand. piece: its pieces in shared memory."""

    piece: Any

    def begin(self, step: Any, stage: Any) -> Any:
        """Where the piece of a step begins, in elements of `piece`."""

    def hold(self) -> None:
        """Registers for what is fetched."""

    def fetch(self, step: Any) -> None:
        """Bring what this thread brings of a step into registers."""

    def put(self, step: Any) -> None:
        """What was fetched, of a step, into the step's piece."""

    def copy(self, step: Any, stage: Any) -> None:
        """Start to copy what this thread brings of a step to where stage number `stage` is kept."""

    def land(self, step: Any, stage: Any) -> None:
        """What this thread copied of a step has come: make it the step's piece, if it is not yet."""


class RowSide:
    """Rows that are copied as they stand: a thread brings one chunk of every `apart`-th row.

    size: rows of a piece; step: its depth; stages: pieces; depth: of the product. base(row): the first element of a
    piece's row in memory.
    """

    def __init__(
        self,
        m: Machine,
        unit: MatrixUnit,
        source: Memory,
        size: int,
        step: int,
        stages: int,
        depth: int,
        base: Callable[[Any], Any],
    ):
        self.unit, self.source, self.step, self.depth = unit, source, step, depth
        chunks = step // unit.chunk
        apart = m.threads // chunks
        first, self.chunk = T.bind(T.floordiv(m.thread, chunks)), T.bind(T.floormod(m.thread, chunks))
        # Where a chunk's row begins in memory, where the chunk stands in a piece, whether it is there (None: it is).
        self.places: list[tuple[Any, Any, Any]] = []
        for i in range(-(-size // apart)):
            row = T.bind(first + i * apart)
            present = row < size if size % apart else None
            start = T.bind(base(T.min(row, size - 1) if size % apart else row))
            self.places.append((start, T.bind(unit.at(row, self.chunk, chunks)), present))
        self.size = size * chunks * unit.spacing
        self.piece = unit.piece(stages * size, step)
        self.held: list[Registers] = []

    def begin(self, step: Any, stage: Any) -> Any:
        return T.bind(stage * self.size)

    def column(self, step: Any) -> Any:
        """int64: the depth of this thread's chunk."""
        return T.bind(i64(step * self.step + self.chunk * self.unit.chunk))

    def hold(self) -> None:
        self.held = [self.unit.hold() for _ in self.places]

    def fetch(self, step: Any) -> None:
        k = self.column(step)
        for (base, _, _), register in zip(self.places, self.held, strict=True):
            if self.depth % self.step:
                with T.If(k < self.depth):
                    with T.Then():
                        self.unit.fetch(register, self.source, base + k)
                    with T.Else():
                        register.fill(0)
            else:
                self.unit.fetch(register, self.source, base + k)

    def put(self, step: Any) -> None:
        for (_, at, present), register in zip(self.places, self.held, strict=True):
            with there(present):
                self.unit.put(register, self.piece, at)

    def copy(self, step: Any, stage: Any) -> None:
        k, words, chunk = self.column(step), self.source.words, self.unit.chunk
        size = T.Select(k < self.depth, T.uint32(16), T.uint32(0))  # bytes; the rest of 16 become zeros
        for base, at, present in self.places:
            to = self.piece.ptr_to([stage * self.size + at])
            with there(present):
                if self.depth % self.step:
                    k_there = T.min(k, T.int64(self.depth - chunk))
                    ptx(COPY[16], to, words.ptr_to([T.floordiv(base + k_there, chunk // 4)]), 16, size)
                else:
                    ptx(COPY[16], to, words.ptr_to([T.floordiv(base + k, chunk // 4)]), 16)

    def land(self, step: Any, stage: Any) -> None:
        pass


class CodeSide:
    """Rows of codes: a thread brings one run of every `apart`-th row. row(local): int64, a piece's row among all.

    Past the depth it reads what is there: it meets zeros of x. codes_only: scales of groups do not come along.
    """

    codes_only = False

    def __init__(
        self,
        m: Machine,
        unit: MatrixUnit,
        layout: Layout,
        memories: tuple[Memory, ...],
        size: int,
        step: int,
        stages: int,
        row: Callable[[Any], Any],
    ):
        self.m, self.unit, self.step, self.layout, self.stages = m, unit, step, layout, stages
        run = run_of(layout, unit.chunk, size, step, m.threads)
        self.rows = QuantizedRows(m, layout, memories, run, self.codes_only)
        if self.rows.table:
            self.rows.prepare(m.shared(self.rows.table))
        runs, self.chunks = step // run, step // unit.chunk
        apart = m.threads // runs
        first, self.number = T.bind(T.floordiv(m.thread, runs)), T.bind(T.floormod(m.thread, runs))
        self.places: list[tuple[Any, Any, Any]] = []  # what is to know of a row in memory, the row, is it there
        for i in range(-(-size // apart)):
            local = T.bind(first + i * apart)
            present = local < size if size % apart else None
            start = self.rows.start(row(T.min(local, size - 1) if size % apart else local))
            self.places.append((start, local, present))
        self.size = size * self.chunks * unit.spacing
        self.piece = unit.piece((2 if stages > 1 else 1) * size, step)
        self.held = [m.registers(self.rows.words, "uint32") for _ in self.places]
        self.raw: Any = None  # where asynchronous copies of codes go: every thread's own
        if stages > 1:
            self.raw = m.shared(stages * len(self.places) * m.threads * self.rows.words, "uint32")

    def hold(self) -> None:
        pass

    def begin(self, step: Any, stage: Any) -> Any:
        return T.bind(T.floormod(step, 2) * self.size) if self.stages > 1 else 0

    def column(self, step: Any) -> Any:
        """int64: the depth of this thread's run."""
        k = i64(step * self.step + self.number * self.rows.run)
        if self.layout.stored_depth % self.step:
            k = T.min(k, T.int64(self.layout.stored_depth - self.rows.run))
        return T.bind(k)

    def fetch(self, step: Any) -> None:
        k = self.column(step)
        for (start, _, _), held in zip(self.places, self.held, strict=True):
            self.rows.fetch(held, 0, start, k)

    def put(self, step: Any) -> None:
        k, begin = self.column(step), self.begin(step, 0)
        for (start, local, present), held in zip(self.places, self.held, strict=True):
            with there(present):
                self.decode(begin, start, local, held, k)

    def decode(self, begin: Any, start: Any, local: Any, held: Registers, k: Any) -> None:
        """The run at k of the piece's row `local`, held, into the piece that begins at `begin`."""
        for i, values in enumerate(self.rows.scaled_run(held, 0, start, k)):
            self.unit.put_values(values, self.piece, self.place(begin, local, i))

    def place(self, begin: Any, local: Any, i: int) -> Any:
        """Where chunk i of this thread's run stands in the piece."""
        chunk = self.number * (self.rows.run // self.unit.chunk) + i
        return T.bind(begin + self.unit.at(local, chunk, self.chunks))

    def slot(self, stage: Any, place: int, first: int, count: int) -> Any:
        """Where this thread keeps `count` words of a run from the word `first` on: a multiple of `count`."""
        threads, words = self.m.threads, self.rows.words
        base = (stage * len(self.places) + place) * (threads * words)
        return base + first * threads + self.m.thread * count

    def copy(self, step: Any, stage: Any) -> None:
        k = self.column(step)
        for place, (start, _, present) in enumerate(self.places):
            with there(present):
                for memory, word, first, count in self.rows.pieces(start, k):
                    at_once = min(count, 4)
                    for i in range(0, count, at_once):
                        to = self.raw.ptr_to([self.slot(stage, place, first, count) + i])
                        size = 4 * at_once
                        ptx(COPY[size], to, memory.words.ptr_to([T.bind(word + i)]), size)

    def land(self, step: Any, stage: Any) -> None:
        for place, held in enumerate(self.held):
            start, _, present = self.places[place]
            with there(present):
                for _, _, first, count in self.rows.pieces(start, T.int64(0)):
                    at = T.bind(self.slot(stage, place, first, count))
                    if count == 1:
                        held[first] = self.raw[at]
                    else:
                        vector = self.raw.vload([at], f"uint32x{count}")
                        T.buffer_store(held.buffer, vector, [T.ramp(first, 1, count)])
        self.put(step)


def there(present: Any) -> AbstractContextManager:
    """For the threads that have a place here; None: all have."""
    return nullcontext() if present is None else when(present)


def run_of(layout: Layout, chunk: int, size: int, step: int, threads: int) -> int:
    """Elements of a run, such that there is one for every thread, if it can be; whole chunks."""
    return min(layout.run(max(chunk, size * step // threads)), step)


def raw_bytes(layout: Layout, chunk: int, size: int, step: int, threads: int, codes_only: bool) -> int:
    """Shared memory for what is copied of one step."""
    run = run_of(layout, chunk, size, step, threads)
    places = -(-size // (threads // (step // run)))
    return places * threads * sum(words_of_run(layout, run, codes_only)[1:]) * 4
