"""Functions beside embed and step whose sums are in one order, whatever else is in the step."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from llmc.ir.rewrite import Rewriter, bindings, op_name

from .backend import backend
from .invariance import INVARIANCE, MISSING, is_asked

__all__ = ["AddInvariantStep"]

FUNCTIONS = ("embed", "step")
SUFFIX = "_invariant"


@dataclass(frozen=True)
class AddInvariantStep:
    """Adds step_invariant beside step, and embed_invariant beside an embed with products: they ask their kernels.

        step:            q = call_tir(matmul_512x512, (x, w, 0))
        step_invariant:  q = call_tir(matmul_512x512, (x, w, 1))

    The kernels are the same, machine code included: which of their launches is taken is for host code to say.

    Keeps every other function. Leaves alone: machines whose kernels have one order for every sum anyway, and programs
    with a kernel that has none.
    """

    name: str = "add_invariant_step"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        if backend(goal.target).invariant:
            return module
        if any(
            INVARIANCE in k.attrs and k.attrs[INVARIANCE] == MISSING for f in FUNCTIONS for k in _kernels(module, f)
        ):
            return module
        for name in FUNCTIONS:
            if name == "step" or any(map(is_asked, _kernels(module, name))):
                module = _Ask(module, name).run(into=name + SUFFIX)
        return module


def _kernels(module, function):
    """The kernels that a function calls, call by call."""
    for b in bindings(module[function]):
        if (op_name(b.value) or "").startswith("call_tir"):
            yield module[b.value.args[0]]


class _Ask(Rewriter):
    def rewrite(self, var, value):
        if op_name(value) != "call_tir" or not is_asked(self.module[value.args[0]]):
            return self.again(value)
        given = [self.get(x) for x in value.args[1].fields]
        return relax.op.call_tir(value.args[0], [*given[:-1], tvm.tirx.IntImm("int64", 1)], var.ty)
