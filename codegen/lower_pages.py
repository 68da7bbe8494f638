"""The ops of the paged cache get their kernels."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import tirx

from llmc.ir.ops import OP
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION, parameters

from .cpu.append import append_pages
from .cpu.attention import paged_attention

__all__ = ["LowerPages"]


@dataclass(frozen=True)
class LowerPages:
    """The reference loops of append_pages and paged_attention make way for the target's kernels.

        call_tir(paged_attention, ...)    llmc.op = "paged_attention", loops that say what it means
        -> call_tir(paged_attention, ...)    the same arguments, the kernel

    Keeps: the values, but for the order of sums. Leaves alone: pages whose size is no multiple of a vector, and keys
    that don't lie with their tokens last: their loops run as they stand.
    """

    name: str = "lower_pages"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        target, module = goal.target, tvm.IRModule(module.functions, attrs=module.attrs)
        for var, function in module.functions.items():
            if not isinstance(function, tirx.PrimFunc) or not function.attrs or OP not in function.attrs:
                continue
            made, op = parameters(function), str(function.attrs[OP])
            if op == APPEND_PAGES:
                kernel = append_pages(target, **made)
            elif op == PAGED_ATTENTION and made["keys_token_last"] and made["page_size"] % target.lanes == 0:
                kernel = paged_attention(target, **made)
            else:
                continue
            module[var] = kernel.without_attr("global_symbol").with_attr("op_pattern", 8)
        return module
