"""A region of a program as statements over one token's values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import values as V
from .values import Apply, Memory, NoView, Scalar, Slot, Value

__all__ = ["Gather", "Program", "Reduce", "Scan", "Scatter", "Store", "TopK"]

FLOATS = ("float16", "bfloat16", "float32")


@dataclass(eq=False)
class Store:
    """to = value, element by element."""

    to: Memory
    value: Value


@dataclass(eq=False)
class Reduce:
    """to = op over the last `axes` axes of value; `to` has the others. op: sum, max, min, prod."""

    to: Memory
    value: Value
    axes: int
    op: str


@dataclass(eq=False)
class TopK:
    """The k largest (or smallest) of the last axis, in order; of equals the first. Either target may be missing."""

    values: Memory | None
    indices: Memory
    value: Memory
    k: int
    largest: bool


@dataclass(eq=False)
class Gather:
    """to[i] = value[i with index[i] at axis]."""

    to: Memory
    value: Memory
    index: Value
    axis: int


@dataclass(eq=False)
class Scatter:
    """to[i with index[i] at axis] = update[i] (or +=); in rising order of i."""

    to: Memory
    index: Value
    update: Value
    axis: int
    add: bool


@dataclass(eq=False)
class Scan:
    """to = running sum of value along its last axis."""

    to: Memory
    value: Value


@dataclass
class Program:
    """Statements in order, and the slots they use. Numbers in scratch are float32 where the program says float16 or
    bfloat16: a value is rounded where it leaves the program, not in between."""

    statements: list = field(default_factory=list)
    inputs: list[Slot] = field(default_factory=list)
    outputs: list[Slot] = field(default_factory=list)
    scratch: list[Slot] = field(default_factory=list)

    def key(self) -> tuple:
        """Equal for programs that do the same."""
        return tuple(map(_key, self.statements)), tuple(map(_key, self.inputs)), tuple(map(_key, self.outputs))

    def new_input(self, dtype: str, row: int) -> Slot:
        self.inputs.append(Slot("input", len(self.inputs), dtype, row))
        return self.inputs[-1]

    def gathered(self, slot: Slot, row: int, index: Memory) -> Slot:
        """The same memory as `slot`, of which a token reads row index."""
        return Slot(slot.kind, slot.number, slot.dtype, row, index)

    def new_scratch(self, shape: Sequence[int], dtype: str) -> Memory:
        dtype = {"float16": "float32", "bfloat16": "float32", "bool": "int32"}.get(dtype, dtype)
        self.scratch.append(Slot("scratch", len(self.scratch), dtype, math.prod(shape)))
        return Memory.whole(self.scratch[-1], shape)

    def output(self, value: Value, dtype: str) -> Memory:
        """Write a value where the kernel's caller finds it; what reads it later reads it there."""
        self.outputs.append(Slot("output", len(self.outputs), dtype, value.size))
        to = Memory.whole(self.outputs[-1], value.shape)
        self.statements.append(Store(to, value))
        return to

    def written(self, value: Value) -> Value:
        """The value in memory."""
        if isinstance(value, Memory):
            return value
        to = self.new_scratch(value.shape, value.dtype)
        self.statements.append(Store(to, value))
        return _as(to, value.dtype)

    def settled(self, value: Value) -> Value:
        """The value, in memory where computing it again costs more than reading it."""
        return self.written(value) if V.cost(value) > 1 else value

    def move(self, function, value: Value, *args) -> Value:
        """A move of values.py, written out first where strides can't say it."""
        try:
            return function(value, *args)
        except NoView:
            pass
        try:
            return function(self.written(value), *args)
        except NoView:
            copy = self.new_scratch(value.shape, value.dtype)
            self.statements.append(Store(copy, value))
            return function(_as(copy, value.dtype), *args)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        return self.move(V.reshape, value, tuple(shape))

    def broadcast(self, value: Value, shape: Sequence[int]) -> Value:
        return self.move(V.broadcast, value, tuple(shape))

    def apply(self, op: str, args: Sequence[Value], shape: Sequence[int], dtype: str, **attrs) -> Value:
        """An elementwise op, its operands broadcast to `shape`."""
        return Apply(tuple(shape), dtype, op, [self.broadcast(a, shape) for a in args], attrs)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        to, at = self.new_scratch(shape, parts[0].dtype), 0
        for p in parts:
            place = V.strided_slice(to, axis, at, p.shape[axis])
            self.statements.append(Store(place, p))
            at += p.shape[axis]
        return _as(to, parts[0].dtype)

    def reduce(self, op: str, value: Value, axes: Sequence[int], keepdims: bool) -> Value:
        """sum, max, min or prod over axes."""
        kept = [i for i in range(len(value.shape)) if i not in axes]
        moved = V.permute(value, [*kept, *axes])
        to = self.new_scratch([value.shape[i] for i in kept], value.dtype)
        self.statements.append(Reduce(to, moved, len(axes), op))
        result = _as(to, value.dtype)
        if keepdims:
            return V.reshape(result, [1 if i in axes else d for i, d in enumerate(value.shape)])
        return result

    def mean(self, value: Value, axes: Sequence[int], keepdims: bool) -> Value:
        count = math.prod(value.shape[a] for a in axes)
        total = self.reduce("sum", value, axes, keepdims)
        return self.apply("multiply", [total, Scalar((), value.dtype, 1.0 / count)], total.shape, value.dtype) \
            if count & (count - 1) == 0 else \
            self.apply("divide", [total, Scalar((), value.dtype, float(count))], total.shape, value.dtype)  # fmt: skip


def _as(memory: Memory, dtype: str) -> Memory:
    """The memory, said to hold values of `dtype`: scratch keeps them wider than they are."""
    return Memory(memory.shape, dtype, memory.slot, memory.strides, memory.offset)


def _key(x):
    """What an object of a program says, without who it is."""
    if isinstance(x, (list, tuple)):
        return tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((k, _key(v)) for k, v in sorted(x.items()))
    if isinstance(x, (Slot, Value, Store, Reduce, TopK, Gather, Scatter, Scan)):
        return type(x).__name__, tuple(_key(v) for v in vars(x).values())
    return repr(x)
