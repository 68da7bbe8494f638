"""The ops of the paged cache get their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax, tirx

from llmc.ir.ops import OP
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION, parameters
from llmc.ir.rewrite import Rewriter, op_name

from .backend import backend
from .invariance import arguments, declared, is_asked

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
        asked: dict[str, tirx.PrimFunc] = {}
        for var, function in module.functions.items():
            if not isinstance(function, tirx.PrimFunc) or not function.attrs or OP not in function.attrs:
                continue
            made, op = parameters(function), str(function.attrs[OP])
            if op == APPEND_PAGES:
                kernel = machine.append_pages(**made)
            elif op == PAGED_ATTENTION:
                kernel = machine.paged_attention(**made)
                kernel = kernel and declared(kernel, machine.invariant)
            else:
                continue
            if kernel is None:
                continue
            kernel = kernel.without_attr("global_symbol").with_attr("op_pattern", 8)
            if is_asked(kernel):
                asked[var.name_hint] = kernel
            else:
                module[var] = kernel
        return _Ask(module, asked).run() if asked else module


class _Ask(Rewriter):
    """Kernels that are asked take the place of loops, which are not: their calls have an argument more."""

    def __init__(self, module: tvm.IRModule, kernels: dict[str, tirx.PrimFunc]):
        # A new kernel is to have its loops' name, which must be free for that.
        module = tvm.IRModule(
            {v: f for v, f in module.functions.items() if v.name_hint not in kernels}, attrs=module.attrs
        )
        super().__init__(module, "step")
        self.kernels = kernels
        self.called = {name: self.builder.add_func(kernel, name) for name, kernel in kernels.items()}

    def rewrite(self, var, value):
        if op_name(value) != "call_tir" or value.args[0].name_hint not in self.kernels:
            return self.again(value)
        name = value.args[0].name_hint
        given = arguments(self.kernels[name], [self.get(x) for x in value.args[1].fields])
        return relax.op.call_tir(self.called[name], given, var.ty)
