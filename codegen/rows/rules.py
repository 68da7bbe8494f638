"""What each Relax op says of one token.

rule(program, call, args, rows, out) -> the value (or a list of values) of the result. args: the operands' values (a
list for a tuple), rows: their Row beside them, out: the result's Row (a list for a tuple). A rule raises Unsupported
where the op mixes tokens or asks for something it does not know.
"""

from __future__ import annotations

import math

from tvm import tirx

from . import values as V
from .program import Gather, Program, Scan, Scatter, TopK
from .types import Row, Unsupported
from .values import Affine, Memory, Scalar

__all__ = ["RULES"]

UNARY = frozenset(
    """
    abs ceil cos erf exp floor log negative round rsqrt sigmoid sign sin sqrt square tanh logical_not bitwise_not
    isfinite isinf isnan tan nn.relu nn.silu nn.gelu nn.gelu_tanh nn.softplus
    """.split()  # noqa: SIM905
)
BINARY = frozenset(
    """
    add subtract multiply divide floor_divide maximum minimum mod floor_mod power equal not_equal less less_equal
    greater greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    """.split()  # noqa: SIM905
)


def number(x) -> int | float:
    """A Python number from what Relax keeps numbers in."""
    while hasattr(x, "value") and not isinstance(x, (int, float)):
        x = x.value
    if not isinstance(x, (int, float)):
        raise Unsupported(f"expected a number, found {x}")
    return x


def axis_of(axis, row: Row) -> int:
    """An axis that is not the tokens'."""
    axis = int(axis) % len(row.shape)
    if axis == row.axis:
        raise Unsupported("an op along the tokens")
    return axis


def axes_of(axes, row: Row) -> list[int]:
    if axes is None:
        axes = range(len(row.shape))
    elif isinstance(axes, (int, tirx.IntImm)):
        axes = [axes]
    return [axis_of(a, row) for a in axes]


def aligned(rows: list[Row], out: Row) -> None:
    """Operands of an elementwise op have their tokens where the result has them."""
    for row in rows:
        if row.axis is not None and row.from_right() != out.from_right():
            raise Unsupported("an elementwise op that mixes tokens")


def elementwise(op, **attrs):
    def rule(p: Program, call, args, rows, out):
        aligned(rows, out)
        return p.apply(op, args, out.shape, out.dtype, **attrs)

    return rule


def astype(p, call, args, rows, out):
    if args[0].dtype == out.dtype:
        return args[0]
    return p.apply("cast", args, out.shape, out.dtype)


def power(p, call, args, rows, out):
    aligned(rows, out)
    exponent = args[1].value if isinstance(args[1], Scalar) else None
    if exponent in (2.0, 3.0, 4.0):
        x = p.settled(args[0])
        square = p.apply("multiply", [x, x], out.shape, out.dtype)
        if exponent == 2.0:
            return square
        if exponent == 4.0:
            square = p.settled(square)
        return p.apply("multiply", [square, square if exponent == 4.0 else x], out.shape, out.dtype)
    if exponent == 0.5:
        return p.apply("sqrt", args[:1], out.shape, out.dtype)
    if exponent == -0.5:
        return p.apply("rsqrt", args[:1], out.shape, out.dtype)
    return p.apply("power", args, out.shape, out.dtype)


def clip(p, call, args, rows, out):
    low, high = (Scalar((), out.dtype, number(a)) for a in call.args[1:3])
    inner = p.apply("maximum", [args[0], low], out.shape, out.dtype)
    return p.apply("minimum", [inner, high], out.shape, out.dtype)


def leaky_relu(p, call, args, rows, out):
    slope = Scalar((), out.dtype, float(call.attrs.alpha))
    x = p.settled(args[0])
    scaled = p.apply("multiply", [x, slope], out.shape, out.dtype)
    zero = Scalar((), out.dtype, 0.0)
    return p.apply("where", [p.apply("greater", [x, zero], out.shape, "bool"), x, scaled], out.shape, out.dtype)


def reshape(p, call, args, rows, out):
    (row,) = rows[:1]
    if row.axis is not None:
        inner = math.prod(row.shape[row.axis :])
        if out.axis is None or inner != math.prod(out.shape[out.axis :]):
            raise Unsupported("a reshape that mixes tokens")
    return p.reshape(args[0], out.shape)


def permute_dims(p, call, args, rows, out):
    rank = len(rows[0].shape)
    axes = call.attrs.axes
    axes = [int(a) % rank for a in axes] if axes is not None else list(range(rank))[::-1]
    return p.move(V.permute, args[0], axes)


def broadcast_to(p, call, args, rows, out):
    aligned(rows[:1], out)
    return p.broadcast(args[0], out.shape)


def filled(p, call, args, rows, out):
    """full(shape, value)."""
    value = args[-1]
    if not isinstance(value, Scalar):
        raise Unsupported("a tensor filled with a computed value")
    return Scalar(out.shape, out.dtype, value.value)


def constant(value):
    return lambda p, call, args, rows, out: Scalar(out.shape, out.dtype, value)


def full_like(p, call, args, rows, out):
    return filled(p, call, args, rows, out)


def arange(p, call, args, rows, out):
    if out.axis is not None:
        raise Unsupported("arange over the tokens")
    start, _, step = (number(a) for a in call.args[:3])
    if not all(float(v).is_integer() for v in (start, step)):
        raise Unsupported("arange of fractions")
    value = Affine(out.shape, "int64", (int(step),), int(start))
    return value if out.dtype == "int64" else p.apply("cast", [value], out.shape, out.dtype)


def concat(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis if call.attrs.axis is not None else 0, out)
    aligned(rows[0], out)
    return p.concat(args[0], axis)


def stack(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis if call.attrs.axis is not None else 0, out)
    parts = [p.reshape(a, (*a.shape[:axis], 1, *a.shape[axis:])) for a in args[0]]
    return p.concat(parts, axis)


def split(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    at, parts = 0, []
    for o in out:
        parts.append(p.move(V.strided_slice, args[0], axis, at, o.shape[axis]))
        at += o.shape[axis]
    return parts


def strided_slice(p, call, args, rows, out):
    lists = [[number(f) for f in a.fields] for a in call.args[1:]]
    axes, begin = lists[0], lists[1]
    steps = lists[3] if len(lists) > 3 else [1] * len(axes)
    value = args[0]
    for axis, start, step in zip(axes, begin, steps, strict=True):
        axis = int(axis) % len(rows[0].shape)
        if axis == rows[0].axis:
            if start == 0 and step == 1 and out.axis == axis and out.shape[axis] == rows[0].shape[axis]:
                continue
            raise Unsupported("a slice of the tokens")
        length = value.shape[axis]
        start = start + length if start < 0 else start
        start = min(max(start, 0), length if step > 0 else length - 1)
        value = p.move(V.strided_slice, value, axis, int(start), out.shape[axis], int(step))
    return value


def flip(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    return p.move(V.strided_slice, args[0], axis, out.shape[axis] - 1, out.shape[axis], -1)


def repeat(p, call, args, rows, out):
    if call.attrs.axis is None:
        raise Unsupported("repeat of a flattened tensor")
    axis = int(call.attrs.axis) % len(out.shape)
    shape, times = rows[0].shape, int(call.attrs.repeats)
    inserted = p.reshape(args[0], (*shape[: axis + 1], 1, *shape[axis + 1 :]))
    wide = p.broadcast(inserted, (*shape[: axis + 1], times, *shape[axis + 1 :]))
    return p.reshape(wide, out.shape)


def reduction(op):
    def rule(p, call, args, rows, out):
        axes = axes_of(call.attrs.axis, rows[0])
        return p.reduce(op, args[0], axes, bool(call.attrs.keepdims))

    return rule


def mean(p, call, args, rows, out):
    return p.mean(args[0], axes_of(call.attrs.axis, rows[0]), bool(call.attrs.keepdims))


def _centered(p, x, axes):
    """x less its mean."""
    x = p.settled(x)
    middle = p.settled(p.mean(x, axes, True))
    return p.settled(p.apply("subtract", [x, middle], x.shape, x.dtype))


def variance(p, call, args, rows, out):
    axes = axes_of(call.attrs.axis, rows[0])
    away = _centered(p, args[0], axes)
    return p.mean(p.apply("multiply", [away, away], away.shape, away.dtype), axes, bool(call.attrs.keepdims))


def _softmax(p, call, args, rows):
    axis = axis_of(call.attrs.axis, rows[0])
    x = p.settled(args[0])
    top = p.reduce("max", x, [axis], True)
    return x, axis, p.apply("subtract", [x, top], x.shape, x.dtype)


def softmax(p, call, args, rows, out):
    x, axis, less = _softmax(p, call, args, rows)
    e = p.written(p.apply("exp", [less], x.shape, x.dtype))
    total = p.reduce("sum", e, [axis], True)
    return p.apply("divide", [e, total], x.shape, out.dtype)


def log_softmax(p, call, args, rows, out):
    x, axis, less = _softmax(p, call, args, rows)
    total = p.reduce("sum", p.apply("exp", [less], x.shape, x.dtype), [axis], True)
    return p.apply("subtract", [less, p.written(p.apply("log", [total], total.shape, x.dtype))], x.shape, out.dtype)


def _normalized(p, x, axes, epsilon):
    squares = p.mean(p.apply("multiply", [x, x], x.shape, x.dtype), axes, True)
    shifted = p.apply("add", [squares, Scalar((), x.dtype, epsilon)], squares.shape, x.dtype)
    root = p.written(p.apply("rsqrt", [shifted], squares.shape, x.dtype))
    return p.apply("multiply", [x, root], x.shape, x.dtype)


def layer_norm(p, call, args, rows, out):
    axes = axes_of(call.attrs.axes, rows[0])
    value = _normalized(p, _centered(p, args[0], axes), axes, float(call.attrs.epsilon))
    if axes != list(range(len(out.shape) - len(axes), len(out.shape))):
        raise Unsupported("a norm over axes that are not the last")
    if call.attrs.scale:
        value = p.apply("multiply", [value, args[1]], out.shape, out.dtype)
    if call.attrs.center:
        value = p.apply("add", [value, args[2]], out.shape, out.dtype)
    return value


def rms_norm(p, call, args, rows, out):
    axes = axes_of(call.attrs.axes, rows[0])
    if axes != list(range(len(out.shape) - len(axes), len(out.shape))):
        raise Unsupported("a norm over axes that are not the last")
    value = _normalized(p, p.settled(args[0]), axes, float(call.attrs.epsilon))
    return p.apply("multiply", [value, args[1]], out.shape, out.dtype)


def topk(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    if axis != len(rows[0].shape) - 1:
        raise Unsupported("topk of an axis that is not the last")
    kind = str(call.attrs.ret_type)
    many = out if isinstance(out, list) else [out]
    k = many[0].shape[-1]
    shape = many[0].shape
    floats = [o for o in many if "int" not in o.dtype]
    values = p.new_scratch(shape, floats[0].dtype) if kind in ("both", "values") else None
    indices = p.new_scratch(shape, "int64")
    p.statements.append(TopK(values, indices, p.written(args[0]), k, bool(call.attrs.largest)))
    found = [values, p.apply("cast", [indices], shape, many[-1].dtype) if many[-1].dtype != "int64" else indices]
    return {"both": found, "values": found[0], "indices": found[1]}[kind]


def argsort(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    if axis != len(out.shape) - 1:
        raise Unsupported("argsort of an axis that is not the last")
    indices = p.new_scratch(out.shape, "int64")
    p.statements.append(TopK(None, indices, p.written(args[0]), out.shape[-1], bool(call.attrs.descending)))
    return p.apply("cast", [indices], out.shape, out.dtype) if out.dtype != "int64" else indices


def gather_elements(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    aligned(rows[:2], out)
    to = p.new_scratch(out.shape, out.dtype)
    p.statements.append(Gather(to, p.written(args[0]), args[1], axis))
    return to


def scatter_elements(p, call, args, rows, out):
    axis = axis_of(call.attrs.axis, rows[0])
    kind = str(call.attrs.reduction)
    if kind not in ("update", "add"):
        raise Unsupported(f"scatter_elements with reduction {kind}")
    to = p.concat([args[0]], axis)
    p.statements.append(Scatter(to, args[1], args[2], axis, kind == "add"))
    return to


def one_hot(p, call, args, rows, out):
    axis = int(call.attrs.axis) % len(out.shape)
    on, off = (number(a) for a in call.args[1:3])
    index = p.reshape(args[0], (*out.shape[:axis], 1, *out.shape[axis + 1 :]))
    strides = tuple(1 if i == axis else 0 for i in range(len(out.shape)))
    is_on = p.apply("equal", [index, Affine(out.shape, index.dtype, strides)], out.shape, "bool")
    return p.apply("where", [is_on, Scalar((), out.dtype, on), Scalar((), out.dtype, off)], out.shape, out.dtype)


def cumsum(p, call, args, rows, out):
    if call.attrs.axis is None or axis_of(call.attrs.axis, rows[0]) != len(out.shape) - 1 or call.attrs.exclusive:
        raise Unsupported("a running sum of an axis that is not the last")
    value = args[0] if args[0].dtype == out.dtype else p.apply("cast", args[:1], out.shape, out.dtype)
    to = p.new_scratch(out.shape, out.dtype)
    p.statements.append(Scan(to, value))
    return to


def take(p, call, args, rows, out):
    """Rows of a tensor that is no token's own (an embedding), or of one that other tokens have (the rows asked for)."""
    source, index = rows[:2]
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % len(source.shape)
    if axis != 0 or index.axis is None or index.size != 1 or not isinstance(args[0], Memory):
        raise Unsupported("take of another kind than rows by a token's number")
    slot = args[0].slot
    if slot.kind != "input" or slot.index is not None or not args[0].strides or args[0].offset:
        raise Unsupported("take from a computed value")
    if source.axis is not None and source.shape[0] != 1:
        raise Unsupported("take from rows that share a token")
    size = math.prod(source.shape[1:])
    if args[0].strides != V.contiguous(source.shape):
        raise Unsupported("take from a view")
    return Memory.whole(p.gathered(slot, size, p.written(p.reshape(args[1], ()))), out.shape)


def matmul(p, call, args, rows, out):
    """Small products within a token: an outer product, most of all."""
    a, b = rows[:2]
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise Unsupported("a product with a vector")
    if a.axis == len(a.shape) - 1 or b.axis == len(b.shape) - 2:
        raise Unsupported("a sum over tokens")
    m, k = a.shape[-2:]
    n = b.shape[-1]
    if k > 1 and (a.axis is None or b.axis is None):
        raise Unsupported("a product with a matrix that is no token's own")
    batch = out.shape[:-2]
    left = p.broadcast(p.reshape(args[0], (*a.shape[:-2], m, 1, k)), (*batch, m, n, k))
    right = p.move(V.permute, args[1], [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2])
    right = p.broadcast(p.reshape(right, (*b.shape[:-2], 1, n, k)), (*batch, m, n, k))
    product = p.apply("multiply", [left, right], (*batch, m, n, k), out.dtype)
    if k == 1:
        return p.reshape(product, out.shape)
    return p.reduce("sum", product, [len(batch) + 2], False)


RULES = {name: elementwise(name) for name in sorted(UNARY | BINARY)} | {
    "where": elementwise("where"),
    "astype": astype,
    "power": power,
    "clip": clip,
    "nn.leakyrelu": leaky_relu,
    "reshape": reshape,
    "expand_dims": reshape,
    "squeeze": reshape,
    "flatten": reshape,
    "permute_dims": permute_dims,
    "broadcast_to": broadcast_to,
    "full": filled,
    "full_like": full_like,
    "zeros": constant(0),
    "zeros_like": constant(0),
    "ones": constant(1),
    "ones_like": constant(1),
    "arange": arange,
    "concat": concat,
    "stack": stack,
    "split": split,
    "strided_slice": strided_slice,
    "flip": flip,
    "repeat": repeat,
    "sum": reduction("sum"),
    "max": reduction("max"),
    "min": reduction("min"),
    "prod": reduction("prod"),
    "mean": mean,
    "variance": variance,
    "nn.softmax": softmax,
    "nn.log_softmax": log_softmax,
    "nn.layer_norm": layer_norm,
    "nn.rms_norm": rms_norm,
    "topk": topk,
    "argsort": argsort,
    "gather_elements": gather_elements,
    "scatter_elements": scatter_elements,
    "one_hot": one_hot,
    "cumsum": cumsum,
    "take": take,
    "matmul": matmul,
}
