"""A program of one token's values as a kernel: tokens shared out over the threads, rows in full vectors.

Every sum is taken in an order that its length alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from ..rows import values as V
from ..rows.elements import Elements, collapsed, combine, factors, flat, gathers, is_product, wide
from ..rows.functions import FUNCTIONS
from ..rows.program import Gather, Program, Reduce, Scan, Scatter, Store, TopK
from ..rows.values import Apply, Memory, Value
from . import sine
from .vector import Vector, choose, kernel, loop, scratch, share_out, variable, when

__all__ = ["row_kernel"]

SERIAL = 1 << 15  # elements of work that one thread does sooner than others wake up
DRAW = 1 << 14  # elements of work that a thread takes at once

_CALLS = {"log": T.log, "tan": T.tan, "power": T.pow, "nn.softplus": lambda x: T.log1p(T.exp(x)), "round": T.round}
_CALLS |= {"isfinite": T.isfinite, "isinf": T.isinf, "isnan": T.isnan}


def row_kernel(
    program: Program, name: str, params: Sequence[tuple[str, Sequence[int | str], str]], target: CpuTarget
) -> tvm.tirx.PrimFunc:
    """The PrimFunc of a program. params: name, shape (a str is a symbolic dimension) and dtype of every input, then of
    every output. The number of tokens is the symbol "n"."""

    def body(symbols: dict, *buffers: Any) -> None:
        _Emit(program, flat(program, buffers), target).tokens(symbols["n"])

    return kernel(name, params, body, target)


def work(program: Program) -> int:
    """Instructions for a token, in elements of a cheap statement."""
    total = 0
    for s in program.statements:
        if isinstance(s, TopK):
            total += s.k * s.value.size * 4
        else:
            value = getattr(s, "value", None) or s.update
            total += value.size * (2 + V.cost(value) // 4)
    return max(total, 1)


class _Emit(Elements):
    functions = FUNCTIONS | {"sin": sine.sin, "cos": sine.cos}
    calls = _CALLS

    def __init__(self, program: Program, arguments: dict, target: CpuTarget):
        super().__init__(program)
        self.arguments, self.target = arguments, target

    def arithmetic(self, lanes: int) -> Vector:
        return Vector(lanes)

    def tokens(self, n: Any) -> None:
        each = work(self.program)
        at_once = max(1, DRAW // each)

        def serial() -> None:
            with when(n > 0):
                own = self.scratch()
                with loop(0, n) as t:
                    self.token(t, own)

        def parallel() -> None:
            def draw(item: Any, own: dict) -> None:
                first = T.bind(item * at_once)
                with loop(first, T.min(first + at_once, n)) as t:
                    self.token(t, own)

            share_out(T.floordiv(n + (at_once - 1), T.int64(at_once)), draw, self.scratch)

        choose([(n <= max(1, SERIAL // each), serial)], parallel)

    def scratch(self) -> dict:
        return {("scratch", s.number): scratch([max(s.row, 1)], s.dtype) for s in self.program.scratch}

    def token(self, t: Any, own: dict) -> None:
        self.buffers, self.bases = self.arguments | own, {}
        for slot in (*self.program.inputs, *self.program.outputs):
            self.bases[slot] = T.bind(t * slot.row) if slot.row else T.int64(0)
        for statement in self.program.statements:
            for slot, index in gathers(statement):
                if slot not in self.bases:
                    self.bases[slot] = T.bind(T.Cast("int64", self.read(index, [], 1)) * slot.row)
            getattr(self, type(statement).__name__.lower())(statement)

    # Loops

    def lanes(self, v: Value, extent: int) -> int:
        """The widest vector for an axis of this length: whole vectors of the target, or what there is of it."""
        if not vectorizes(v):
            return 1
        lanes = self.target.lanes
        while lanes > extent:
            lanes //= 2
        return lanes

    def nest(self, shape: Sequence[int], body: Any) -> None:
        """body(indices) in loops over `shape`."""
        with ExitStack() as stack:
            body([stack.enter_context(loop(0, d)) if d != 1 else T.int64(0) for d in shape])

    def along(self, extent: int, lanes: int, body: Any) -> None:
        """body(start, lanes) over an axis: in full vectors, then in ever narrower ones."""
        full = extent // lanes
        if full == 1:
            body(T.int64(0), lanes)
        elif full:
            with loop(0, full) as i:
                body(T.bind(i * lanes), lanes)
        at = full * lanes
        while at < extent:
            lanes //= 2
            if at + lanes <= extent:
                body(T.int64(at), lanes)
                at += lanes

    # Statements

    def store(self, s: Store) -> None:
        if s.to.size == 0:  # the part that a full rotary embedding leaves alone
            return
        to, value = collapsed(s.to, s.value)
        *outer, extent = to.shape
        lanes = self.lanes(value, extent)
        if to.slot.dtype == "bool":
            lanes = 1

        def row(indices: list) -> None:
            def piece(start: Any, width: int) -> None:
                place = [*indices, start]
                self.write(to, place, self.value(value, place, width, {}), width)

            self.along(extent, lanes, piece)

        self.nest(outer, row)

    def reduce(self, s: Reduce) -> None:
        kept = len(s.value.shape) - s.axes
        outer, inner = s.value.shape[:kept], s.value.shape[kept:]
        if self.across(s.value, kept):
            self.reduce_across(s, outer, inner)
        else:
            self.reduce_along(s, outer, inner)

    def across(self, value: Value, kept: int) -> bool:
        """Vectors lie along the last kept axis: the summed ones are not the ones that lie together."""
        if kept == 0 or value.shape[kept - 1] < self.target.lanes:
            return False
        last = max((abs(leaf.strides[-1]) for leaf in V.leaves(value) if isinstance(leaf, Memory)), default=0)
        return last > 1

    def reduce_across(self, s: Reduce, outer: Sequence[int], inner: Sequence[int]) -> None:
        axes = [*range(len(outer) - 1), *range(len(outer), len(outer) + len(inner)), len(outer) - 1]
        value = V.permute(s.value, axes)
        lanes = self.lanes(value, outer[-1])

        def row(indices: list) -> None:
            def piece(start: Any, width: int) -> None:
                total = Accumulator(Vector(width), wide(value.dtype), s.op)
                self.nest(inner, lambda at: self.accumulate(total, value, [*indices, *at, start]))
                self.write(s.to, [*indices, start], total.get(), width)

            self.along(outer[-1], lanes, piece)

        self.nest(outer[:-1], row)

    def reduce_along(self, s: Reduce, outer: Sequence[int], inner: Sequence[int]) -> None:
        extent = inner[-1]
        lanes = self.lanes(s.value, extent)
        vectors, rest = divmod(extent, lanes)
        chains = min(4, vectors)  # sums side by side: one alone would wait for itself

        def row(indices: list) -> None:
            sums = [Accumulator(Vector(lanes), wide(s.value.dtype), s.op) for _ in range(chains)]
            single = Accumulator(Vector(1), wide(s.value.dtype), s.op) if rest else None

            def line(at: list) -> None:
                def add(total: Accumulator, start: Any) -> None:
                    self.accumulate(total, s.value, [*indices, *at, start])

                if vectors // chains > 1:
                    with loop(0, vectors // chains) as i:
                        for c, total in enumerate(sums):
                            add(total, T.bind((i * chains + c) * lanes))
                else:
                    for c, total in enumerate(sums):
                        add(total, T.int64(c * lanes))
                for c in range(vectors % chains):
                    add(sums[c], T.int64((vectors // chains * chains + c) * lanes))
                if single:
                    with loop(vectors * lanes, extent) as i:
                        add(single, i)

            self.nest(inner[:-1], line)
            while len(sums) > 1:
                sums[-2].add(sums[-1].get())
                sums.pop()
            total = sums[0].folded()
            if single:
                total = T.bind(combine(s.op, total, single.get()))
            self.write(s.to, indices, total, 1)

        self.nest(outer, row)

    def accumulate(self, total: Accumulator, value: Value, indices: list) -> None:
        """Add to a running sum (or max, ...); products are added with one rounding, see product_and_term."""
        lanes = total.vector.lanes
        memo: dict = {}
        if total.op == "sum" and is_product(value):
            x, y = (self.value(factor, indices, lanes, memo) for factor in factors(value))
            total.set(total.vector.fma(x, y, total.get()))
        else:
            total.add(self.value(value, indices, lanes, memo))

    def topk(self, s: TopK) -> None:
        """k times: of what comes after the last one found, the first in order."""
        *outer, extent = s.value.shape
        element = wide(s.value.dtype)

        def row(indices: list) -> None:
            best, last = variable(element, tvm.tirx.const(0, element)), variable(element, tvm.tirx.const(0, element))
            found, before = variable("int64", T.int64(-1)), variable("int64", T.int64(-1))
            with loop(0, s.k) as j:
                T.buffer_store(found, T.int64(-1), [0])
                with loop(0, extent) as i:
                    x = self.read(s.value, [*indices, i], 1)
                    behind = x < last[0] if s.largest else x > last[0]
                    better = x > best[0] if s.largest else x < best[0]
                    open_ = T.Or(before[0] < 0, T.Or(behind, T.And(x == last[0], i > before[0])))
                    with when(T.And(open_, T.Or(found[0] < 0, better))):
                        T.buffer_store(best, x, [0])
                        T.buffer_store(found, i, [0])
                T.buffer_store(last, best[0], [0])
                T.buffer_store(before, found[0], [0])
                if s.values is not None:
                    self.write(s.values, [*indices, j], best[0], 1)
                self.write(s.indices, [*indices, j], found[0], 1)

        self.nest(outer, row)

    def gather(self, s: Gather) -> None:
        def element(indices: list) -> None:
            row = T.bind(T.Cast("int64", self.value(s.index, indices, 1, {})))
            place = [*indices[: s.axis], row, *indices[s.axis + 1 :]]
            self.write(s.to, indices, self.read(s.value, place, 1), 1)

        self.nest(s.to.shape, element)

    def scatter(self, s: Scatter) -> None:
        def element(indices: list) -> None:
            row = T.bind(T.Cast("int64", self.value(s.index, indices, 1, {})))
            place = [*indices[: s.axis], row, *indices[s.axis + 1 :]]
            value = self.value(s.update, indices, 1, {})
            if s.add:
                value = self.read(s.to, place, 1) + value
            self.write(s.to, place, value, 1)

        self.nest(s.update.shape, element)

    def scan(self, s: Scan) -> None:
        *outer, extent = s.value.shape
        element = wide(s.value.dtype)

        def row(indices: list) -> None:
            total = variable(element, tvm.tirx.const(0, element))
            with loop(0, extent) as i:
                T.buffer_store(total, total[0] + self.value(s.value, [*indices, i], 1, {}), [0])
                self.write(s.to, [*indices, i], total[0], 1)

        self.nest(outer, row)


class Accumulator:
    """A running sum (or max, min, product) in a register."""

    def __init__(self, vector: Vector, element: str, op: str):
        self.vector, self.op, self.dtype = vector, op, vector.dtype(element)
        start = {"sum": 0, "prod": 1}.get(op)
        if start is None:
            start = tvm.tirx.min_value(element) if op == "max" else tvm.tirx.max_value(element)
            if element == "float32":
                start = T.float32(-math.inf if op == "max" else math.inf)
        else:
            start = tvm.tirx.const(start, element)
        # Of the default scope: on the stack, and LLVM keeps it in a register.
        self.buffer = T.alloc_buffer((vector.lanes,), element)
        self.set(vector.broadcast(start))

    def get(self) -> Any:
        return self.buffer.vload([0], self.dtype)

    def set(self, value: Any) -> None:
        lanes = self.vector.lanes
        T.buffer_store(self.buffer, value, [0 if lanes == 1 else T.ramp(0, 1, lanes)])

    def add(self, value: Any) -> None:
        self.set(combine(self.op, self.get(), value))

    def folded(self) -> Any:
        """The lanes as one number: halves onto each other."""
        if self.vector.lanes == 1:
            return T.bind(self.get())
        lanes = [T.bind(self.buffer[i]) for i in range(self.vector.lanes)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [T.bind(combine(self.op, lanes[i], lanes[i + half])) for i in range(half)]
        return lanes[0]


def vectorizes(v: Value) -> bool:
    if isinstance(v, Apply):
        if v.op in _CALLS or (v.op in _Emit.functions and wide(v.dtype) != "float32"):
            return False
        if v.op in ("floor_divide", "mod", "floor_mod") and "int" in v.dtype:
            return False
        return all(map(vectorizes, v.args))
    return not (isinstance(v, Memory) and v.slot.dtype == "bool")
