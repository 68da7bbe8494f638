"""Whatever no kernel of ours serves is lowered by TVM's own rules."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from .backend import backend

__all__ = ["Legalize"]


@dataclass(frozen=True)
class Legalize:
    """Ops that are left become PrimFuncs, neighbours are fused; semantic ops without a kernel become their bodies.

        y = add(x, x); z = exp(y)   ->   z = call_tir(fused_add_exp, (x,))

    Keeps: the values, but for the order of sums inside a fused kernel. Leaves alone: calls of kernels.
    """

    name: str = "legalize"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        machine = backend(goal.target)
        with machine.legalize_target():
            module = tvm.transform.Sequential(
                [
                    relax.transform.InlinePrivateFunctions(),
                    relax.backend.DispatchSampling(),
                    relax.backend.DispatchSortScan(),
                    relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),  # a view
                    relax.transform.AnnotateTIROpPattern(),
                    relax.transform.FoldConstant(),
                    relax.transform.FuseOps(),
                    relax.transform.FuseTIR(),
                    relax.transform.DeadCodeElimination(entries(module)),
                ]
            )(module)
            return machine.schedule(module)


def entries(module: tvm.IRModule) -> list[str]:
    """Names of the functions that can be called from outside."""
    return [v.name_hint for v, f in module.functions.items() if f.attrs and "global_symbol" in f.attrs]
