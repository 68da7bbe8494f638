"""Matrix products: y = epilogue(x @ W^T), by the kernel that suits the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format
from llmc.targets.gpu import GpuTarget

from ..epilogue import Epilogue
from . import gemm, gemv, simt
from .code_units import code_unit
from .machine import INVARIANT, Machine, choose, i64, kernel, when
from .matrix_units import MatrixUnit, matrix_unit
from .product import Operands, Product, RowMap
from .round_rows import round_codes, round_rows

Cases = list[tuple[Any, Callable[[], None]]]
FEW = (1, 4, 8)  # rows for which there is a matrix-vector kernel


def matmul(
    target: GpuTarget,
    columns: int,
    depth: int,
    *,
    weight: str | Format = "float32",
    activation: str = "float32",
    out: str | None = None,
    epilogue: Epilogue | None = None,
    batch_invariant: bool | None = False,
    rounded: int | None = None,
    name: str = "matmul",
) -> tvm.tirx.PrimFunc:
    """y = epilogue(x @ W^T), summed in float32, rounded once.

    columns, depth: the shape of W as a checkpoint has it, [columns, depth]. weight, activation, out: dtypes of W, of x,
    and of y (default: that of x), "float32", "float16" or "bfloat16"; W may have a format. float32 operands are
    multiplied as float32; numbers of a format as float32, or, where a matrix unit multiplies 16-bit operands, rounded
    once to x's dtype: as near the product as half an ulp of that dtype is of every weight.
    rounded: x is rounded to 8 bits first, in groups of so many (0: rows), as round_activation says. Where the machine
    multiplies integers (code_units), and for more than a few rows, codes are multiplied as they are: sums of integers
    are exact, within groups or, where there are none, altogether; they are scaled in float32, and x is not rounded to
    its dtype again.
    batch_invariant: a row's numbers are the same bits whatever the number of rows, as few rows cost as much as many;
    None: every call says, by the argument `invariant` (int64, 0 or 1).

    Arguments of the PrimFunc, in this order:
      x [n, depth] activation; the weight's tensors, weight_rows.weight_tensors: of a dtype w [columns,
      pack.row_elements(depth, weight)], zeros past depth; of a format those of quantized_layout.Layout;
      bias [columns] epilogue.bias, if there is one; residual [n, columns_out] epilogue.residual, if there is one;
      invariant, if batch_invariant is None; y [n, columns_out] out, where columns_out is columns, or columns // 2 with
      a gate. n may be 0.
    """
    out = out or activation
    product = Product(target, columns, depth, weight, activation, out, epilogue or Epilogue(), rounded=rounded)

    def body(symbols: dict, *arguments: Any) -> None:
        n, machine = symbols["n"], Machine(target)
        *inputs, y = arguments
        invariant = inputs.pop() if batch_invariant is None else batch_invariant
        operands = Operands.of(product, machine, [*inputs, y])
        with when(n > 0):
            launches(operands, n, invariant)

    *inputs, y = product.params()
    return kernel(name, [*inputs, *([INVARIANT] if batch_invariant is None else []), y], body)


def launches(operands: Operands, n: Any, invariant: Any) -> None:
    """The kernels of a product of n rows, n int64 and not 0, one of which is launched.

    invariant: whether only those that sum in one order may be, known now (a bool) or at the call (int64).
    """
    unit = code_unit(operands.machine, operands.product)
    if unit is None:
        operands = round_rows(operands, n)
        cases, otherwise, own = many_rows(operands, matrix_unit(operands.machine, operands.product), n)
        return choose(allowed([*few_rows(operands, n), *cases], len(FEW) + own, invariant), otherwise)

    def few() -> None:
        *cases, (_, last) = few_rows(round_rows(operands, n), n)
        choose(cases, last)

    def many() -> None:
        cases, otherwise, own = many_rows(round_codes(operands, n), unit, n)
        choose(allowed(cases, own, invariant), otherwise)

    return choose(allowed([(n <= FEW[-1], few)], 1, invariant), many)


def few_rows(operands: Operands, n: Any) -> Cases:
    """Matrix-vector kernels; the last is for FEW[-1] rows."""
    product, machine = operands.product, operands.machine

    def few(batch: int) -> Callable[[], None]:
        made = gemv.plan(product, batch)

        def emit() -> None:
            with machine.launch([made.columns(product).tiles], gemv.WARPS * product.target.warp) as (column_tile,):
                gemv.tile(operands, RowMap(n, lambda r: r), made, column_tile)

        return emit

    return [(n <= batch, few(batch)) for batch in FEW]


def many_rows(operands: Operands, unit: MatrixUnit | None, n: Any) -> tuple[Cases, Callable[[], None], int]:
    """Tiled kernels: the cases; what else is taken; how many of the cases sum in an order of their own."""
    product, machine = operands.product, operands.machine

    def tiled(height: int, threads: int, tiles: int, emit: Callable[[RowMap, Any], None]) -> Callable[[], None]:
        def launch() -> None:
            grid = [T.floordiv(n + (height - 1), T.int64(height)), tiles]
            with machine.launch(grid, threads) as (row_tile, column_tile):
                first = T.bind(i64(row_tile) * height)
                emit(RowMap(T.bind(n - first), lambda r: first + r), column_tile)

        return launch

    if unit is None:
        tiles = simt.column_map(product).tiles
        return [], tiled(simt.SIDE, simt.THREADS, tiles, lambda rows, tile: simt.tile(operands, rows, tile)), 0

    def on_unit(tiling: gemm.Tiling) -> Callable[[], None]:
        def emit(rows: RowMap, column_tile: Any) -> None:
            gemm.tile(operands, unit, rows, tiling, column_tile)

        tiles = tiling.column_map(product, unit).tiles
        return tiled(tiling.rows, tiling.warps * product.target.warp, tiles, emit)

    short, middle, large = gemm.tilings(product, unit)
    # Blocks of the large tiling read less, where there are enough of them for the whole machine.
    blocks = T.floordiv(n + (large.rows - 1), T.int64(large.rows)) * large.column_map(product, unit).tiles
    small = blocks < product.target.multiprocessors
    return [(n <= 2 * short.rows, on_unit(short)), (small, on_unit(middle))], on_unit(large), 1


def allowed(cases: Cases, other: int, invariant: Any) -> Cases:
    """The cases that may be taken, where the first `other` sum in orders of their own."""
    if invariant is False:
        return cases
    if invariant is True:
        return cases[other:]
    return [(T.And(invariant == 0, c), emit) if i < other else (c, emit) for i, (c, emit) in enumerate(cases)]
