"""Kernels over quantized weights: the products and lookups of a GPU, for a Format where others have a dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relax

from llmc.ir.quantized import Format
from llmc.targets.gpu import GpuTarget

from ..epilogue import Epilogue
from . import experts as experts_
from . import gather
from . import matmul as matmul_
from .quantized_layout import pack as pack_

__all__ = ["expert_linear", "matmul", "pack", "take"]


def pack(
    target: GpuTarget,
    emit: Callable[[relax.Expr], relax.Expr],
    parts: Sequence[relax.Expr],
    columns: int,
    depth: int,
    format: Format,
) -> list[relax.Expr]:
    """The parts [..., columns, …] of a weight as quantized_layout.Layout.tensors has them, in Relax ops.

    CompileError where no kernel reads the format.
    """
    return pack_(emit, parts, depth, format, target.name)


def matmul(
    target: GpuTarget,
    columns: int,
    depth: int,
    *,
    format: Format,
    activation: str,
    out: str,
    rounded: int | None = None,
    epilogue: Epilogue | None = None,
    batch_invariant: bool | None = False,
) -> tvm.tirx.PrimFunc:
    """matmul(x, *packed, y): see llmc.codegen.gpu.matmul.matmul.

    rounded: x is what round_activation makes of it, in groups of so many (0: rows), with the same codes bit by bit.
    """
    return matmul_.matmul(
        target,
        columns,
        depth,
        weight=format,
        activation=activation,
        out=out,
        rounded=rounded,
        epilogue=epilogue,
        batch_invariant=batch_invariant,
    )


def expert_linear(
    target: GpuTarget,
    experts: int,
    columns: int,
    depth: int,
    *,
    format: Format,
    activation: str,
    ids: str,
    bias: str | None = None,
    rounded: int | None = None,
    batch_invariant: bool | None = False,
) -> tvm.tirx.PrimFunc:
    """expert_linear(x, *packed, ids, (bias,) y): see llmc.codegen.gpu.experts.expert_linear; rounded as of matmul."""
    return experts_.expert_linear(
        target,
        experts,
        columns,
        depth,
        weight=format,
        activation=activation,
        out=activation,
        ids=ids,
        rounded=rounded,
        epilogue=Epilogue(bias=bias),
        batch_invariant=batch_invariant,
    )


def take(target: GpuTarget, rows: int, depth: int, *, format: Format, out: str, ids: str) -> tvm.tirx.PrimFunc:
    """take(*packed, ids, y): y[i] is row ids[i] of dequantize's weight, rounded to `out` once more."""
    return gather.take_quantized(target, rows, depth, format=format, out=out, ids=ids)
