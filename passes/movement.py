"""Follow elements of a value back through ops that only move them, to where they were computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from llmc.ir.rewrite import op_name

__all__ = ["Movement"]


class Movement:
    """Where the elements of a token's values come from.

    Every element that an op computes (a *source*'s) has a number of its own; ops that only move elements (reshape,
    transpose, split, join, broadcast, …) are run on these numbers, for one token. So two values are equal element by
    element where their numbers are equal, however the moves between them are spelled. For token-local programs one
    token is enough.
    """

    def __init__(self, bound: dict[relax.Var, relax.Expr], n: tirx.Var):
        self.bound = bound
        self.one_token = tvm.sym.Analyzer()
        self.one_token.bind(n, tirx.IntImm("int64", 1))
        self.n = n
        self.known: dict[relax.Var, np.ndarray] = {}
        self.sources: list[tuple[int, relax.Var]] = []
        self.next = 0

    def elements(self, x: relax.Var) -> np.ndarray:
        """The numbers of x's elements, in x's shape for one token."""
        if x not in self.known:
            moved = self.moved(x)
            self.known[x] = self.new_source(x) if moved is None else moved
        return self.known[x]

    def source(self, elements: np.ndarray) -> tuple[relax.Var | None, np.ndarray]:
        """The one source that computed all `elements`, and their places in it; (None, …) if there are several."""
        for start, x in reversed(self.sources):
            if start <= elements.min():
                inside = elements.max() < start + math.prod(self.shape(x))
                return (x if inside else None), elements - start
        return None, elements

    def value_of(self, elements: np.ndarray) -> relax.Var | None:
        """A value seen on the way, with an axis of the tokens, that has just these elements a token, in this order."""
        for x, numbers in self.known.items():
            rows = any(d.same_as(self.n) for d in x.ty.shape)
            if rows and numbers.size == elements.size and (numbers.ravel() == elements.ravel()).all():
                return x
        return None

    def new_source(self, x: relax.Var) -> np.ndarray:
        shape = self.shape(x)
        self.sources.append((self.next, x))
        self.next += math.prod(shape)
        return np.arange(self.next - math.prod(shape), self.next).reshape(shape)

    def shape(self, x: relax.Var) -> list[int]:
        return [int(self.one_token.simplify(d)) for d in x.ty.shape]

    def moved(self, x: relax.Var) -> np.ndarray | None:
        """The numbers of x, if it is bound to an op that moves elements; else None."""
        value: Any = self.bound.get(x)
        if isinstance(value, relax.Var):
            return self.elements(value)
        if isinstance(value, relax.TupleGetItem):
            return self.part(self.bound.get(value.tuple_value), value.index)
        name = op_name(value)
        if name in ("reshape", "expand_dims", "squeeze"):
            return self.elements(value.args[0]).reshape(self.shape(x))
        if name == "permute_dims":
            return self.elements(value.args[0]).transpose(value.attrs.axes and [int(a) for a in value.attrs.axes])
        if name == "broadcast_to":
            return np.broadcast_to(self.elements(value.args[0]), self.shape(x))
        if name == "repeat" and value.attrs.axis is not None:
            return self.elements(value.args[0]).repeat(int(value.attrs.repeats), int(value.attrs.axis))
        if name == "concat" and isinstance(value.args[0], relax.Tuple):
            return np.concatenate([self.elements(f) for f in value.args[0].fields], axis=int(value.attrs.axis))
        if name == "strided_slice":
            return self.slice(value)
        if name == "slice_scatter":
            return self.scatter(value)
        return None

    def part(self, value: Any, index: int) -> np.ndarray | None:
        if op_name(value) != "split":
            return None
        cuts, axis = value.attrs.indices_or_sections, int(value.attrs.axis)
        cuts = int(cuts) if isinstance(cuts, (int, tirx.IntImm)) else [int(c) for c in cuts]
        return np.split(self.elements(value.args[0]), cuts, axis)[index]

    def slice(self, value: Any) -> np.ndarray | None:
        x = self.elements(value.args[0])
        axes, begin, end, *rest = ([number(f) for f in t.fields] for t in value.args[1:])
        steps = rest[0] if rest else [1] * len(axes)
        if None in (*axes, *begin, *end, *steps):
            return None
        index = [slice(None)] * x.ndim
        for axis, b, e, s in zip(axes, begin, end, steps, strict=True):
            index[axis] = slice(b, e if e < 2**31 else None, s)
        return x[tuple(index)]

    def scatter(self, value: Any) -> np.ndarray | None:
        begin, end, step = (number(f) for f in value.args[2:5])
        if None in (begin, end, step):
            return None
        x = self.elements(value.args[0]).copy()
        index = [slice(None)] * x.ndim
        index[int(value.attrs.axis)] = slice(begin, end if end < 2**31 else None, step)
        x[tuple(index)] = self.elements(value.args[1])
        return x


def number(field: Any) -> Any:
    """A constant of an op's argument, an int; None where it is no constant."""
    value = getattr(field, "value", field)
    value = getattr(value, "value", value)
    return int(value) if isinstance(value, int) else None
