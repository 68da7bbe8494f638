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
from .machine import INVARIANT, Machine, choose, i64, kernel, when
from .matrix_units import MatrixUnit, matrix_unit
from .product import Operands, Product, RowMap
from .round_rows import round_rows

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
    rounded: x is rounded to 8 bits first, in groups of so many (0: rows), as round_activation says.
    batch_invariant: a row's numbers are the same bits whatever the number of rows, as few rows cost as much as many;
    None: every call says, by the argument `invariant` (int64, 0 or 1).

    Arguments of the PrimFunc, in this order:
      x [n, depth] activation; the weight's tensors, weight_rows.weight_tensors: of a dtype w [columns,
      pack.row_elements(depth, weight)], zeros past depth; of a format those of quantized_layout.Layout;
      bias [columns] epilogue.bias, if there is one; residual [n, columns_out] epilogue.residual, if there is one;
      invariant, if batch_invariant is None; y [n, columns_out] out, where columns_out is columns, or columns // 2 with
      a gate. n may be 0.
    """
    product = Product(target, columns, depth, weight, activation, out or activation, epilogue or Epilogue())

    def body(symbols: dict, *arguments: Any) -> None:
        n, machine = symbols["n"], Machine(target)
        *inputs, y = arguments
        invariant = inputs.pop() if batch_invariant is None else batch_invariant
        operands = Operands.of(product, machine, [*inputs, y])
        with when(n > 0):
            launches(operands if rounded is None else round_rows(operands, n, rounded), n, invariant)

    *inputs, y = product.params()
    return kernel(name, [*inputs, *([INVARIANT] if batch_invariant is None else []), y], body)


def launches(operands: Operands, n: Any, invariant: Any) -> None:
    """The kernels of a product of n rows, n int64 and not 0, one of which is launched.

    invariant: whether only those that sum in one order may be, known now (a bool) or at the call (int64).
    """
    product, machine = operands.product, operands.machine
    target = product.target

    def few(batch: int) -> Callable[[], None]:
        made = gemv.plan(product, batch)

        def emit() -> None:
            with machine.launch([made.columns(product).tiles], gemv.WARPS * target.warp) as (column_tile,):
                gemv.tile(operands, RowMap(n, lambda r: r), made, column_tile)

        return emit

    def tiled(height: int, threads: int, tiles: int, emit: Callable[[RowMap, Any], None]) -> Callable[[], None]:
        def launch() -> None:
            grid = [T.floordiv(n + (height - 1), T.int64(height)), tiles]
            with machine.launch(grid, threads) as (row_tile, column_tile):
                first = T.bind(i64(row_tile) * height)
                emit(RowMap(T.bind(n - first), lambda r: first + r), column_tile)

        return launch

    def on_unit(unit: MatrixUnit, tiling: gemm.Tiling) -> Callable[[], None]:
        def emit(rows: RowMap, column_tile: Any) -> None:
            gemm.tile(operands, unit, rows, tiling, column_tile)

        tiles = tiling.column_map(product, unit).tiles
        return tiled(tiling.rows, tiling.warps * target.warp, tiles, emit)

    cases: Cases = [(n <= batch, few(batch)) for batch in FEW]
    unit = matrix_unit(machine, product)
    if unit is None:
        many = tiled(simt.SIDE, simt.THREADS, simt.column_map(product).tiles,
                     lambda rows, column_tile: simt.tile(operands, rows, column_tile))  # fmt: skip
    else:
        short, middle, large = gemm.tilings(target, product.weight)
        cases.append((n <= 2 * short.rows, on_unit(unit, short)))
        # Blocks of the large tiling read less, where there are enough of them for the whole machine.
        blocks = T.floordiv(n + (large.rows - 1), T.int64(large.rows)) * large.column_map(product, unit).tiles
        cases.append((blocks < target.multiprocessors, on_unit(unit, middle)))
        many = on_unit(unit, large)
    choose(allowed(cases, len(FEW) + (unit is not None), invariant), many)


def allowed(cases: Cases, other: int, invariant: Any) -> Cases:
    """The cases that may be taken, where the first `other` sum in orders of their own."""
    if invariant is False:
        return cases
    if invariant is True:
        return cases[other:]
    return [(T.And(invariant == 0, c), emit) if i < other else (c, emit) for i, (c, emit) in enumerate(cases)]
