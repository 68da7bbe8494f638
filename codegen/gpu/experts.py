"""Mixture of experts: a matrix product whose weight an index picks, row by row.

Weights of experts that no row picked are not read. A row's numbers don't depend on the others.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets.gpu import GpuTarget

from ..epilogue import Epilogue
from . import gemv
from .machine import Machine, i64, kernel, when
from .product import Operands, Product, RowMap


def expert_linear(
    target: GpuTarget,
    experts: int,
    columns: int,
    depth: int,
    *,
    weight: str = "float32",
    activation: str = "float32",
    out: str | None = None,
    ids: str = "int32",
    epilogue: Epilogue | None = None,
    name: str = "expert_linear",
) -> tvm.tirx.PrimFunc:
    """y[s] = epilogue(x[s] @ W[ids[s]]^T): the kernel of `llmc.ir.ops.expert_linear`.

    Arguments of the PrimFunc, in this order:
      x [s, depth] activation; w [experts, columns, pack.row_elements(depth, weight)] weight;
      ids [s] of dtype `ids`, each in 0 … experts-1; bias [experts, columns] epilogue.bias, if there is one;
      residual [s, columns_out] epilogue.residual, if there is one; y [s, columns_out] out.
    Dtypes, epilogue and columns_out as in `matmul`. s may be 0.
    """
    product = Product(target, columns, depth, weight, activation, out or activation, epilogue or Epilogue(), experts)
    made = gemv.plan(product, 1)

    def body(symbols: dict, *buffers: Any) -> None:
        n, machine = symbols["n"], Machine(target)
        operands = Operands.of(product, machine, buffers, ids)
        with when(n > 0):
            grid = [n, made.columns(product).tiles]
            with machine.launch(grid, gemv.WARPS * target.warp) as (row, column_tile):
                lead = T.bind(i64(operands.ids.elements[i64(row)]) * columns)
                gemv.tile(operands, RowMap(T.int64(1), lambda r: i64(row) + r, lead), made, column_tile)

    return kernel(name, product.params(ids), body)
