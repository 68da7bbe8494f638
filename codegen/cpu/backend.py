"""The kernels of a CPU, as the last stage asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm.relax import op as R

from llmc.targets import CpuTarget

from ..epilogue import Epilogue
from . import quantized
from .append import append_pages, copy_pages
from .attention import paged_attention
from .experts import expert_linear
from .gather import take
from .matmul import matmul
from .pack import panels
from .rows import row_kernel

__all__ = ["CpuBackend"]


@dataclass(frozen=True)
class CpuBackend:
    """See llmc.codegen.backend.Backend."""

    target: CpuTarget
    activations: tuple[str, ...] = ("float32", "bfloat16")
    invariant: bool = True
    mixes: bool = False

    def pack(self, emit, parts, columns, depth, weight):
        """Of floats: rows [..., columns, depth] in panels [..., panels, steps, vectors, lanes(, 2)]: see pack.py."""
        if not isinstance(weight, str):
            return quantized.pack(self.target, emit, parts, columns, depth, weight)
        (rows,) = parts
        layout = panels(self.target, columns, depth, weight)
        lead = [int(d) for d in rows.ty.shape][:-2]
        zeros = [0, 0] * len(lead)
        down, along = layout.count * layout.width - layout.columns, layout.steps * layout.pair - layout.depth
        if down or along:
            rows = emit(R.nn.pad(rows, [*zeros, 0, down, 0, along], "constant", 0.0))
        shape = [*lead, layout.count, layout.vectors, layout.lanes, layout.steps]
        k = len(lead)
        axes = [*range(k), k, k + 3, k + 1, k + 2]
        if layout.pair == 2:
            shape, axes = [*shape, 2], [*axes, k + 4]
        return [emit(R.permute_dims(emit(R.reshape(rows, shape)), axes))]

    def matmul(self, columns, depth, *, weight, activation, out, rounded=None):
        made = {"activation": activation, "out": out}
        if not isinstance(weight, str):
            return quantized.matmul(self.target, columns, depth, format=weight, rounded=rounded, **made)
        return matmul(self.target, columns, depth, weight=weight, **made)

    def expert_linear(self, experts, columns, depth, *, weight, activation, ids, bias, rounded=None):
        if not isinstance(weight, str):
            made = {"activation": activation, "ids": ids, "bias": bias, "rounded": rounded}
            return quantized.expert_linear(self.target, experts, columns, depth, format=weight, **made)
        return expert_linear(
            self.target,
            experts,
            columns,
            depth,
            weight=weight,
            activation=activation,
            out=activation,
            ids=ids,
            epilogue=Epilogue(bias=bias),
        )

    def take(self, rows, depth, *, weight, out, ids):
        if not isinstance(weight, str):
            return quantized.take(self.target, rows, depth, format=weight, out=out, ids=ids)
        return take(self.target, rows, depth, weight=weight, out=out, packed=True, ids=ids)

    def append_pages(self, **made: Any):
        return append_pages(self.target, **made)

    def paged_attention(self, **made: Any):
        """None for pages whose size is no multiple of a vector, and for keys that don't lie with their tokens last."""
        if not made["keys_token_last"] or made["page_size"] % self.target.lanes:
            return None
        return paged_attention(self.target, **made)

    def copy_pages(self, page, dtype):
        return copy_pages(self.target, page, dtype)

    def sample(self, vocab):
        return None

    def row_kernel(self, program, name, params):
        return row_kernel(program, name, params, self.target)

    def fits(self, program, tensors):
        return True  # they are passed by one pointer

    def legalize_target(self):
        return tvm.target.Target(self.target.llvm())

    def schedule(self, module):
        return module
