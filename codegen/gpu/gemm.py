"""Tiled products on matrix units: float16 and bfloat16 (on Apple's, anything), float32 sums, any number of rows.

A block computes rows by columns of outputs. Step by step along the depth it brings a piece of its rows of x and of W to
shared memory, ahead of the one that its warps multiply: by asynchronous copies that pass no registers where the machine
has them, some steps ahead; else through registers, one step ahead. Rows and columns that are not there are read from
some that are, and not stored; depths that are not there are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.targets.gpu import GpuTarget

from .machine import Machine, i64, when
from .matrix_units import CHUNK, MatrixUnit, ptx
from .product import ColumnMap, Memory, Operands, Product, RowMap

STAGES = 3  # pieces in shared memory where copies are asynchronous


@dataclass(frozen=True)
class Tiling:
    """Sizes of a block: its outputs, a step of the depth, and its warps by rows, by columns and by parts of a step.

    Warps that share outputs add their sums at the end.
    """

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    parts: int = 1

    @property
    def warps(self) -> int:
        return self.down * self.across * self.parts

    def column_map(self, product: Product, unit: MatrixUnit) -> ColumnMap:
        """The columns of a block."""
        return ColumnMap(product.columns, self.columns, unit.columns, product.gated)


def tilings(target: GpuTarget) -> tuple[Tiling, Tiling, Tiling]:
    """For few rows; for some; for many. The last two take every sum in the same order, the first in another."""
    if target.matrix_unit == "simdgroup":
        return Tiling(16, 64, 32, 1, 4), Tiling(32, 64, 32, 2, 2), Tiling(64, 64, 32, 2, 2)
    # 8 warps of 32 lanes where the sums of 4 would take more registers than leave a second block room.
    across = 4 if target.matrix_unit in ("wmma", "wmma12") else 2
    return Tiling(16, 64, 64, 1, 2, 2), Tiling(64, 64, 32, 2, 2), Tiling(128, 128, 32, 2, across)


def tile(operands: Operands, unit: MatrixUnit, rows: RowMap, tiling: Tiling, column_tile: Any) -> None:
    """Emit a block of tiling.warps warps: the rows of `rows`, the columns of tiling.column_map number column_tile."""
    product, m, columns = operands.product, operands.machine, tiling.column_map(operands.product, unit)
    stages = STAGES if product.target.async_copy else 1
    chunks = tiling.depth // CHUNK
    pitch = chunks * unit.spacing  # from row to row of a piece

    # Copying: a thread brings one chunk of every `apart`-th row of both pieces.
    apart = tiling.warps * m.warp // chunks
    first, chunk = T.bind(T.floordiv(m.thread, chunks)), T.bind(T.floormod(m.thread, chunks))

    def side(source: Memory, size: int, base: Callable[[Any], Any]) -> _Side:
        places = []
        for i in range(-(-size // apart)):
            row = T.bind(first + i * apart)
            present = row < size if size % apart else None
            start = T.bind(base(T.min(row, size - 1) if size % apart else row))
            places.append((start, T.bind(unit.at(row, chunk, chunks)), present))
        return _Side(unit.piece(stages * size, tiling.depth), source, places, size * pitch)

    x = side(operands.x, tiling.rows, lambda r: rows.source(r) * product.depth)
    w = side(
        operands.w,
        tiling.columns,
        lambda r: rows.weight_row(columns.weight_row(column_tile, r)) * product.weight_depth,
    )

    # Multiplying: a warp has down_fragments by across_fragments, over one of the parts of every step.
    down_fragments = tiling.rows // tiling.down // unit.rows
    across_fragments = tiling.columns // tiling.across // unit.columns
    part = T.bind(T.floormod(m.warp_number, tiling.parts))
    across = T.floormod(T.floordiv(m.warp_number, tiling.parts), tiling.across)
    row = T.bind(T.floordiv(m.warp_number, tiling.parts * tiling.across) * (down_fragments * unit.rows))
    column = T.bind(across * (across_fragments * unit.columns))
    sums = unit.sums(down_fragments * across_fragments)
    strides = [part + i * tiling.parts for i in range(tiling.depth // unit.stride // tiling.parts)]
    addresses = [
        (unit.addresses(row, chunks, s, of_x=True), unit.addresses(column, chunks, s, of_x=False)) for s in strides
    ]

    def read(of: _Side, stage: Any, at: list[Any], fragments: int, height: int, of_x: bool) -> list[Any]:
        base = T.bind(stage * of.size)
        return [unit.read(of.piece, [base + a + i * height * pitch for a in at], of_x=of_x) for i in range(fragments)]

    def multiply(stage: Any) -> None:
        for of_x, of_w in addresses:
            a = read(x, stage, of_x, down_fragments, unit.rows, True)
            b = read(w, stage, of_w, across_fragments, unit.columns, False)
            for i in range(down_fragments):
                for j in range(across_fragments):
                    unit.multiply(sums, i * across_fragments + j, a[i], b[j])

    steps = _Steps(m, unit, product.depth, tiling.depth, chunk)
    (steps.asynchronous if product.target.async_copy else steps.through_registers)((x, w), multiply)

    def finish() -> None:
        for i in range(down_fragments):
            fragments = [i * across_fragments + j for j in range(across_fragments)]
            for at, offset, runs in unit.results(sums, fragments):
                local = T.bind(i64(row + i * unit.rows + at))
                with when(local < rows.count):
                    y_row = T.bind(rows.row(local))
                    for j in range(0, across_fragments, 2 if product.gated else 1):
                        y_column = T.bind(columns.out_column(column_tile, column + j * unit.columns + offset))
                        partners = runs[j + 1] if product.gated else ()
                        operands.finish(y_row, y_column, runs[j], partners, rows.lead)

    if tiling.parts > 1:
        add_parts(m, sums, part, tiling.parts, w.piece)
        with when(part == 0):
            finish()
    else:
        finish()


def add_parts(m: Machine, sums: Any, part: Any, parts: int, words: Any) -> None:
    """The sums of the warps of part 0 become those of all parts, in their order.

    words: shared memory that is no longer read, at least so many words as the other warps have sums.
    """
    teams = m.threads // m.warp // parts
    team = T.bind(T.floordiv(m.warp_number, parts))

    def at(of: Any, i: int) -> Any:
        return (((of - 1) * teams + team) * len(sums) + i) * m.warp + m.lane

    m.barrier()
    with when(part > 0):
        for i in range(len(sums)):
            T.buffer_store(words, T.reinterpret("uint32", sums[i]), [at(part, i)])
    m.barrier()
    with when(part == 0):
        for other in range(1, parts):
            for i in range(len(sums)):
                sums[i] = sums[i] + T.reinterpret("float32", words[at(other, i)])


@dataclass(frozen=True)
class _Side:
    """One operand: its pieces in shared memory, each of `size` elements, and what this thread brings to one.

    places: where its chunk's row begins in memory, where the chunk stands in a piece, and whether it is there (None: it
    is).
    """

    piece: Any
    source: Memory
    places: list[tuple[Any, Any, Any]]
    size: int


@dataclass(frozen=True)
class _Steps:
    """The way along the depth: copies, barriers, and the multiplication of what has come."""

    machine: Machine
    unit: MatrixUnit
    depth: int
    step: int
    chunk: Any

    @property
    def count(self) -> int:
        return -(-self.depth // self.step)

    def column(self, step: Any) -> Any:
        """int64: the depth of this thread's chunk."""
        return T.bind(i64(step * self.step + self.chunk * CHUNK))

    def through_registers(self, sides: tuple[_Side, ...], multiply: Callable[[Any], None]) -> None:
        m, unit = self.machine, self.unit
        held = [[unit.hold() for _ in side.places] for side in sides]

        def fetch(step: Any) -> None:
            k = self.column(step)
            for side, registers in zip(sides, held, strict=True):
                for (base, _, _), register in zip(side.places, registers, strict=True):
                    if self.depth % self.step:
                        with T.If(k < self.depth):
                            with T.Then():
                                unit.fetch(register, side.source, base + k)
                            with T.Else():
                                register.fill(0)
                    else:
                        unit.fetch(register, side.source, base + k)

        def put() -> None:
            for side, registers in zip(sides, held, strict=True):
                for (_, at, present), register in zip(side.places, registers, strict=True):
                    if present is None:
                        unit.put(register, side.piece, at)
                    else:
                        with when(present):
                            unit.put(register, side.piece, at)

        fetch(T.int32(0))
        with T.serial(0, self.count) as step:
            put()
            m.barrier()
            with when(step + 1 < self.count):
                fetch(step + 1)
            multiply(T.int32(0))
            m.barrier()

    def asynchronous(self, sides: tuple[_Side, ...], multiply: Callable[[Any], None]) -> None:
        m = self.machine

        def copy(step: Any, stage: Any) -> None:
            k = self.column(step)
            there = T.Select(k < self.depth, T.uint32(16), T.uint32(0))  # bytes; the rest of 16 become zeros
            for side in sides:
                for base, at, present in side.places:
                    to = side.piece.ptr_to([stage * side.size + at])

                    def emit(side: _Side = side, base: Any = base, to: Any = to) -> None:
                        words = side.source.words
                        if self.depth % self.step:
                            k_there = T.min(k, T.int64(self.depth - CHUNK))
                            ptx(COPY, to, words.ptr_to([T.floordiv(base + k_there, 2)]), 16, there)
                        else:
                            ptx(COPY, to, words.ptr_to([T.floordiv(base + k, 2)]), 16)

                    if present is None:
                        emit()
                    else:
                        with when(present):
                            emit()

        def commit() -> None:
            T.evaluate(T.ptx.cp.async_.commit_group())

        for step in range(STAGES - 1):
            if step < self.count:
                copy(T.int32(step), step)
            commit()
        with T.serial(0, self.count) as step:
            T.evaluate(T.ptx.cp.async_.wait_group(STAGES - 2))
            m.barrier()
            with when(step + (STAGES - 1) < self.count):
                copy(step + (STAGES - 1), T.floormod(step + (STAGES - 1), STAGES))
            commit()  # an empty group where nothing is left: the count of groups to wait for stays the same
            multiply(T.floormod(step, STAGES))


COPY = "cp.async.cg.shared.global"
