"""How kernels say whether their sums depend on what else is in a step: an attribute, and the argument that asks."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

__all__ = ["ASKED", "INVARIANCE", "MISSING", "arguments", "declared", "is_asked"]

# Attribute of a PrimFunc. Without it a kernel takes every sum in one order, whatever else is in the step.
INVARIANCE = "llmc.invariance"
ASKED = "asked"  # a call says by an int64, the last argument before the outputs, whether it must: 0 or 1
MISSING = "missing"  # the order depends on the number of rows, and there is no other


def declared(kernel: tirx.PrimFunc, invariant: bool) -> tirx.PrimFunc:
    """A kernel that sums over products. What says nothing has no invariant order, unless all of the machine's have."""
    if invariant or INVARIANCE in kernel.attrs:
        return kernel
    return kernel.with_attr(INVARIANCE, MISSING)


def arguments(kernel: tirx.PrimFunc, inputs: list) -> list[relax.Expr]:
    """The arguments of a call_tir of a kernel: it may sum in any order."""
    return [*inputs, tvm.tirx.IntImm("int64", 0)] if is_asked(kernel) else inputs


def is_asked(kernel: tirx.PrimFunc) -> bool:
    """Whether a call of the kernel has the argument."""
    return bool(kernel.attrs) and INVARIANCE in kernel.attrs and kernel.attrs[INVARIANCE] == ASKED
