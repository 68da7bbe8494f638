"""Weights become the parts that they are stored in, and what gives them again."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.forms import weights_of
from llmc.ir.ops import expert_linear, op_of
from llmc.ir.quantized import dequantize, round_activation
from llmc.ir.rewrite import Rewriter, dtype_of, op_name
from llmc.passes.goal import Goal
from llmc.passes.schemes import Scheme
from llmc.passes.weight_uses import Use, weight_uses

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights:
    """A weight with a scheme in goal.schemes -> its parts as parameters, and the ops that read it as what they give.

        y = matmul(x, permute_dims(w))                                          w [o, i]
        -> y = matmul(x, permute_dims(dequantize(w:codes, w:scales)))           codes [o, i], scales [o, groups]
        x = take(w, tokens)              -> x = take(dequantize(w:codes, w:scales), tokens)
        y = expert_linear(x, w, ids)     -> y = expert_linear(x, dequantize(w:codes, w:scales), ids)    [e, o, i]

    Parts are of rows [o, i] whichever way the parameter lies. Products read round_activation(x) with scheme.activation,
    x in the order of a parameter w:order [i] with scheme.ordered, and with scheme.scaled multiply(x, w:inverse_scale),
    in float32: one more factor in the kernel that makes x. Of what products of x have in common there is one.

    Keeps: the values of the program whose weights are those that dequantize gives, but for what round_activation does.
    Leaves alone: weights without a scheme, and those that anything but such ops read.
    """

    name: str = "quantize_weights"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        uses = weight_uses(module)
        chosen = {n: s for n, s in goal.schemes.items() if n in uses and uses[n].roles and not uses[n].other}
        return _Quantizer(module, chosen, uses).run() if chosen else module


class _Quantizer(Rewriter):
    def __init__(self, module: tvm.IRModule, schemes: dict[str, Scheme], uses: dict[str, Use]):
        super().__init__(module)
        self.schemes, self.uses = schemes, uses
        self.sites = {call: name for name in schemes for call in uses[name].sites}
        self.parts: dict[str, dict[str, relax.Var]] = {}
        self.inverse: dict[str, relax.Var] = {}  # factors of activations, by the weight they are named after
        self.names: list[str] = []
        self.rows: dict[str, relax.Var] = {}  # weight -> what is dequantized
        self.read: dict[tuple, relax.Expr] = {}  # activations as products of quantized weights read them

    def params(self, old):
        count, made = int(self.old.attrs["num_input"]), []
        for name, param in weights_of(self.old).items():
            if name not in self.schemes:
                made.append(param)
                self.names.append(name)
                continue
            scheme, rows = self.schemes[name], self.uses[name].rows
            kinds = scheme.format(rows[-1]).parts(rows)
            if scheme.ordered:
                kinds["order"] = (rows[-1:], "int32")
            self.parts[name] = {
                part: relax.Var(f"{param.name}_{part}", relax.TensorType(list(shape), dtype))
                for part, (shape, dtype) in kinds.items()
            }
            made += self.parts[name].values()
            self.names += [f"{name}:{part}" for part in self.parts[name]]
            if scheme.scaled and scheme.scaled not in self.inverse:
                inverse = relax.Var(f"{param.name}_inverse_scale", relax.TensorType(list(rows[-1:]), "float32"))
                self.inverse[scheme.scaled] = inverse
                made.append(inverse)
                self.names.append(f"{scheme.scaled}:inverse_scale")
        return [*old[:count], *made]

    def attrs(self, old):
        return old | {"llmc.weights": self.names}

    def rewrite(self, var, value):
        if value not in self.sites:
            return self.again(value)
        name = self.sites[value]
        scheme = self.schemes[name]
        if op_name(value) == "take":
            return relax.Call(value.op, [self.weight(name, value.args[0], False), self.get(value.args[1])], value.attrs)
        x = self.activation(name, scheme, value.args[0])
        if op_of(self.module, value) == "expert_linear":
            others = [self.get(a) for a in value.args[2:]]
            return expert_linear(self.builder, x, self.weight(name, value.args[1], False), *others)
        return relax.Call(value.op, [x, self.weight(name, value.args[1], True)], value.attrs, value.ty_args)

    def weight(self, name: str, old: relax.Var, turned: bool) -> relax.Var:
        """The rows of a weight, or their transpose, in the dtype of what stood there."""
        if name not in self.rows:
            format = self.schemes[name].format(self.uses[name].rows[-1])
            parts = [part for kind, part in self.parts[name].items() if kind != "order"]
            self.rows[name] = dequantize(self.builder, format, *parts)
        w = self.rows[name]
        w = w if dtype_of(w) == dtype_of(old) else self.emit(R.astype(w, dtype_of(old)))
        rank = len(w.ty.shape)
        return self.emit(R.permute_dims(w, [*range(rank - 2), rank - 1, rank - 2])) if turned else w

    def activation(self, name: str, scheme: Scheme, old: relax.Expr) -> relax.Expr:
        """What a product reads: scaled, in the weight's order, in 8 bits, if its scheme says so."""
        x, depth = self.get(old), self.uses[name].rows[-1]
        if scheme.scaled:
            scaled = (x, scheme.scaled)
            if scaled not in self.read:
                self.read[scaled] = self.times(x, self.inverse[scheme.scaled])
            x = self.read[scaled]
        if scheme.ordered:
            x = self.emit(R.take(x, self.parts[name]["order"], axis=len(x.ty.shape) - 1, mode="fast"))
        group = scheme.rounding(depth)
        if group is None:
            return x
        kind = scheme.format(depth).rounds
        key = (x, group, kind)
        if key not in self.read:
            self.read[key] = self.rounded(x, group, kind)
        return self.read[key]

    def times(self, x: relax.Expr, factor: relax.Var) -> relax.Expr:
        """x by a factor for each of its columns, in x's dtype, rounded once."""
        dtype = dtype_of(x)
        y = self.emit(R.multiply(x if dtype == "float32" else self.emit(R.astype(x, "float32")), factor))
        return y if dtype == "float32" else self.emit(R.astype(y, dtype))

    def rounded(self, x: relax.Expr, group: int, kind: str) -> relax.Expr:
        shape = list(x.ty.shape)
        if len(shape) == 2:
            return round_activation(self.builder, x, group=group, kind=kind)
        count = shape[0]
        for d in shape[1:-1]:
            count = count * d
        flat = round_activation(self.builder, self.emit(R.reshape(x, [count, shape[-1]])), group=group, kind=kind)
        return self.emit(R.reshape(flat, shape))
