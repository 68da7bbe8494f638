"""Matrix products with a weight become kernels over packed weights."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.quantized import activation_group, activation_kind
from llmc.ir.rewrite import Rewriter, bindings, op_name

from .backend import activation_dtype, backend, label
from .invariance import arguments, declared
from .weight_only import FLOATS, WeightOnly, rows_of, variables

__all__ = ["LowerMatmul"]


@dataclass(frozen=True)
class LowerMatmul:
    """matmul(x [..., depth], w [depth, columns]) with a weight-only w becomes a call of the kernel for its shape.

        y = matmul(x, permute_dims(astype(w, "float32")))
        ->
        packed = permute_dims(reshape(pad(w)))          weight-only, as the machine packs; LiftWeights: a recipe
        y = call_tir(matmul_2048x512, (x, packed))

    A quantized weight is packed part by part, and what it is multiplied with rounded by the kernel:

        y = matmul(round_activation(x), permute_dims(dequantize(codes, scales)))
        -> y = call_tir(matmul_2048x512_int4_g32_a8, (x, *packed))

    Keeps: the values, but for the order of sums (float32, in rising k) and for one rounding where a cast of the product
    to the activations' dtype follows. A weight is packed in the checkpoint's dtype: widening casts in between are
    dropped, and those from bfloat16 to float16 where the machine reads either: the weight is not rounded then, and lies
    as it does for other machines. Leaves alone: products of activations, and weights with more than two axes.
    """

    name: str = "lower_matmul"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        for function in ("embed", "step"):
            module = _Lower(module, function, backend(goal.target)).run()
        return module


def unrounded(rewriter, x: relax.Expr, weight) -> tuple[relax.Expr, int | None]:
    """What a product's kernel takes for the old activation x, and the group in which it rounds it itself, or None.

    rewriter: a Rewriter with `bound`, the bindings of its function. Kernels over floats take what was rounded, as do
    those over weights beside which other numbers would be rounded to.
    """
    value = rewriter.bound.get(x)
    own = not isinstance(weight, str) and activation_kind(rewriter.module, value) == weight.rounds
    group = activation_group(rewriter.module, value) if own else None
    return (rewriter.get(x), None) if group is None else (rewriter.get(value.args[0]), group)


class _Lower(Rewriter):
    def __init__(self, module, function, machine):
        super().__init__(module, function)
        self.machine = machine
        self.known = WeightOnly(module, self.old)
        self.bound = {b.var: b.value for b in bindings(self.old)}
        self.users: dict[relax.Var, list] = {}
        for b in bindings(self.old):
            for x in variables(b.value):
                self.users.setdefault(x, []).append(b)
        self.folded: set[relax.Var] = set()  # casts that the kernel before them does

    def rewrite(self, var, value):
        if var in self.folded:
            return self.get(value.args[0])
        if not self._applies(value):
            return self.again(value)
        x, w = value.args
        depth, columns = (int(d) for d in w.ty.shape)
        weight, parts = rows_of(self, self.known, w, transposed=True)
        x, rounded = unrounded(self, x, weight)
        activation = activation_dtype(self.machine, str(x.ty.dtype))
        out = self._out(var)
        packed = self.machine.pack(self.emit, parts, columns, depth, weight)
        kernel = self.machine.matmul(columns, depth, weight=weight, activation=activation, out=out, rounded=rounded)
        kernel = declared(kernel, self.machine.invariant)
        name = f"matmul_{columns}x{depth}" + ("" if weight == "float32" else f"_{label(weight, rounded)}")
        called = self.builder.add_func(kernel.without_attr("global_symbol"), name)
        if str(x.ty.dtype) != activation:
            x = self.emit(R.astype(x, activation))
        lead = list(x.ty.shape)[:-1]
        count = lead[0]
        for d in lead[1:]:
            count = count * d
        if len(lead) != 1:
            x = self.emit(R.reshape(x, [count, depth]))
        y = R.call_tir(called, arguments(kernel, [x, *packed]), relax.TensorType([count, columns], out))
        if len(lead) != 1:
            y = R.reshape(self.emit(y), [*lead, columns])
        wanted = str(var.ty.dtype)
        if out != wanted and not self._folds(var):
            y = R.astype(self.emit(y), wanted)
        return y

    def _applies(self, value) -> bool:
        if op_name(value) != "matmul":
            return False
        x, w = value.args
        known = w in self.known and x not in self.known and len(w.ty.shape) == 2 and len(x.ty.shape) > 0
        return known and all(str(a.ty.dtype) in FLOATS for a in (x, w))

    def _folds(self, var) -> bool:
        """The product's only user casts it to a dtype that the kernel may give."""
        users = self.users.get(var, [])
        if len(users) != 1 or var.same_as(self.old.body.body):
            return False
        return op_name(users[0].value) == "astype" and str(users[0].var.ty.dtype) in self.machine.activations

    def _out(self, var) -> str:
        if self._folds(var):
            user = self.users[var][0].var
            self.folded.add(user)
            return str(user.ty.dtype)
        return activation_dtype(self.machine, str(var.ty.dtype))
