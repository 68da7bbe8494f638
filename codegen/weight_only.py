"""Which values of a function depend on its weights alone, and what they look like."""

from __future__ import annotations

from typing import NamedTuple

import tvm
from tvm import relax

from llmc.ir.quantized import Format, format_of
from llmc.ir.rewrite import bindings, op_name

__all__ = ["FLOATS", "Rows", "WeightOnly", "leaves", "rows_of", "substitute", "variables"]

FLOATS = ("float32", "float16", "bfloat16")
# Ops that only move numbers: a cast may as well come after them.
MOVES = {"permute_dims", "reshape", "concat", "expand_dims", "squeeze", "strided_slice", "split", "astype"}

# Ops whose result is larger than what they read: cheaper to repeat in a kernel than to store.
GROWS = {"broadcast_to", "repeat", "tile", "zeros", "ones", "full", "one_hot"}


class WeightOnly:
    """The weight-only values of a function: `sources` (parameter -> its name) and `values` (variable -> expression).

    Dequantized weights are among them.
    """

    def __init__(self, module: tvm.IRModule, function: relax.Function):
        self.module = module
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
            worth = worth or format_of(self.module, value) is not None
        else:
            worth = isinstance(value, (relax.TupleGetItem, relax.Var, relax.Tuple))
        found = variables(value)
        return worth and bool(found) and all(x in self for x in found)


def narrowed(rewriter, known: WeightOnly, w: relax.Expr) -> relax.Expr:
    """A weight-only value without its widening casts, where that gives one dtype of floats; else as it is.

    rewriter: an llmc.ir.rewrite.Rewriter over the function that `known` is of, with the `machine` that it lowers for:
    where products read weights of another dtype than the activations' as well, casts to a dtype as wide go, too.
    """
    made: dict = {}

    def visit(x):
        if x in known.sources:
            return rewriter.get(x)
        if x not in made:
            value = known.values[x]
            if isinstance(value, relax.Call) and op_name(value) not in MOVES:
                raise LookupError
            inner = {a: visit(a) for a in variables(value)}
            if op_name(value) == "astype":
                made[x] = inner[value.args[0]]
            elif len({str(v.ty.dtype) for v in inner.values() if isinstance(v.ty, relax.TensorType)}) > 1:
                raise LookupError
            else:
                made[x] = rewriter.emit(substitute(value, inner))
        return made[x]

    try:
        bare = visit(w)
    except LookupError:
        return rewriter.get(w)
    widths = [tvm.DataType(str(x.ty.dtype)).bits for x in (bare, w)]
    narrower = widths[0] < widths[1] or (widths[0] == widths[1] and rewriter.machine.mixes)
    return bare if narrower and str(bare.ty.dtype) in FLOATS else rewriter.get(w)


class Rows(NamedTuple):
    """A weight [..., columns, depth]: a dtype of floats and the weight itself, or a format and its parts."""

    weight: str | Format
    parts: list[relax.Expr]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.parts[0].ty.shape)


def rows_of(rewriter, known: WeightOnly, w: relax.Expr, *, transposed: bool) -> Rows:
    """The rows of a weight-only value [..., columns, depth], or [..., depth, columns] if `transposed`.

    rewriter: an llmc.ir.rewrite.Rewriter over the function that `known` is of. A weight that is dequantized is given in
    its parts, whatever casts and transposes stand between; any other narrowed to what it was cast from.
    """
    found = _dequantized(known, w, transposed)
    if found is not None:
        format, parts = found
        return Rows(format, [rewriter.get(part) for part in parts])
    rows = transposed_rows(rewriter, known, w) if transposed else narrowed(rewriter, known, w)
    return Rows(str(rows.ty.dtype), [rows])


def _dequantized(known: WeightOnly, w: relax.Expr, transposed: bool) -> tuple[Format, list[relax.Expr]] | None:
    """Format and parts of the dequantize whose rows are the rows of w; None where there is none, or more than casts and
    transposes of the last two axes stand between."""
    rank = len(w.ty.shape)
    turn = [*range(rank - 2), rank - 1, rank - 2]
    value = known.definition(w)
    while op_name(value) in ("astype", "permute_dims"):
        if op_name(value) == "permute_dims":
            if _axes(value) != turn:
                return None
            transposed = not transposed
        value = known.definition(value.args[0])
    format = format_of(known.module, value)
    return None if transposed or format is None else (format, list(value.args))


def _axes(value: relax.Call) -> list[int]:
    """The axes of a permute_dims."""
    rank = len(value.args[0].ty.shape)
    axes = value.attrs.axes
    return list(range(rank))[::-1] if axes is None else [int(a) % rank for a in axes]


def transposed_rows(rewriter, known: WeightOnly, w: relax.Expr) -> relax.Expr:
    """w [..., depth, columns] as rows [..., columns, depth], narrowed; of a transposed weight, the weight itself."""
    rank = len(w.ty.shape)
    axes = [*range(rank - 2), rank - 1, rank - 2]
    defined = known.definition(w)
    if op_name(defined) == "permute_dims" and _axes(defined) == axes:
        return narrowed(rewriter, known, defined.args[0])
    return rewriter.emit(relax.op.permute_dims(narrowed(rewriter, known, w), axes))


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
