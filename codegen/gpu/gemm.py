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

from llmc.ir.quantized import Format
from llmc.targets.gpu import GpuTarget

from .gemm_sides import CodeSide, FloatSide, Side, raw_bytes
from .machine import Machine, i64, when
from .matrix_units import CHUNK, MatrixUnit
from .memory import Memory
from .product import ColumnMap, Operands, Product, RowMap
from .quantized_layout import Layout

STAGES = 3  # pieces in shared memory where copies are asynchronous
TABLE_BYTES = 64  # of the values of 4-bit codes


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

    def stages(self, product: Product, threads: int) -> int:
        """Steps that are in shared memory or on their way there."""
        if not product.target.async_copy:
            return 1
        if not isinstance(product.weight, Format):
            return STAGES
        layout = Layout(product.weight, product.depth, product.target.name)
        stage = self.rows * self.depth * 2 + raw_bytes(layout, self.columns, self.depth, threads)
        pieces = 2 * self.columns * self.depth * 2 + TABLE_BYTES
        return max(2, min(STAGES + 1, (product.target.shared_bytes - pieces) // stage))

    def column_map(self, product: Product, unit: MatrixUnit) -> ColumnMap:
        """The columns of a block."""
        return ColumnMap(product.columns, self.columns, unit.columns, product.gated)


def tilings(target: GpuTarget, weight: str | Format) -> tuple[Tiling, Tiling, Tiling]:
    """For few rows; for some; for many. The last two take every sum in the same order, the first in another."""
    if target.matrix_unit == "simdgroup":
        return Tiling(16, 64, 32, 1, 4), Tiling(32, 64, 32, 2, 2), Tiling(64, 64, 32, 2, 2)
    # 8 warps of 32 lanes where the sums of 4 would take more registers than leave a second block room.
    across = 4 if target.matrix_unit in ("wmma", "wmma12") else 2
    short = Tiling(16, 64, 64, 1, 2, 2)
    if isinstance(weight, Format) and target.async_copy:
        short = Tiling(16, 32, 128, 1, 1, 4)  # as many bytes of fewer bits: longer rows of them, and more blocks
    return short, Tiling(64, 64, 32, 2, 2), Tiling(128, 128, 32, 2, across)


def tile(operands: Operands, unit: MatrixUnit, rows: RowMap, tiling: Tiling, column_tile: Any) -> None:
    """Emit a block of tiling.warps warps: the rows of `rows`, the columns of tiling.column_map number column_tile."""
    product, m, columns = operands.product, operands.machine, tiling.column_map(operands.product, unit)
    chunks = tiling.depth // CHUNK
    pitch = chunks * unit.spacing  # from row to row of a piece
    stages = tiling.stages(product, m.threads)

    def weight_row(local: Any) -> Any:
        return rows.weight_row(columns.weight_row(column_tile, local))

    def floats(source: Memory, size: int, base: Callable[[Any], Any]) -> Side:
        return FloatSide(m, unit, source, size, tiling.depth, stages, product.depth, base)

    x = floats(operands.x, tiling.rows, lambda r: rows.source(r) * product.depth)
    if isinstance(product.weight, Format):
        layout = Layout(product.weight, product.depth)
        w: Side = CodeSide(m, unit, layout, operands.w, tiling.columns, tiling.depth, stages, weight_row)
    else:
        w = floats(operands.w[0], tiling.columns, lambda r: weight_row(r) * product.weight_depth)

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

    def read(of: Side, base: Any, at: list[Any], fragments: int, height: int, of_x: bool) -> list[Any]:
        return [unit.read(of.piece, [base + a + i * height * pitch for a in at], of_x=of_x) for i in range(fragments)]

    def multiply(step: Any, stage: Any) -> None:
        x_begin, w_begin = x.begin(step, stage), w.begin(step, stage)
        for of_x, of_w in addresses:
            a = read(x, x_begin, of_x, down_fragments, unit.rows, True)
            b = read(w, w_begin, of_w, across_fragments, unit.columns, False)
            for i in range(down_fragments):
                for j in range(across_fragments):
                    unit.multiply(sums, i * across_fragments + j, a[i], b[j])

    count = -(-product.depth // tiling.depth)
    if product.target.async_copy:
        asynchronous(m, (x, w), multiply, count, stages)
    else:
        through_registers(m, (x, w), multiply, count)

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


def through_registers(m: Machine, sides: tuple[Side, ...], multiply: Callable[[Any, Any], None], count: int) -> None:
    """So many steps, one ahead in registers."""
    for side in sides:
        side.hold()
    for side in sides:
        side.fetch(T.int32(0))
    with T.serial(0, count) as step:
        for side in sides:
            side.put(step)
        m.barrier()
        with when(step + 1 < count):
            for side in sides:
                side.fetch(step + 1)
        multiply(step, T.int32(0))
        m.barrier()


def asynchronous(
    m: Machine, sides: tuple[Side, ...], multiply: Callable[[Any, Any], None], count: int, stages: int
) -> None:
    """So many steps, stages - 1 ahead on their way to shared memory."""

    def copy(step: Any, stage: Any) -> None:
        for side in sides:
            side.copy(step, stage)

    def commit() -> None:
        T.evaluate(T.ptx.cp.async_.commit_group())

    for step in range(stages - 1):
        if step < count:
            copy(T.int32(step), step)
        commit()
    with T.serial(0, count) as step:
        T.evaluate(T.ptx.cp.async_.wait_group(stages - 2))
        stage = T.floormod(step, stages)
        for side in sides:
            side.land(step, stage)
        m.barrier()
        with when(step + (stages - 1) < count):
            copy(step + (stages - 1), T.floormod(step + (stages - 1), stages))
        commit()  # an empty group where nothing is left: the count of groups to wait for stays the same
        multiply(step, stage)
