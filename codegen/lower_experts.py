"""Products with a weight that an index picks become kernels over packed experts."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.ops import attributes_of, op_of
from llmc.ir.rewrite import Rewriter, bindings

from .backend import activation_dtype, backend, label
from .invariance import arguments, declared
from .lower_matmul import unrounded
from .weight_only import FLOATS, WeightOnly, rows_of

__all__ = ["LowerExperts"]


@dataclass(frozen=True)
class LowerExperts:
    """expert_linear(x, w, ids, bias) with a weight-only w becomes a call of the kernel for its shape.

        y = expert_linear(x [s, i], w [e, o, i], ids [s])
        -> y = call_tir(expert_linear_8x512x256, (x, packed, ids))      packed: weight-only, expert after expert

    Keeps: the values, but for the order of sums. The experts that no row picked are not read.
    """

    name: str = "lower_experts"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        return _Lower(module, "step", backend(goal.target)).run()


class _Lower(Rewriter):
    def __init__(self, module, function, machine):
        super().__init__(module, function)
        self.machine, self.known = machine, WeightOnly(module, self.old)
        self.bound = {b.var: b.value for b in bindings(self.old)}

    def rewrite(self, var, value):
        if op_of(self.module, value) != "expert_linear":
            return self.again(value)
        x, w, ids, *bias = value.args
        if w not in self.known or any(str(a.ty.dtype) not in FLOATS for a in (x, w)):
            return self.again(value)
        rows = rows_of(self, self.known, w, transposed=bool(attributes_of(self.module, value)["transposed"]))
        experts, columns, depth = rows.shape
        x, rounded = unrounded(self, x, rows.weight)
        wanted = str(var.ty.dtype)
        activation = activation_dtype(self.machine, str(x.ty.dtype))
        bias = [self.get(b) for b in bias]
        kernel = self.machine.expert_linear(
            experts,
            columns,
            depth,
            weight=rows.weight,
            activation=activation,
            ids=str(ids.ty.dtype),
            bias=str(bias[0].ty.dtype) if bias else None,
            rounded=rounded,
        )
        kernel = declared(kernel, self.machine.invariant)
        name = f"expert_linear_{experts}x{columns}x{depth}"
        if not isinstance(rows.weight, str):
            name += f"_{label(rows.weight, rounded)}"
        called = self.builder.add_func(kernel.without_attr("global_symbol"), name)
        packed = self.machine.pack(self.emit, rows.parts, columns, depth, rows.weight)
        if str(x.ty.dtype) != activation:
            x = self.emit(R.astype(x, activation))
        given = arguments(kernel, [x, *packed, self.get(ids), *bias])
        y = R.call_tir(called, given, relax.TensorType(var.ty.shape, activation))
        return y if activation == wanted else R.astype(self.emit(y), wanted)
