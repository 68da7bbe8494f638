"""Values of one token: strided views of memory, and expressions over them.

A row tensor is a tensor with one symbolic dimension, the tokens'. What a program says of it is said here of one token:
the token's dimension becomes 1 (or c, where it is c·n long), every other stays. Moves (reshape, slice, broadcast, ...)
of memory are free, as in numpy: they change strides. Moves of an expression move its leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

__all__ = ["Affine", "Apply", "Memory", "NoView", "Scalar", "Slot", "Value"]

Shape = tuple[int, ...]


class NoView(Exception):
    """A move that strides can't say: the value has to be written out first."""


@dataclass(eq=False)
class Slot:
    """Memory of a kernel. kind: "input", "output" or "scratch"; `row` elements belong to a token, 0: to all alike.

    `index`: which row a token reads, where that is not its own (a gather); a scalar of integers.
    """

    kind: str
    number: int
    dtype: str
    row: int
    index: Memory | None = None


@dataclass(eq=False)
class Value:
    shape: Shape
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(eq=False)
class Memory(Value):
    """Elements at offset + Σ index · stride of a token's row of a slot."""

    slot: Slot
    strides: Shape
    offset: int = 0

    @classmethod
    def whole(cls, slot: Slot, shape: Sequence[int]) -> Memory:
        return cls(tuple(shape), slot.dtype, slot, contiguous(shape))

    @property
    def is_row(self) -> bool:
        """All of the slot's row, in order."""
        own = [(d, s) for d, s in zip(self.shape, self.strides, strict=True) if d != 1]
        dense = [s for _, s in own] == list(contiguous([d for d, _ in own]))
        return dense and self.offset == 0 and self.size == self.slot.row and self.slot.index is None


@dataclass(eq=False)
class Affine(Value):
    """Integers offset + Σ index · stride that stand nowhere in memory (arange)."""

    strides: Shape
    offset: int = 0


@dataclass(eq=False)
class Scalar(Value):
    """One number everywhere."""

    value: Any


@dataclass(eq=False)
class Apply(Value):
    """An elementwise op over values of the same shape."""

    op: str
    args: list[Value]
    attrs: dict = field(default_factory=dict)


def contiguous(shape: Sequence[int]) -> Shape:
    strides, step = [0] * len(shape), 1
    for i in reversed(range(len(shape))):
        strides[i], step = step, step * shape[i]
    return tuple(strides)


def _moved(v: Memory | Affine, shape: Shape, strides: Shape, offset: int = 0) -> Memory | Affine:
    return replace(v, shape=shape, strides=strides, offset=v.offset + offset)


def _move(v: Value, shape: Shape, leaf, *args) -> Value:
    """What has no strides: scalars take any shape; expressions move their leaves."""
    if isinstance(v, Scalar):
        return Scalar(shape, v.dtype, v.value)
    assert isinstance(v, Apply)
    return Apply(shape, v.dtype, v.op, [leaf(a, *args) for a in v.args], v.attrs)


@overload
def reshape(v: Memory, shape: Sequence[int]) -> Memory: ...
@overload
def reshape(v: Value, shape: Sequence[int]) -> Value: ...
def reshape(v: Value, shape: Sequence[int]) -> Value:
    """The same elements in the same order under another shape. NoView where strides can't say it."""
    shape = tuple(shape)
    if shape == v.shape:
        return v
    if not isinstance(v, (Memory, Affine)):
        return _move(v, shape, reshape, shape)
    old = [(d, s) for d, s in zip(v.shape, v.strides, strict=True) if d != 1]
    strides: list[int] = []
    new = [d for d in shape if d != 1]
    i = j = 0
    while i < len(old) and j < len(new):
        # The shortest runs of old and new dimensions with equally many elements.
        a, b, i0, j0 = old[i][0], new[j], i, j
        while a != b:
            if a < b:
                i += 1
                a *= old[i][0]
            else:
                j += 1
                b *= new[j]
        for (_, outer), (d, s) in zip(old[i0:i], old[i0 + 1 : i + 1], strict=True):
            if outer != d * s:
                raise NoView
        step, run = old[i][1], []
        for d in reversed(new[j0 : j + 1]):
            run.append(step)
            step *= d
        strides += reversed(run)
        i, j = i + 1, j + 1
    found = iter(strides)
    return _moved(v, shape, tuple(next(found) if d != 1 else 0 for d in shape))


def permute(v: Value, axes: Sequence[int]) -> Value:
    shape = tuple(v.shape[a] for a in axes)
    if not isinstance(v, (Memory, Affine)):
        return _move(v, shape, permute, axes)
    return _moved(v, shape, tuple(v.strides[a] for a in axes))


def broadcast(v: Value, shape: Sequence[int]) -> Value:
    """Axes aligned from the right; an axis of length 1 is repeated. NoView for an expression that would be repeated."""
    shape = tuple(shape)
    if shape == v.shape:
        return v
    if isinstance(v, Scalar):
        return Scalar(shape, v.dtype, v.value)
    if not isinstance(v, (Memory, Affine)):
        if math.prod(shape) != v.size:
            raise NoView
        return reshape(v, shape)
    lead = len(shape) - len(v.shape)
    strides = [0] * lead
    for d, s, to in zip(v.shape, v.strides, shape[lead:], strict=True):
        if d not in (1, to):
            raise ValueError(f"broadcast of {v.shape} to {shape}")
        strides.append(s if d == to else 0)
    return _moved(v, shape, tuple(strides))


@overload
def strided_slice(v: Memory, axis: int, start: int, count: int, step: int = 1) -> Memory: ...
@overload
def strided_slice(v: Value, axis: int, start: int, count: int, step: int = 1) -> Value: ...
def strided_slice(v: Value, axis: int, start: int, count: int, step: int = 1) -> Value:
    """`count` elements of an axis, from `start` on, every `step`-th."""
    shape = (*v.shape[:axis], count, *v.shape[axis + 1 :])
    if not isinstance(v, (Memory, Affine)):
        return _move(v, shape, strided_slice, axis, start, count, step)
    stride = v.strides[axis]
    return _moved(v, shape, (*v.strides[:axis], stride * step, *v.strides[axis + 1 :]), start * stride)


def contents(v: Value) -> tuple:
    """Equal for values that have the same elements in the same order, whatever axes of length 1 stand between them."""
    shape = tuple(d for d in v.shape if d != 1)
    if isinstance(v, Apply):
        return v.op, v.dtype, shape, repr(sorted(v.attrs.items())), tuple(map(contents, v.args))
    if isinstance(v, Scalar):
        return v.dtype, shape, repr(v.value)
    assert isinstance(v, (Memory, Affine))
    strides = tuple(s for d, s in zip(v.shape, v.strides, strict=True) if d != 1)
    return v.dtype, shape, strides, v.offset, v.slot if isinstance(v, Memory) else None


def leaves(v: Value):
    """The leaves of an expression."""
    if isinstance(v, Apply):
        for a in v.args:
            yield from leaves(a)
    else:
        yield v


# Vector instructions, roughly; what is cheaper than a store and a load is computed again.
_COSTS = {"exp": 20, "tanh": 30, "erf": 40, "sin": 60, "cos": 60, "sigmoid": 25, "log": 40, "power": 60, "divide": 4}


def cost(v: Value) -> int:
    """Instructions for an element, roughly."""
    if isinstance(v, Apply):
        return _COSTS.get(v.op, 1) + sum(map(cost, v.args))
    return 0
