"""Which values of a function depend on its weights alone, and what they look like."""

from __future__ import annotations

from tvm import relax

from llmc.ir.rewrite import bindings, op_name

__all__ = ["WeightOnly", "leaves", "substitute", "variables"]

# Ops whose result is larger than what they read: cheaper to repeat in a kernel than to store.
GROWS = {"broadcast_to", "repeat", "tile", "zeros", "ones", "full", "one_hot"}


class WeightOnly:
    """The weight-only values of a function: `sources` (parameter -> its name) and `values` (variable -> expression)."""

    def __init__(self, function: relax.Function):
        count = int(function.attrs["num_input"])
        names = [str(n) for n in function.attrs["llmc.weights"]]
        self.sources = dict(zip(list(function.params)[count:], names, strict=True))
        self.values: dict[relax.Var, relax.Expr] = {}
        for b in bindings(function):
            if self._made_of_weights(b.value):
                self.values[b.var] = b.value

    def __contains__(self, x) -> bool:
        return isinstance(x, relax.Var) and (x in self.sources or x in self.values)

    def definition(self, x: relax.Expr) -> relax.Expr:
        """The expression a weight-only variable stands for; a weight stands for itself."""
        while isinstance(x, relax.Var) and x in self.values:
            x = self.values[x]
        return x

    def _made_of_weights(self, value) -> bool:
        if isinstance(value, relax.Call):
            name = op_name(value)
            worth = name is not None and name not in GROWS and not name.startswith("call_")
        else:
            worth = isinstance(value, (relax.TupleGetItem, relax.Var, relax.Tuple))
        found = variables(value)
        return worth and bool(found) and all(x in self for x in found)


def leaves(args):
    """Arguments with tuples opened."""
    for a in args:
        if isinstance(a, relax.Tuple):
            yield from leaves(a.fields)
        else:
            yield a


def variables(value: relax.Expr) -> list[relax.Var]:
    """The variables that the expression of a binding reads."""
    if isinstance(value, relax.Call):
        found = leaves(value.args)
    elif isinstance(value, relax.TupleGetItem):
        found = [value.tuple_value]
    else:
        found = leaves([value])
    return [x for x in found if isinstance(x, relax.Var)]


def substitute(value: relax.Expr, new: dict[relax.Var, relax.Expr]) -> relax.Expr:
    """The expression of a binding over other variables."""

    def sub(x):
        if isinstance(x, relax.Tuple):
            return relax.Tuple([sub(f) for f in x.fields])
        return new.get(x, x) if isinstance(x, relax.Var) else x

    if isinstance(value, relax.Call):
        return relax.Call(value.op, [sub(a) for a in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(sub(value.tuple_value), value.index)
    return sub(value)
