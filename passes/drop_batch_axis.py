"""The axis of one sequence goes: [1, n, ...] becomes [n, ...]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.rewrite import Rewriter, op_name
from llmc.passes.goal import Goal
from llmc.passes.locality_rules import ELEMENTWISE

__all__ = ["DropBatchAxis"]


@dataclass(frozen=True)
class DropBatchAxis:
    """Every value loses its leading axis of length 1.

        main(tokens [1, n], positions [1, n], …) -> [1, n, vocab]  ->  main(tokens [n], positions [n], …) -> [n, vocab]
        lv [1, n, 64] = R.add(x [1, n, 64], y [1, n, 64])          ->  lv [n, 64] = R.add(x [n, 64], y [n, 64])

    Keeps every number: an op with a rule works on the shorter values; any other gets its long values back (a reshape,
    which costs nothing) and its result is shortened. Leaves alone values without such an axis, and a module that has
    none.
    """

    name: str = "drop_batch_axis"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        return _Drop(module).run() if leading_one(module["main"].params[0].ty) else module


def leading_one(ty) -> bool:
    if not (isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr) and len(ty.shape.values)):
        return False
    first = ty.shape.values[0]
    return isinstance(first, tirx.IntImm) and int(first) == 1


def tail(ty) -> list:
    """A shape without its leading axis."""
    return list(ty.shape.values)[1:]


class _Drop(Rewriter):
    """`short` holds values that lost their axis; `new` all others, and the long form of short ones where asked for."""

    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self.short: dict[relax.Var, relax.Expr] = {}

    def params(self, old: list[relax.Var]) -> list[relax.Var]:
        inputs = int(self.old.attrs["num_input"])
        for p in old[:inputs]:
            self.short[p] = relax.Var(p.name, relax.TensorType(tail(p.ty), p.ty.dtype))
        return [self.short.get(p, p) for p in old]

    def get(self, x: relax.Expr) -> relax.Expr:
        if isinstance(x, relax.Var) and x in self.short and x not in self.new:
            self.new[x] = self.emit(R.reshape(self.short[x], x.ty.shape))
        return super().get(x)

    def result(self, body: relax.Expr) -> relax.Expr:
        return self.short[body] if body in self.short else self.get(body)

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Var):
            for values in (self.short, self.new):
                if value in values:
                    values[var] = values[value]
            return
        name = "" if var.same_as(self.old.body.body) else var.name
        shortened = self.shorten(value)
        if shortened is not None:
            self.short[var] = self.emit(shortened, name)
        elif leading_one(var.ty):
            self.short[var] = self.emit(R.reshape(self.emit(self.again(value)), tail(var.ty)), name)
        else:
            self.new[var] = self.emit(self.regrouped(value), name)

    def regrouped(self, value: relax.Expr) -> relax.Expr:
        """The same over long operands; but a reshape starts from the short one, which has the same elements."""
        if op_name(value) in ("reshape", "squeeze", "flatten") and value.args[0] in self.short:
            return R.reshape(self.short[value.args[0]], value.ty.shape)
        return self.again(value)

    def shorten(self, value: relax.Expr) -> relax.Expr | None:
        """`value` without its leading 1, made of short operands; None where no rule says how."""
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.short:
            return relax.TupleGetItem(self.short[value.tuple_value], value.index)
        rule = RULES.get(op_name(value) or "")
        parts = value.ty.fields if isinstance(value.ty, relax.TupleType) else [value.ty]
        return rule(self, value) if rule is not None and all(map(leading_one, parts)) else None


Rule = Callable[[_Drop, relax.Call], relax.Expr | None]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def on_short():
    """Passes a rule the short form of the first operand and its rank before; no rule applies where it has none."""

    def wrap(function):
        def apply(drop: _Drop, value: relax.Call) -> relax.Expr | None:
            x = value.args[0]
            if not isinstance(x, relax.Var) or x not in drop.short:
                return None
            return function(drop, value, drop.short[x], len(x.ty.shape.values))

        return apply

    return wrap


def fewer(axes, rank: int) -> list[int] | None:
    """Axes of the short form, counted from its front; None if the lost axis is among them (or all are meant)."""
    if axes is None:
        return None
    positive = [int(a) % rank for a in ([axes] if isinstance(axes, (int, tirx.IntImm)) else axes)]
    return None if 0 in positive else [a - 1 for a in positive]


@rule(*ELEMENTWISE, "matmul")
def broadcast(drop: _Drop, value: relax.Call) -> relax.Expr | None:
    """Operands align from the right: those as long as the result lose their axis, shorter ones never had it."""
    rank = len(value.ty.shape.values)
    if value.op.name == "relax.matmul" and rank < 3:
        return None
    args = []
    for a in value.args:
        full = isinstance(a.ty, relax.TensorType) and len(a.ty.shape.values) == rank
        if full and not (isinstance(a, relax.Var) and a in drop.short):
            return None
        args.append(drop.short[a] if full else drop.get(a))
    return relax.Call(value.op, args, value.attrs, value.ty_args)


@rule("reshape", "squeeze", "expand_dims")
def reshape(drop: _Drop, value: relax.Call) -> relax.Expr:
    x = value.args[0]
    short = drop.short[x] if x in drop.short else drop.get(x)
    return R.reshape(short, tail(value.ty))


@rule("broadcast_to")
def broadcast_to(drop: _Drop, value: relax.Call) -> relax.Expr | None:
    x = value.args[0]
    if isinstance(x, relax.Var) and x in drop.short:
        return R.broadcast_to(drop.short[x], tail(value.ty))
    return R.broadcast_to(drop.get(x), tail(value.ty)) if len(x.ty.shape.values) < len(value.ty.shape.values) else None


@rule("zeros", "ones", "full")
def create(drop: _Drop, value: relax.Call) -> relax.Expr:
    created = getattr(R, value.op.name.removeprefix("relax."))
    return created(tail(value.ty), *map(drop.get, value.args[1:]), value.ty.dtype)


@rule("permute_dims")
@on_short()
def permute_dims(drop, value, x, rank):
    axes = value.attrs.axes
    order = [int(a) % rank for a in axes] if axes is not None else list(reversed(range(rank)))
    return R.permute_dims(x, [a - 1 for a in order[1:]]) if order[0] == 0 else None


@rule("mean", "sum", "max", "min", "prod", "variance", "std")
@on_short()
def reduction(drop, value, x, rank):
    axes = fewer(value.attrs.axis, rank)
    return None if axes is None else getattr(R, value.op.name.removeprefix("relax."))(x, axes, value.attrs.keepdims)


@rule("nn.softmax", "nn.log_softmax")
@on_short()
def softmax(drop, value, x, rank):
    axes = fewer(value.attrs.axis, rank)
    return None if axes is None else getattr(R.nn, value.op.name.removeprefix("relax.nn."))(x, axes[0])


@rule("cumsum", "cumprod")
@on_short()
def scan(drop, value, x, rank):
    axes = fewer(value.attrs.axis, rank)
    if axes is None:
        return None
    scanned = getattr(R, value.op.name.removeprefix("relax."))
    return scanned(x, axes[0], value.attrs.dtype, exclusive=bool(value.attrs.exclusive))


@rule("nn.layer_norm")
@on_short()
def layer_norm(drop, value, x, rank):
    axes, attrs = fewer(value.attrs.axes, rank), value.attrs
    weights = [drop.get(a) for a in value.args[1:]]
    return None if axes is None else R.nn.layer_norm(x, *weights, axes, attrs.epsilon, attrs.center, attrs.scale)


@rule("sort", "argsort", "topk", "flip", "split", "argmax", "argmin")
@on_short()
def along_axis(drop, value, x, rank):
    axes, attrs = fewer(value.attrs.axis, rank), value.attrs
    if axes is None:
        return None
    axis = axes[0]
    if value.op.name == "relax.topk":
        return R.topk(x, int(attrs.k), axis, attrs.ret_type, attrs.largest, attrs.dtype)
    if value.op.name == "relax.split":
        sections = attrs.indices_or_sections
        return R.split(x, int(sections) if isinstance(sections, (int, tirx.IntImm)) else list(map(int, sections)), axis)
    if value.op.name == "relax.sort":
        return R.sort(x, axis, attrs.descending)
    if value.op.name == "relax.argsort":
        return R.argsort(x, axis, attrs.descending, attrs.dtype)
    if value.op.name == "relax.flip":
        return R.flip(x, axis)
    return getattr(R, value.op.name.removeprefix("relax."))(x, axis, attrs.keepdims)


@rule("gather_elements", "scatter_elements", "slice_scatter")
def by_element(drop: _Drop, value: relax.Call) -> relax.Expr | None:
    tensors = [a for a in value.args if isinstance(a.ty, relax.TensorType)]
    rank = len(value.ty.shape.values)
    axes = fewer(value.attrs.axis, rank)
    if axes is None or not all(isinstance(t, relax.Var) and t in drop.short for t in tensors):
        return None
    x, y, *rest = (drop.short[a] if isinstance(a.ty, relax.TensorType) else a for a in value.args)
    if value.op.name == "relax.gather_elements":
        return R.gather_elements(x, y, axes[0])
    if value.op.name == "relax.scatter_elements":
        return R.scatter_elements(x, y, rest[0], axes[0], value.attrs.reduction)
    return R.slice_scatter(x, y, *rest, axis=axes[0])


@rule("one_hot")
@on_short()
def one_hot(drop, value, x, rank):
    axes = fewer(value.attrs.axis, rank + 1)
    return None if axes is None else R.one_hot(x, *value.args[1:], int(value.attrs.depth), axes[0])


@rule("tile")
@on_short()
def tile(drop, value, x, rank):
    repeats = [int(r) for r in value.attrs.repeats]
    return R.tile(x, repeats[1:]) if len(repeats) == rank and repeats[0] == 1 else None


@rule("concat", "stack")
def join(drop: _Drop, value: relax.Call) -> relax.Expr | None:
    parts = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else []
    axes = fewer(value.attrs.axis, len(value.ty.shape.values))
    if axes is None or not parts or not all(isinstance(p, relax.Var) and p in drop.short for p in parts):
        return None
    return getattr(R, value.op.name.removeprefix("relax."))([drop.short[p] for p in parts], axes[0])


@rule("take")
def take(drop: _Drop, value: relax.Call) -> relax.Expr | None:
    x, index = value.args
    if value.attrs.axis is None:
        return None
    axis = int(value.attrs.axis) % len(x.ty.shape.values)
    if axis == 0 and isinstance(index, relax.Var) and index in drop.short:
        return R.take(drop.get(x), drop.short[index], 0, value.attrs.mode)
    if axis != 0 and isinstance(x, relax.Var) and x in drop.short:
        return R.take(drop.short[x], drop.get(index), axis - 1, value.attrs.mode)
    return None


@rule("repeat")
@on_short()
def repeat(drop, value, x, rank):
    axes = fewer(value.attrs.axis, rank)
    return None if axes is None else R.repeat(x, int(value.attrs.repeats), axes[0])


@rule("strided_slice")
@on_short()
def strided_slice(drop, value, x, rank):
    axes = fewer(value.args[1].fields, rank)
    bounds = [list(a.fields) for a in value.args[2:]]
    return None if axes is None else R.strided_slice(x, axes, *bounds, assume_inbound=bool(value.attrs.assume_inbound))
