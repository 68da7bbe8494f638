"""The reference of a program in the kernels form: the same functions over the same weights, in plain loops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tvm

from ..backend import Backend, backend
from ..bundle_arguments import AddCopyPages, BundleArguments
from ..gpu.pack import row_elements
from ..lift_weights import RECIPES, LiftWeights
from ..lower_embedding import LowerEmbedding
from ..lower_experts import LowerExperts
from ..lower_matmul import LowerMatmul
from . import loops, quantized

__all__ = ["PlainBackend", "PlainTarget", "reference"]

# Those of the last stage that say what a function takes. Row work, appends and attention stay as the program has them.
PASSES = (LowerEmbedding(), LowerMatmul(), LowerExperts(), LiftWeights(), AddCopyPages(), BundleArguments())


@dataclass(frozen=True)
class PlainTarget:
    """No machine: what a GPU target is given, computed in plain loops."""

    of: Any
    kind: str = "plain"


@dataclass(frozen=True)
class PlainBackend:
    """See llmc.codegen.backend.Backend; only what PASSES ask for. Weights lie as the GPU's."""

    target: PlainTarget
    invariant: bool = True

    @property
    def machine(self) -> Backend:
        return backend(self.target.of)

    @property
    def mixes(self):
        return self.machine.mixes

    @property
    def activations(self):
        return self.machine.activations

    def pack(self, emit, parts, columns, depth, weight):
        return self.machine.pack(emit, parts, columns, depth, weight)

    def matmul(self, columns, depth, *, weight, activation, out, rounded=None):
        if not isinstance(weight, str):
            made = {"activation": activation, "out": out, "rounded": rounded}
            return quantized.matmul(self.target.of, columns, depth, format=weight, **made)
        return loops.matmul(columns, depth, row_elements(depth, weight), weight, activation, out)

    def expert_linear(self, experts, columns, depth, *, weight, activation, ids, bias, rounded=None):
        if not isinstance(weight, str):
            made = {"activation": activation, "ids": ids, "bias": bias, "rounded": rounded}
            return quantized.expert_linear(self.target.of, experts, columns, depth, format=weight, **made)
        stride = row_elements(depth, weight)
        return loops.expert_linear(experts, columns, depth, stride, weight, activation, ids, bias)

    def take(self, rows, depth, *, weight, out, ids):
        if not isinstance(weight, str):
            return quantized.take(self.target.of, rows, depth, format=weight, out=out, ids=ids)
        return loops.take(rows, depth, row_elements(depth, weight), weight, out, ids)

    def copy_pages(self, page, dtype):
        return loops.copy_pages(page, dtype)


def reference(module: tvm.IRModule, goal) -> tvm.IRModule | None:
    """The ragged form, for a GPU target -> what its kernels form computes, for any machine to run; None for a CPU.

    Its functions take the same arguments, the same weights in the same order. Products are plain loops, appends and
    attention the loops that say what they mean, and everything else ops that TVM lowers by its own rules: none of it is
    code that the target's kernels are made of.
    """
    if goal.target.kind == "cpu":
        return None
    goal = replace(goal, target=PlainTarget(goal.target))
    for step in PASSES:
        module = step.run(module, goal)
    return module.without_attr(RECIPES)
