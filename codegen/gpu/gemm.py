"""Tiled products on matrix units: float16 and bfloat16 (on Apple's, anything), float32 sums, any number of rows.

A block computes rows by columns of outputs. Step by step along the depth it brings a piece of its rows of x and of W to
shared memory, ahead of the one that its warps multiply: by asynchronous copies that pass no registers where the machine
has them, some steps ahead; else through registers, one step ahead. Rows and columns that are not there are read from
some that are, and not stored; depths that are not there are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format

from .code_units import CodeUnit
from .gemm_codes import ByteSide, ScaleSide, Scaling, period_of
from .gemm_sides import CodeSide, RowSide, Side, raw_bytes
from .machine import Machine, i64, when
from .matrix_units import MatrixUnit
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

    def stages(self, product: Product, unit: MatrixUnit, threads: int) -> int:
        """Steps that are in shared memory or on their way there."""
        if not product.target.async_copy:
            return 1
        row = self.depth * 16 // unit.chunk  # bytes of a piece's row
        room, stage = product.target.shared_bytes, self.rows * row
        if isinstance(unit, CodeUnit):
            period = period_of(product, unit, self.depth // self.parts)
            room -= 2 * (self.rows + self.columns) * (self.depth // period) * 4 if period else 0
        if not decoded(product, unit):
            return max(2, min(STAGES, room // (stage + self.columns * row)))
        layout = Layout(product.weight, product.depth, product.target.name)  # type: ignore[arg-type]  # it has a format
        stage += raw_bytes(layout, unit.chunk, self.columns, self.depth, threads, isinstance(unit, CodeUnit))
        return max(2, min(STAGES + 1, (room - 2 * self.columns * row - TABLE_BYTES) // stage))

    def column_map(self, product: Product, unit: MatrixUnit) -> ColumnMap:
        """The columns of a block."""
        return ColumnMap(product.columns, self.columns, unit.columns, product.gated)


def decoded(product: Product, unit: MatrixUnit) -> bool:
    """Whether a weight's codes become something else before they are put into a piece."""
    weight = product.weight
    return isinstance(weight, Format) and not (isinstance(unit, CodeUnit) and weight.bits == 8)


def tilings(product: Product, unit: MatrixUnit) -> tuple[Tiling, Tiling, Tiling]:
    """For few rows; for some; for many. The last two take every sum in the same order, the first in another."""
    target = product.target
    if target.matrix_unit == "simdgroup":
        return Tiling(16, 64, 32, 1, 4), Tiling(32, 64, 32, 2, 2), Tiling(64, 64, 32, 2, 2)
    step = 4 * unit.chunk  # 64 bytes
    # 8 warps of 32 lanes where the sums of 4 would take more registers than leave a second block room.
    across = 4 if target.warp == 32 and (target.matrix_unit != "mma" or isinstance(unit, CodeUnit)) else 2
    short = Tiling(16, 64, 2 * step, 1, 2, 2)
    if decoded(product, unit) and target.async_copy:
        short = Tiling(16, 32, 4 * step, 1, 1, 4)  # as many bytes of fewer bits: longer rows of them, and more blocks
    return short, Tiling(64, 64, step, 2, 2), Tiling(128, 128, step, 2, across)


def tile(operands: Operands, unit: MatrixUnit, rows: RowMap, tiling: Tiling, column_tile: Any) -> None:
    """Emit a block of tiling.warps warps: the rows of `rows`, the columns of tiling.column_map number column_tile."""
    product, m, columns = operands.product, operands.machine, tiling.column_map(operands.product, unit)
    chunks = tiling.depth // unit.chunk
    pitch = chunks * unit.spacing  # from row to row of a piece
    stages = tiling.stages(product, unit, m.threads)
    coded = unit if isinstance(unit, CodeUnit) else None

    def weight_row(local: Any) -> Any:
        return rows.weight_row(columns.weight_row(column_tile, local))

    def plain(source: Memory, size: int, depth: int, row: Callable[[Any], Any]) -> Side:
        return RowSide(m, unit, source, size, tiling.depth, stages, depth, lambda r: row(r) * depth)

    x = plain(operands.x, tiling.rows, product.weight_depth if coded else product.depth, rows.source)
    if decoded(product, unit):
        layout = Layout(product.weight, product.depth)  # type: ignore[arg-type]  # it has a format
        kind = ByteSide if coded else CodeSide
        w: Side = kind(m, unit, layout, operands.w, tiling.columns, tiling.depth, stages, weight_row)
    else:
        w = plain(operands.w[0], tiling.columns, product.weight_depth, weight_row)

    # Multiplying: a warp has down_fragments by across_fragments, over one of the parts of every step.
    down_fragments = tiling.rows // tiling.down // unit.rows
    across_fragments = tiling.columns // tiling.across // unit.columns
    part = T.bind(T.floormod(m.warp_number, tiling.parts))
    across = T.floormod(T.floordiv(m.warp_number, tiling.parts), tiling.across)
    row = T.bind(T.floordiv(m.warp_number, tiling.parts * tiling.across) * (down_fragments * unit.rows))
    column = T.bind(across * (across_fragments * unit.columns))
    scaling = scaling_of(operands, coded, rows, weight_row, tiling, stages, row, column) if coded else None
    sums = unit.sums(down_fragments * across_fragments, coded.sum_dtype if coded and not scaling else "float32")
    strides = tiling.depth // unit.stride // tiling.parts
    addresses = [
        (unit.addresses(row, chunks, s, of_x=True), unit.addresses(column, chunks, s, of_x=False))
        for s in (part * strides + i for i in range(strides))
    ]

    def read_x(base: Any, at: list[Any], i: int) -> Any:
        return unit.read(x.piece, [base + a + i * unit.rows * pitch for a in at], of_x=True)

    def read_w(base: Any, at: list[Any], j: int) -> Any:
        return unit.read(w.piece, [base + a + j * unit.columns * pitch for a in at], of_x=False)

    def multiply(step: Any, stage: Any) -> None:
        x_begin, w_begin = x.begin(step, stage), w.begin(step, stage)

        def of_x(i: int, s: int) -> Any:
            return unit.read(x.piece, [x_begin + a + i * unit.rows * pitch for a in addresses[s][0]], of_x=True)

        def of_w(j: int, s: int) -> Any:
            return unit.read(w.piece, [w_begin + a + j * unit.columns * pitch for a in addresses[s][1]], of_x=False)

        if scaling:
            return scaling.multiply(sums, step, part, strides, of_x, of_w, down_fragments, across_fragments)
        for s in range(strides):
            a = [of_x(i, s) for i in range(down_fragments)]
            b = [of_w(j, s) for j in range(across_fragments)]
            for i in range(down_fragments):
                for j in range(across_fragments):
                    unit.multiply(sums, i * across_fragments + j, a[i], b[j])
        return None

    count = -(-product.depth // tiling.depth)
    sides = (x, w, *(scaling.sides() if scaling else ()))
    if product.target.async_copy:
        asynchronous(m, sides, multiply, count, stages)
    else:
        through_registers(m, sides, multiply, count)

    def numbers(run: Sequence[Any], y_row: Any) -> list[Any]:
        """Sums as float32, with the scales of rows of x."""
        if coded is None or operands.x_scales is None or product.rounded:
            return list(run)
        scale = T.bind(operands.x_scales.elements[y_row])
        return [T.bind((value if scaling else coded.whole(value)) * scale) for value in run]

    def finish() -> None:
        for i in range(down_fragments):
            fragments = [i * across_fragments + j for j in range(across_fragments)]
            for at, offset, runs in unit.results(sums, fragments):
                local = T.bind(i64(row + i * unit.rows + at))
                with when(local < rows.count):
                    y_row = T.bind(rows.row(local))
                    found = [numbers(run, y_row) for run in runs]
                    for j in range(0, across_fragments, 2 if product.gated else 1):
                        y_column = T.bind(columns.out_column(column_tile, column + j * unit.columns + offset))
                        partners = found[j + 1] if product.gated else ()
                        operands.finish(y_row, y_column, found[j], partners, rows.lead)

    if tiling.parts > 1:
        add_parts(m, sums, part, tiling.parts, w.piece)
        with when(part == 0):
            finish()
    else:
        finish()


def scaling_of(
    operands: Operands,
    unit: CodeUnit,
    rows: RowMap,
    weight_row: Callable[[Any], Any],
    tiling: Tiling,
    stages: int,
    row: Any,
    column: Any,
) -> Scaling | None:
    """The scales of groups, where codes have any."""
    product, m, x_scales = operands.product, operands.machine, operands.x_scales
    period = period_of(product, unit, tiling.depth // tiling.parts)
    if not period or x_scales is None:
        return None

    def side(size: int, group: int, groups: int, row_of: Callable[[Any], Any], scale: Callable[[Any], Any]) -> Any:
        def scale_of(local: Any, number: Any) -> Any:
            return scale(T.bind(row_of(local) * groups + number))

        return ScaleSide(m, size, tiling.depth, period, stages, group, groups, scale_of) if group else None

    layout = Layout(product.weight, product.depth)  # type: ignore[arg-type]  # it has a format
    x_group = product.rounded or 0
    x_groups = product.depth // (x_group or product.depth)
    x = side(tiling.rows, x_group, x_groups, rows.source, lambda at: x_scales.elements[at])
    w = side(tiling.columns, layout.format.group, layout.groups, weight_row, operands.weight.row_scale)
    return Scaling(unit, period, x, w, row, column)


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
                sums[i] = sums[i] + T.reinterpret(sums.dtype, words[at(other, i)])


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
