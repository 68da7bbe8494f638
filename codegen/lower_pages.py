"""The ops of the paged cache get their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx

from llmc.ir.ops import OP
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION, parameters

from .backend import backend

__all__ = ["LowerPages"]


@dataclass(frozen=True)
class LowerPages:
    """The reference loops of append_pages and paged_attention make way for the target's kernels.

        call_tir(paged_attention, ...)    llmc.op = "paged_attention", loops that say what it means
        -> call_tir(paged_attention, ...)    the same arguments, the kernel

    Keeps: the values, but for the order of sums. Leaves alone: what the machine has no kernel for and may run as its
    loops stand.
    """

    name: str = "lower_pages"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        machine, module = backend(goal.target), tvm.IRModule(module.functions, attrs=module.attrs)
        for var, function in module.functions.items():
            if not isinstance(function, tirx.PrimFunc) or not function.attrs or OP not in function.attrs:
                continue
            made, op = parameters(function), str(function.attrs[OP])
            if op == APPEND_PAGES:
                kernel = machine.append_pages(**made)
            elif op == PAGED_ATTENTION:
                kernel = machine.paged_attention(**made)
            else:
                continue
            if kernel is None:
                continue
            module[var] = kernel.without_attr("global_symbol").with_attr("op_pattern", 8)
        return module
