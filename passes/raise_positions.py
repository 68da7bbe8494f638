"""Numbers of rows become positions."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.forms import length_of
from llmc.ir.rewrite import Rewriter, bindings, op_name
from llmc.passes.goal import Goal

__all__ = ["RaisePositions"]


@dataclass(frozen=True)
class RaisePositions:
    """What counts the rows of one sequence becomes a function of the `positions` input.

        R.arange(a, b, s)  (n long)                 ->  positions * s + a
        R.cumsum(c, axis)  (c constant, n long)     ->  (positions + 1) * c      (positions * c where exclusive)

    Keeps the numbers: with one sequence, positions are 0 .. n-1. Leaves alone what does not count up from the first row
    (a reversed arange, say): the proof of token locality refuses it.
    """

    name: str = "raise_positions"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        rewriter = _Raise(module)
        return rewriter.run() if rewriter.applies() else module


class _Raise(Rewriter):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self.positions = self.old.params[1]
        self.n = length_of(self.positions.ty, len(self.positions.ty.shape.values) - 1)
        self.values = {b.var: b.value for b in bindings(self.old)}

    def applies(self) -> bool:
        return any(self.count(value) is not None for value in self.values.values())

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        counted = self.count(value)
        if counted is None:
            return self.again(value)
        start, step = counted
        dtype = value.ty.dtype
        shape = value.ty.shape.values
        # The rows' axis where `value` has it, all others 1; then as often as it has them.
        x = self.emit(R.reshape(self.positions, [d if d.same_as(self.n) else 1 for d in shape]), "row")
        if x.ty.dtype != dtype:
            x = self.emit(R.astype(x, dtype))
        if step != 1:
            x = self.emit(R.multiply(x, relax.const(step, dtype)))
        if start != 0:
            x = self.emit(R.add(x, relax.const(start, dtype)))
        return x if len(shape) == 1 else R.broadcast_to(x, value.ty.shape)

    def count(self, value: relax.Expr) -> tuple[float, float] | None:
        """(start, step) if row i of `value` is start + i * step."""
        if op_name(value) == "arange" and value.ty.shape.values[0].same_as(self.n):
            start, _, step = (_number(a) for a in value.args)
            return (start, step) if start is not None and step is not None else None
        if op_name(value) == "cumsum" and value.attrs.axis is not None:
            shape = value.ty.shape.values
            constant = self.constant(value.args[0])
            if constant is not None and shape[int(value.attrs.axis) % len(shape)].same_as(self.n):
                return (0 if value.attrs.exclusive else constant), constant
        return None

    def constant(self, x: relax.Expr) -> float | None:
        """The number that every element of `x` is, where that can be read off."""
        if isinstance(x, tvm.ir.GenericConst):
            data = x.value.numpy()
            return data.flat[0].item() if data.size and (data == data.flat[0]).all() else None
        value = self.values.get(x, x) if isinstance(x, relax.Var) else x
        name = op_name(value)
        if name in ("ones", "ones_like"):
            return 1
        if name in ("zeros", "zeros_like"):
            return 0
        if name in ("full", "full_like"):
            return self.constant(value.args[1])
        if name in ("broadcast_to", "reshape", "expand_dims", "squeeze"):
            return self.constant(value.args[0])
        if name == "astype":
            constant = self.constant(value.args[0])
            integral = constant is not None and float(constant).is_integer()
            return constant if integral and str(value.ty.dtype) != "bool" else None
        return None


def _number(value) -> float | None:
    return value.value if isinstance(value, (tirx.IntImm, tirx.FloatImm)) else None
