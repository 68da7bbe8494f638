"""The kernels of a CPU over quantized weights: how they are packed, and their products by whichever way fits."""

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax
from tvm.tirx.script import builder as T

from llmc.ir.errors import CompileError
from llmc.ir.quantized import Format
from llmc.targets import CpuTarget

from ..epilogue import Epilogue
from .experts import expert_kernel
from .gather import each_row
from .product import Product, matmul_kernel
from .quantized_dots import DotProduct, takes
from .quantized_floats import DequantizingProduct
from .quantized_layout import STEP, QuantizedPanels
from .quantized_numbers import number, text
from .vector import Params, Vector, bits, i64, kernel, loop, scratch

__all__ = ["expert_linear", "matmul", "pack", "take"]


def pack(
    target: CpuTarget, emit: Callable, parts: Sequence[relax.Expr], columns: int, depth: int, format: Format
) -> list[relax.Expr]:
    """The parts [..., columns, depth or groups] of a weight (in Format's order) as the products of this target read
    them, in the same order, in plain Relax ops: see quantized_layout.py.
    """
    return QuantizedPanels(target, columns, depth, format).pack(emit, list(parts))


def matmul(
    target: CpuTarget,
    columns: int,
    depth: int,
    *,
    format: Format,
    activation: str = "float32",
    out: str | None = None,
    rounded: int | None = None,
    epilogue: Epilogue | None = None,
    name: str = "matmul",
) -> tvm.tirx.PrimFunc:
    """y = epilogue(x @ W^T) for a quantized W [columns, depth]: matmul(x, *packed, (bias,) (residual,) y).

    activation: dtype of x, "float32" or "bfloat16"; out: dtype of y, default that of x. rounded: the group of
    round_activation that x passes before the product (0: the whole row); the kernel rounds it. None: it doesn't.
    Rows' bits are the same whatever rows stand beside them. CompileError where there is no kernel for the format.
    """
    product = _product(target, columns, depth, format, activation, rounded, epilogue)
    return matmul_kernel(product, out or activation, name)


def expert_linear(
    target: CpuTarget,
    experts: int,
    columns: int,
    depth: int,
    *,
    format: Format,
    activation: str = "float32",
    out: str | None = None,
    rounded: int | None = None,
    ids: str = "int32",
    bias: str | None = None,
    name: str = "expert_linear",
) -> tvm.tirx.PrimFunc:
    """y[s] = epilogue(x[s] @ W[ids[s]]^T), W [experts, columns, depth]: expert_linear(x, *packed, ids, (bias,) y).

    As `matmul`; bias: its dtype [experts, columns]. Weights of experts that no row picked are not read.
    """
    product = _product(target, columns, depth, format, activation, rounded, Epilogue(bias=bias))
    return expert_kernel(product, experts, ids, out or activation, name)


def take(
    target: CpuTarget,
    rows: int,
    depth: int,
    *,
    format: Format,
    out: str = "float32",
    ids: str = "int32",
    name: str = "take",
) -> tvm.tirx.PrimFunc:
    """y[i] = W[ids[i]] for a quantized W [rows, depth], packed as for `matmul`: take(*packed, ids, y).

    out: "float32" or "bfloat16" (rounded to nearest even). n may be 0.
    """
    layout = QuantizedPanels(target, rows, depth, format)
    params: Params = [*layout.stored, ("ids", ("n",), ids), ("y", ("n", depth), out)]
    v = Vector(STEP)

    def body(symbols: dict, *buffers: Any) -> None:
        *packed, ids, y = buffers
        words, scales, zeros = layout.views(packed)
        y = bits(y)

        def copy(i: Any) -> None:
            row = T.bind(i64(ids[i]))
            p, at = T.bind(row // layout.width), T.bind(row % layout.width)
            lane = [at // layout.lanes, at % layout.lanes]

            def four(step: Any) -> Any:
                """W[row, 4 · step : 4 · step + 4]"""
                group = T.floordiv(step * STEP, T.int64(format.group)) if format.group else T.int64(0)
                where = [p, group, *lane]
                zero = None if zeros is None else v.broadcast(T.Cast("int32", zeros[tuple(where)]))
                word = layout.word(words, [], p, step, lane)
                codes = T.bind(T.Cast(v.i32, T.reinterpret(v.dtype("uint8"), word)))
                return T.bind(number(v, format, codes, zero) * v.broadcast(layout.scale(scales, where, Vector(1))))

            with loop(0, depth // STEP) as step:
                v.store(y, four(step), [i, step * STEP])
            if depth % STEP:
                end = scratch([STEP])
                v.store(end, four(T.int64(depth // STEP)), [T.int64(0)])
                for e in range(depth % STEP):
                    Vector(1).store(y, end[e], [i, T.int64(depth // STEP * STEP + e)])

        each_row(symbols["n"], copy)

    return kernel(name, params, body, target, text(format, STEP))


def _product(
    target: CpuTarget,
    columns: int,
    depth: int,
    format: Format,
    activation: str,
    rounded: int | None,
    epilogue: Epilogue | None,
) -> Product:
    epilogue = epilogue or Epilogue()
    if epilogue.gate:
        raise CompileError(f"{target.name} has no kernels for gated products of quantized weights, found {format}")
    shape: dict[str, Any] = {
        "target": target,
        "columns": columns,
        "depth": depth,
        "activation": activation,
        "epilogue": epilogue,
    }
    if takes(target, depth, format, rounded):
        return DotProduct(**shape, format=format, rounded=rounded)
    return DequantizingProduct(**shape, format=format, rounded=rounded)
