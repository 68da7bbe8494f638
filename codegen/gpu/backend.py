"""The kernels of a GPU, as the last stage asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm

__all__ = ["GpuBackend"]


@dataclass(frozen=True)
class GpuBackend:
    """See llmc.codegen.backend.Backend."""

    target: Any
    activations: tuple[str, ...] = ("float32", "bfloat16", "float16")
    invariant: bool = False

    @property
    def mixes(self):
        return self.target.matrix_unit == "simdgroup"  # its operands pass registers, converted, on their way anyway

    def pack(self, emit, parts, columns, depth, weight):
        from . import quantized
        from .pack import pack

        if not isinstance(weight, str):
            return quantized.pack(self.target, emit, parts, columns, depth, weight)
        (rows,) = parts
        return [pack(emit, rows, columns, depth, weight)]

    def matmul(self, columns, depth, *, weight, activation, out, rounded=None):
        from . import quantized
        from .matmul import matmul

        made = {"activation": activation, "out": out, "batch_invariant": None}
        if not isinstance(weight, str):
            return quantized.matmul(self.target, columns, depth, format=weight, rounded=rounded, **made)
        return matmul(self.target, columns, depth, weight=weight, **made)

    def expert_linear(self, experts, columns, depth, *, weight, activation, ids, bias, rounded=None):
        from ..epilogue import Epilogue
        from . import quantized
        from .experts import expert_linear

        if not isinstance(weight, str):
            made = {"activation": activation, "ids": ids, "bias": bias, "rounded": rounded, "batch_invariant": None}
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
            batch_invariant=None,
        )

    def take(self, rows, depth, *, weight, out, ids):
        from . import quantized
        from .gather import take

        if not isinstance(weight, str):
            return quantized.take(self.target, rows, depth, format=weight, out=out, ids=ids)
        return take(self.target, rows, depth, weight=weight, out=out, packed=True, ids=ids)

    def append_pages(self, **made: Any):
        from .append import append_pages

        return append_pages(self.target, **made)

    def paged_attention(self, **made: Any):
        from .attention import paged_attention

        return paged_attention(self.target, **made, batch_invariant=None)

    def copy_pages(self, page, dtype):
        from .append import copy_pages

        return copy_pages(self.target, page, dtype)

    def sample(self, vocab):
        from .sample import sample

        return sample(self.target, vocab)

    def row_kernel(self, program, name, params):
        from .rows import row_kernel

        return row_kernel(program, name, params, self.target)

    def fits(self, program, tensors):
        from .rows import workspaces

        return tensors + workspaces(program, self.target) + 1 <= self.target.most_tensors  # one: all numbers

    def legalize_target(self):
        return tvm.target.Target(self.target.tvm(), host=self.target.host_tvm())

    def schedule(self, module):
        from .leftovers import schedule

        return schedule(module, self.target)
