"""How each op carries the token axis: the rules of token-locality analysis.

A rule takes a `Site` (a call with the states of its arguments, at least one not UNIFORM) and returns the state of
the result, or raises Mixing with the reason why the op does not keep tokens apart. An op without a rule is refused.
Relax's types say which shapes a result has; a rule says where the tokens are in it, and the analysis checks one against
the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from tvm import relax, tirx

from llmc.ir.text import shape_text

__all__ = ["CREATES", "RULES", "SIZED", "UNIFORM", "Mixing", "Opaque", "Site", "State", "Token", "semantic_rule"]

UNIFORM = None


@dataclass(frozen=True)
class Token:
    axis: int
    outer: int = 1
    inner: int = 1
    rows: str = "token"

    def at(self, axis: int) -> Token:
        """The same tokens along another axis."""
        return replace(self, axis=axis)


@dataclass(frozen=True)
class Opaque:
    kind: str


State = Token | Opaque | tuple | None


class Mixing(Exception):
    """Raised by a rule: why this op does not keep tokens apart."""


class Site:
    """A call as a rule sees it: its arguments with their states and shapes."""

    def __init__(self, analysis, call: relax.Call, args: list[relax.Expr], states: list[State]):
        self.analysis = analysis
        self.call = call
        self.args = args
        self.states = states
        self.flat = [s for state in states for s in (state if isinstance(state, tuple) else (state,))]

    @property
    def out(self) -> list[tirx.PrimExpr]:
        """The shape of the result; of the first field where it is a tuple."""
        ty = self.call.ty
        return shape_of(ty.fields[0] if isinstance(ty, relax.TupleType) else ty)

    def shape(self, index: int) -> list[tirx.PrimExpr]:
        return shape_of(self.args[index].ty)

    def rank(self, index: int) -> int:
        return len(self.shape(index))

    def attr(self, name: str, default=None):
        return getattr(self.call.attrs, name, default) if self.call.attrs is not None else default

    def axes(self, rank: int, name: str = "axis") -> set[int]:
        """The axes that an attribute names; all of them where it names none."""
        axes = self.attr(name)
        if axes is None:
            return set(range(rank))
        return {int(a) % rank for a in ([axes] if isinstance(axes, (int, tirx.IntImm)) else axes)}

    def token(self, index: int) -> Token:
        """The state of an argument that must have a token axis."""
        state = self.states[index]
        if not isinstance(state, Token):
            raise Mixing("one of its other operands depends on the token")
        return state

    def fields(self, index: int) -> tuple[State, ...]:
        """The states of the fields of an argument that is a tuple."""
        state = self.states[index]
        return state if isinstance(state, tuple) else (state,)

    def each(self, state: State) -> State:
        """`state` for a result that may be a tuple."""
        return (state,) * len(self.call.ty.fields) if isinstance(self.call.ty, relax.TupleType) else state


def is_value(arg: relax.Expr) -> bool:
    """Whether an argument is a tensor or a tuple of tensors (not a shape, a number or a tuple of numbers)."""
    ty = getattr(arg, "ty", None)
    if isinstance(ty, relax.TupleType):
        return all(isinstance(f, (relax.TensorType, relax.TupleType)) for f in ty.fields)
    return isinstance(ty, relax.TensorType)


def shape_of(ty) -> list[tirx.PrimExpr]:
    if not isinstance(ty, relax.TensorType):
        raise Mixing(f"there is no rule for a value of type {ty}")
    if ty.shape is None or not isinstance(ty.shape, relax.ShapeExpr):
        raise Mixing("its shape is not known")
    return list(ty.shape.values)


Rule = Callable[[Site], State]
RULES: dict[str, Rule] = {}


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Ops that may name the number of tokens in a shape; the sizes they make are those of their result's type.
SIZED = names("reshape broadcast_to zeros ones full strided_slice")
# Ops that may make rows of something that has none: each row is the same.
CREATES = names("zeros ones full broadcast_to")
ELEMENTWISE = names("""
    add subtract multiply divide power maximum minimum mod floor_mod floor_divide atan2 log_add_exp ewise_fma
    left_shift right_shift
    where equal not_equal less less_equal greater greater_equal logical_and logical_or logical_xor logical_not
    bitwise_and bitwise_or bitwise_xor bitwise_not negative abs sign exp log sqrt rsqrt square erf floor ceil round
    trunc
    sin cos tan sinh cosh tanh asin acos atan asinh acosh atanh sigmoid clip astype isfinite isinf isnan
    zeros_like ones_like full_like nn.silu nn.gelu nn.gelu_tanh nn.relu nn.softplus nn.leakyrelu nn.selu
""")
REDUCTIONS = names("mean sum max min prod variance std argmax argmin")
ALONG = names("nn.softmax nn.log_softmax sort argsort topk cumsum cumprod flip")


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def common(*aligned: tuple[State, int]) -> Token:
    """The one token axis of operands whose axes are those of the result shifted by a number each."""
    found = {s.at(s.axis + shift) if isinstance(s, Token) else s for s, shift in aligned if s is not UNIFORM}
    token = next(iter(found), None)
    if len(found) != 1 or not isinstance(token, Token):
        raise Mixing(f"its operands have their tokens on different axes: {sorted(map(str, found))}")
    return token


@rule(*ELEMENTWISE)
def elementwise(site: Site) -> State:
    """Numpy's broadcasting: axes count from the right."""
    rank = len(site.out)
    return common(*((s, rank - site.rank(i)) for i, s in enumerate(site.states) if s is not UNIFORM))


@rule(*REDUCTIONS)
def reduction(site: Site) -> State:
    x, rank = site.token(0), site.rank(0)
    axes = site.axes(rank)
    if x.axis in axes:
        raise Mixing(f"it reduces over the token axis (axis {x.axis} of {shape_text(site.shape(0))})")
    return x if len(site.out) == rank else x.at(x.axis - sum(a < x.axis for a in axes))


@rule(*ALONG)
def along(site: Site) -> State:
    x = site.token(0)
    if x.axis in site.axes(site.rank(0)):
        raise Mixing(f"it works along the token axis (axis {x.axis} of {shape_text(site.shape(0))})")
    return site.each(x)


@rule("nn.layer_norm", "nn.rms_norm")
def normalization(site: Site) -> State:
    x = site.token(0)
    if any(site.states[1:]):
        raise Mixing("its weights depend on the token")
    if x.axis in site.axes(site.rank(0), "axes"):
        raise Mixing("it normalises over the token axis")
    return x


@rule("nn.group_norm")
def group_norm(site: Site) -> State:
    x = site.token(0)
    if any(site.states[1:]):
        raise Mixing("its weights depend on the token")
    if x.axis in site.axes(site.rank(0), "axes") | {int(site.attr("channel_axis")) % site.rank(0)}:
        raise Mixing("it normalises over the token axis")
    return x


@rule("matmul")
def matmul(site: Site) -> State:
    (a, b), (rank_a, rank_b) = site.states, (site.rank(0), site.rank(1))
    # As if both had two axes at least: [1, k] for a vector on the left, [k, 1] for one on the right.
    full = max(rank_a, rank_b, 2)
    places = set()
    for state, rank, contracted in ((a, rank_a, rank_a - 1), (b, rank_b, max(rank_b - 2, 0))):
        if isinstance(state, Token):
            if state.axis == contracted:
                raise Mixing("it contracts the token axis")
            places.add(state.at(state.axis + full - max(rank, 2)))
    if len(places) > 1:
        raise Mixing("it multiplies tokens with tokens")
    place = places.pop()
    return place.at(place.axis - 1) if rank_a == 1 and place.axis == full - 1 else place


@rule("einsum")
def einsum(site: Site) -> State:
    inputs, arrow, output = site.attr("subscripts").replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        raise Mixing(f"there is no rule for the subscripts {inputs}")
    operands = list(zip(inputs.split(","), site.fields(0), strict=True))
    found = {letters[s.axis]: s for letters, s in operands if isinstance(s, Token)}
    (letter, state), *more = found.items()
    if more:
        raise Mixing("it multiplies tokens with tokens")
    if letter not in output:
        raise Mixing("it contracts the token axis")
    same = {s.at(0) if isinstance(s, Token) else s for letters, s in operands if letter in letters}
    if same != {state.at(0)}:
        raise Mixing("its operands have their tokens on different axes")
    return state.at(output.index(letter))


@rule("reshape", "squeeze", "expand_dims", "flatten", "nn.batch_flatten")
def regroup(site: Site) -> State:
    """The elements in their order, in other dimensions: a token's are `outer` runs of `inner` times what follows."""
    x, old, new = site.token(0), site.shape(0), site.out
    run = x.inner * prod(static(d) for d in old[x.axis + 1 :])
    after = 1
    for axis in reversed(range(len(new))):
        rows, count = site.analysis.count(new[axis])
        if rows is not None:
            inner, cut = divmod(run, after)
            if rows != x.rows or cut or count % inner:
                raise Mixing(f"its reshape {shape_text(old)} -> {shape_text(new)} cuts through the token axis")
            return Token(axis, count // inner, inner, rows)
        after *= max(static(new[axis]), 1)
    raise Mixing(f"its reshape {shape_text(old)} -> {shape_text(new)} loses the token axis")


def static(dimension: tirx.PrimExpr) -> int:
    if not isinstance(dimension, tirx.IntImm):
        raise Mixing(f"there is no rule for a dimension of {dimension}")
    return int(dimension)


@rule("permute_dims")
def permute_dims(site: Site) -> State:
    x, axes = site.token(0), site.attr("axes")
    order = [int(a) % site.rank(0) for a in axes] if axes is not None else list(reversed(range(site.rank(0))))
    return x.at(order.index(x.axis))


@rule("broadcast_to")
def broadcast_to(site: Site) -> State:
    x = site.token(0)
    return x.at(x.axis + len(site.out) - site.rank(0))


@rule("concat", "stack")
def join(site: Site) -> State:
    parts, axis = site.fields(0), int(site.attr("axis") or 0) % len(site.out)
    token = common(*((s, 0) for s in parts))
    if site.call.op.name == "relax.stack":
        return token.at(token.axis + 1) if axis <= token.axis else token
    if any(s is UNIFORM for s in parts) or token.axis == axis:
        raise Mixing("it joins along the token axis")
    return token


@rule("split")
def split(site: Site) -> State:
    x = site.token(0)
    if x.axis in site.axes(site.rank(0)):
        raise Mixing("it splits the token axis")
    return site.each(x)


@rule("strided_slice")
def strided_slice(site: Site) -> State:
    """Whole on the token axis; on any other, bounds that don't depend on the number of tokens."""
    x = site.token(0)
    fields = [list(a.fields) for a in site.args[1:]]
    axes, begins, ends = fields[:3]
    strides = fields[3] if len(fields) > 3 else [1] * len(axes)
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        if int(axis) % site.rank(0) != x.axis:
            if any(site.analysis.mentions_rows(b) for b in (begin, end, stride) if not isinstance(b, int)):
                raise Mixing("its bounds depend on the number of tokens")
        elif not (number(begin) == 0 and number(stride) == 1 and same_rows(site, x.axis)):
            raise Mixing(f"it slices the token axis (axis {x.axis} of {shape_text(site.shape(0))})")
    return x


def number(value) -> int | None:
    return int(value) if isinstance(value, (int, tirx.IntImm)) else None


def same_rows(site: Site, axis: int) -> bool:
    return site.analysis.count(site.shape(0)[axis]) == site.analysis.count(site.out[axis])


@rule("repeat", "tile")
def repeat(site: Site) -> State:
    """repeat: each element in place; tile: the whole axis again and again."""
    x = site.token(0)
    if site.call.op.name == "relax.repeat" and site.attr("axis") is None and site.rank(0) > 1:
        raise Mixing("there is no rule for a repeat of a flattened tensor")
    axis = x.axis + len(site.out) - site.rank(0)
    rows, count = site.analysis.count(site.out[axis])
    times = count // (x.outer * x.inner)
    if site.call.op.name == "relax.repeat":
        return Token(axis, x.outer, x.inner * times, rows)
    return Token(axis, x.outer * times, x.inner, rows)


@rule("take")
def take(site: Site) -> State:
    """Of a table by the token's index, or of other axes by indices that all tokens share."""
    x, index = site.states
    if site.attr("axis") is None and site.rank(0) > 1:
        raise Mixing("there is no rule for a take of a flattened tensor")
    axis = int(site.attr("axis") or 0) % site.rank(0)
    if isinstance(x, Opaque) or (isinstance(index, Opaque) and index.kind != "answer rows"):
        raise Mixing("it touches page tables or pages, which only semantic ops may")
    if isinstance(index, Opaque):
        if not isinstance(x, Token) or x != Token(axis):
            raise Mixing("the answer rows pick from something that is not one row a token")
        return Token(axis, rows="answer")
    if x is UNIFORM:
        return site.token(1).at(axis + site.token(1).axis)
    x = site.token(0)
    if index is not UNIFORM:
        raise Mixing("the table and the index both depend on the token")
    if axis == x.axis:
        raise Mixing("it picks tokens by number")
    return x.at(x.axis + (site.rank(1) - 1 if axis < x.axis else 0))


@rule("gather_elements", "scatter_elements", "slice_scatter")
def by_element(site: Site) -> State:
    """All operands have the token axis, and the op works along another."""
    x = site.states[0]
    tensors = [s for s, a in zip(site.states, site.args, strict=True) if getattr(a.ty, "shape", None) is not None]
    axis = site.attr("axis", 0)
    axis = int(getattr(axis, "value", axis)) % site.rank(0)
    if x is UNIFORM and site.call.op.name == "relax.gather_elements" and site.token(1).axis == axis:
        return site.token(1)  # a table that all tokens share, read by the token's index
    if any(s != x for s in tensors) or not isinstance(x, Token):
        raise Mixing("its operands have their tokens on different axes")
    if x.axis == axis:
        raise Mixing("it works along the token axis")
    return x


@rule("one_hot")
def one_hot(site: Site) -> State:
    x = site.token(0)
    axis = int(site.attr("axis")) % len(site.out)
    return x.at(x.axis + 1) if axis <= x.axis else x


@rule("nn.pad")
def pad(site: Site) -> State:
    x, widths = site.token(0), [int(w) for w in site.attr("pad_width")]
    if any(widths[2 * x.axis : 2 * x.axis + 2]):
        raise Mixing("it pads the token axis")
    return x


@rule("tril", "triu")
def triangle(site: Site) -> State:
    x = site.token(0)
    if x.axis >= site.rank(0) - 2 or any(s is not UNIFORM for s in site.states[1:]):
        raise Mixing("its triangle lies on the token axis")
    return x


def semantic_rule(name: str, site: Site) -> State:
    """A semantic op: what its operands must be, and where its rows are."""
    if name not in SEMANTIC:
        raise Mixing("there is no rule for this semantic op")
    return SEMANTIC[name](site)


def attention(site: Site) -> State:
    *qkv, sinks = (*site.states, UNIFORM) if len(site.states) == 3 else site.states
    if qkv != [Token(0)] * 3 or sinks is not UNIFORM:
        raise Mixing(f"expected q, k and v of one row a token, found {site.states}")
    return Token(0)


def expert_linear(site: Site) -> State:
    x, w, ids, *bias = site.states
    if not isinstance(x, Token) or x.axis != 0 or ids != x or w is not UNIFORM or any(bias):
        raise Mixing(f"expected rows and ids of the same tokens, found {site.states}")
    return x


def append_pages(site: Site) -> State:
    """Pages (of a quantized cache: codes and scales), then one row a token, then page tables."""
    pages = [s for s in site.states if s == Opaque("pages")]
    x, *tables = site.states[len(pages) :]
    if not pages or x != Token(0) or any(t != Opaque("table") for t in tables):
        raise Mixing(f"expected pages, one row a token, and page tables, found {site.states}")
    return pages[0] if len(pages) == 1 else tuple(pages)


def paged_attention(site: Site) -> State:
    """q, then pages (of keys and values, or of a latent, with their scales), then sinks or not, then page tables."""
    q, *rest = site.states
    pages = rest.count(Opaque("pages"))
    tables = rest[pages + (UNIFORM in rest) :]
    if q != Token(0) or not pages or set(rest[:pages]) != {Opaque("pages")} or set(tables) != {Opaque("table")}:
        raise Mixing(f"expected one row a token, pages, and page tables, found {site.states}")
    return q


def dequantize(site: Site) -> State:
    if any(site.states):
        raise Mixing(f"expected parts that are the same for all tokens, found {site.states}")
    return UNIFORM


def round_activation(site: Site) -> State:
    (x,) = site.states
    if not isinstance(x, Token) or x.axis != 0:
        raise Mixing(f"expected one row a token, found {x}")
    return x


SEMANTIC: dict[str, Rule] = {
    "attention": attention,
    "dequantize": dequantize,
    "expert_linear": expert_linear,
    "append_pages": append_pages,
    "paged_attention": paged_attention,
    "round_activation": round_activation,
}
