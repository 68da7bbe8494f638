"""A program of one token's values as a kernel: a block of threads to a token, threads along the elements.

Values that threads exchange lie in shared memory, or in a workspace where there are more than it holds. A barrier
stands where a statement reads or overwrites what other threads wrote or read since the last one. Every sum is taken in
an order that its length alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import GpuTarget

from ..rows import values as V
from ..rows.elements import Elements, collapsed, combine, factors, flat, gathers, is_product, operands, wide
from ..rows.functions import FUNCTIONS
from ..rows.program import Gather, Program, Reduce, Scan, Scatter, Store, TopK
from ..rows.values import Memory, Slot
from .arithmetic import CALLS, Arithmetic
from .machine import Machine, Registers, i64, kernel, loop, when

__all__ = ["row_kernel"]

THREADS = 256  # of a block at most: what every driver launches
FEW = 16  # elements that one thread sums sooner than a warp does
BYTES = {"int64": 8, "uint64": 8, "float64": 8}  # of a scratch element; 4 otherwise


def row_kernel(
    program: Program, name: str, params: Sequence[tuple[str, Sequence[int | str], str]], target: GpuTarget
) -> tvm.tirx.PrimFunc:
    """The PrimFunc of a program. params: name, shape (a str is a symbolic dimension) and dtype of every input, then of
    every output. The number of tokens is the symbol "n"."""
    machine = Machine(target)
    plan = Plan.of(program, target)

    def body(symbols: dict, *buffers: Any) -> None:
        n = symbols["n"]
        arguments = flat(program, buffers)
        with when(n > 0):
            for place in plan.places:
                if place.outside:
                    arguments["workspace", place.number] = T.alloc_buffer((n * place.size,), place.dtype)
            with machine.launch([n, plan.parts], plan.threads) as (token, part):
                _Emit(program, plan, arguments, machine).token(T.bind(i64(token)), part)

    return kernel(name, params, body)


def workspaces(program: Program, target: GpuTarget) -> int:
    """How many tensors the kernel of a program takes for values that shared memory does not hold."""
    return sum(place.outside for place in Plan.of(program, target).places)


@dataclass
class Place:
    """Memory of a block for `size` numbers, one value after another; outside: in a workspace, else shared."""

    number: int
    dtype: str
    size: int
    outside: bool = False


@dataclass
class Plan:
    """How a program lies on a GPU.

    threads: of a block. parts: blocks that share a token's elements, where no thread reads what another writes.
    places: memory of a block; place: which of them a scratch slot has.
    """

    threads: int
    parts: int
    places: list[Place] = field(default_factory=list)
    place: dict[Slot, Place] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, target: GpuTarget) -> Plan:
        widest = max((extent(s) for s in program.statements), default=1)
        threads = min(-(-widest // target.warp) * target.warp, THREADS // target.warp * target.warp, target.max_threads)
        alone = all(isinstance(s, Store) and not exchanges(s) for s in program.statements)
        plan = Plan(threads, -(-widest // (4 * threads)) if alone else 1)
        plan._place(program)
        room = target.shared_bytes - 16 * len(plan.places) - 4 * (threads // target.warp)
        for place in sorted(plan.places, key=lambda p: p.size):
            room -= place.size * BYTES.get(place.dtype, 4)
            place.outside = room < 0
        return plan

    def _place(self, program: Program) -> None:
        """Slots that are done with leave their place to later ones of the same dtype."""
        last: dict[Slot, int] = {}
        for i, s in enumerate(program.statements):
            last |= {m.slot: i for m in (*reads(s), *writes(s)) if m.slot.kind == "scratch"}
        free: list[Place] = []
        for i, s in enumerate(program.statements):
            for slot in (m.slot for m in writes(s)):
                if slot.kind != "scratch" or slot in self.place:
                    continue
                fit = min(
                    (p for p in free if p.dtype == slot.dtype), key=lambda p: abs(p.size - slot.row), default=None
                )
                if fit is None:
                    fit = Place(len(self.places), slot.dtype, 1)
                    self.places.append(fit)
                else:
                    free.remove(fit)
                fit.size = max(fit.size, slot.row)
                self.place[slot] = fit
            free += [self.place[slot] for slot, end in last.items() if end == i and slot in self.place]


def reads(s: Any) -> Iterator[Memory]:
    """What a statement reads."""
    for v in operands(s):
        for leaf in V.leaves(v):
            if isinstance(leaf, Memory):
                yield leaf
                if leaf.slot.index is not None:
                    yield leaf.slot.index
    if isinstance(s, Scatter):
        yield s.to


def writes(s: Any) -> list[Memory]:
    """What a statement writes."""
    if isinstance(s, TopK):
        return [s.indices, *([] if s.values is None else [s.values])]
    return [s.to]


def exchanges(s: Any) -> bool:
    """The statement touches memory that another one of the program writes."""
    return any(m.slot.kind != "input" for m in reads(s)) or any(m.slot.kind == "scratch" for m in writes(s))


def extent(s: Any) -> int:
    """Elements of a statement that threads may take one each."""
    return s.update.size if isinstance(s, Scatter) else s.to.size if isinstance(s, Gather) else s.value.size


def span(m: Memory) -> tuple[int, int]:
    """The first and the last element of a slot's row that a view of it has."""
    ends = [(d - 1) * s for d, s in zip(m.shape, m.strides, strict=True)]
    return m.offset + sum(min(e, 0) for e in ends), m.offset + sum(max(e, 0) for e in ends)


class _Emit(Elements):
    calls = CALLS

    def __init__(self, program: Program, plan: Plan, arguments: dict, machine: Machine):
        super().__init__(program)
        self.plan, self.machine = plan, machine
        self.functions = FUNCTIONS | Arithmetic.functions(machine)
        self.buffers = dict(arguments)
        self.touched: list[tuple[Any, tuple[int, int], bool]] = []  # memory, elements, written; since the last barrier

    def arithmetic(self, lanes: int) -> Arithmetic:
        return Arithmetic(self.machine)

    def token(self, t: Any, part: Any) -> None:
        own = [None if p.outside else self.machine.shared(max(p.size, 1), p.dtype) for p in self.plan.places]
        for slot, place in self.plan.place.items():
            if place.outside:
                self.bases[slot] = T.bind(t * place.size)
                self.buffers["scratch", slot.number] = self.buffers["workspace", place.number]
            else:
                self.buffers["scratch", slot.number] = own[place.number]
        sums = [s for s in self.program.statements if isinstance(s, Reduce) and self.by_block(s)]
        self.partial = {
            dtype: self.machine.shared(self.plan.threads // self.machine.warp, dtype)
            for dtype in dict.fromkeys(wide(s.value.dtype) for s in sums)
        }
        for slot in (*self.program.inputs, *self.program.outputs):
            if slot.row:
                self.bases[slot] = T.bind(t * slot.row)
        self.part = part
        for statement in self.program.statements:
            if writes(statement)[0].size == 0:  # the part that a full rotary embedding leaves alone
                continue
            self.order(statement)
            for slot, index in gathers(statement):
                if slot not in self.bases:
                    self.bases[slot] = T.bind(i64(self.read(index, [], 1)) * slot.row)
            getattr(self, type(statement).__name__.lower())(statement)

    # Order

    def order(self, s: Any) -> None:
        """A barrier, if the statement meets memory that other threads have touched since the last one."""
        new = [(self.memory(m.slot), span(m), False) for m in reads(s)]
        new += [(self.memory(m.slot), span(m), True) for m in writes(s)]
        meets = [
            a
            for a, (lo, hi), write in self.touched
            for b, (low, high), writing in new
            if a == b and (write or writing) and lo <= high and low <= hi
        ]
        if meets:
            device = any(kind not in ("shared", "partial") for kind, _ in meets)
            self.machine.barrier(device=device)
            # Where a barrier is for shared memory alone, tensors are as they were.
            ordered = device or self.machine.barrier_orders_tensors
            self.touched = [] if ordered else [t for t in self.touched if t[0][0] not in ("shared", "partial")]
        self.touched += new

    def memory(self, slot: Slot) -> tuple[str, int]:
        if slot.kind != "scratch":
            return slot.kind, slot.number
        place = self.plan.place[slot]
        return "workspace" if place.outside else "shared", place.number

    def constant(self, value: Any, dtype: str) -> Any:
        return self.machine.number(value) if dtype == "float32" else super().constant(value, dtype)

    # Addresses: of a row in 32 bits, of tensors in 64

    def at(self, v, indices):
        offset = T.int32(v.offset)
        for i, s in zip(indices, v.strides, strict=True):
            if s:
                offset = offset + i * s
        if not isinstance(v, Memory):
            return offset
        if v.slot in self.bases:
            return self.bases[v.slot] + i64(offset)
        return offset if v.slot.kind == "scratch" else i64(offset)

    # Loops

    def each(self, count: int, body: Callable[[Any], None]) -> None:
        """body(element) for 0 … count-1, one a thread at a time."""
        threads, start = self.plan.threads, self.machine.thread
        if self.plan.parts > 1:
            start = start + self.part * threads
            threads *= self.plan.parts

        def at(element: Any, whole: bool) -> None:
            if whole:
                body(element)
            else:
                with when(element < count):
                    body(element)

        rounds = -(-count // threads)
        if rounds == 1:
            at(start, count == threads)
        else:
            with loop(rounds) as i:
                at(T.bind(i * threads + start), count % threads == 0)

    def place(self, element: Any, shape: Sequence[int]) -> list[Any]:
        """The indices of an element by its number."""
        found: list[Any] = []
        inner, outermost = math.prod(shape), True
        for d in shape:
            inner //= d
            if d == 1:
                found.append(T.int32(0))
                continue
            quotient = T.floordiv(element, T.int32(inner)) if inner > 1 else element
            found.append(T.bind(quotient if outermost else T.floormod(quotient, T.int32(d))))
            outermost = False
        return found

    def variable(self, dtype: str, value: Any) -> Registers:
        register = self.machine.registers(1, dtype)
        register[0] = value
        return register

    # Statements

    def store(self, s: Store) -> None:
        to, value = collapsed(s.to, s.value)

        def element(e: Any) -> None:
            at = self.place(e, to.shape)
            self.write(to, at, self.value(value, at, 1, {}), 1)

        self.each(to.size, element)

    def inner(self, s: Reduce) -> tuple[Sequence[int], Sequence[int]]:
        kept = len(s.value.shape) - s.axes
        return s.value.shape[:kept], s.value.shape[kept:]

    def by_block(self, s: Reduce) -> bool:
        """The whole block sums one result after the other: there are few, of many elements each."""
        outer, inner = self.inner(s)
        warps = self.plan.threads // self.machine.warp
        return warps > 1 and math.prod(inner) > 2 * self.machine.warp and 2 * math.prod(outer) <= warps

    def reduce(self, s: Reduce) -> None:
        outer, inner = self.inner(s)
        count, extent, dtype = math.prod(outer), math.prod(inner), wide(s.value.dtype)

        def gathered(lead: list[Any], start: Any, step: int) -> Registers:
            """The sum of elements start, start + step, …"""
            total = self.variable(dtype, first(s.op, dtype))
            rounds = -(-extent // step)
            with loop(rounds) as i:
                e = T.bind(i * step + start)

                def add() -> None:
                    self.accumulate(total, s, [*lead, *self.place(e, inner)])

                if extent % step:
                    with when(e < extent):
                        add()
                else:
                    add()
            return total

        def together(a: Any, b: Any) -> Any:
            return combine(s.op, a, b)

        def by_thread(o: Any) -> None:
            lead = self.place(o, outer)
            self.write(s.to, lead, gathered(lead, T.int32(0), 1)[0], 1)

        def by_warp(o: Any) -> None:
            lead = self.place(o, outer)
            total = self.machine.warp_reduce(together, gathered(lead, self.machine.lane, self.machine.warp)[0])
            with when(self.machine.lane == 0):
                self.write(s.to, lead, total, 1)

        if extent < FEW:
            self.each(count, by_thread)
        elif not self.by_block(s):
            warps = self.plan.threads // self.machine.warp
            with loop(-(-count // warps)) as i:
                o = T.bind(i * warps + self.machine.warp_number)
                if count % warps:
                    with when(o < count):
                        by_warp(o)
                else:
                    by_warp(o)
        else:
            for o in range(count):
                lead = self.place(T.int32(o), outer)
                total = gathered(lead, self.machine.thread, self.plan.threads)[0]
                partial = self.partial[dtype]
                if ("partial", dtype) in (m for m, _, _ in self.touched):
                    self.machine.barrier()
                total = self.machine.block_reduce(together, total, partial)
                self.touched.append((("partial", dtype), (0, 0), True))
                with when(self.machine.thread == 0):
                    self.write(s.to, lead, total, 1)

    def accumulate(self, total: Registers, s: Reduce, indices: list) -> None:
        """Add to a running sum (or max, ...); products are added with one rounding."""
        memo: dict = {}
        if s.op == "sum" and is_product(s.value):
            x, y = (self.value(factor, indices, 1, memo) for factor in factors(s.value))
            total[0] = self.machine.fma(x, y, total[0])
        else:
            total[0] = combine(s.op, total[0], self.value(s.value, indices, 1, memo))

    def topk(self, s: TopK) -> None:
        """Each element counts how many come before it, and stands there if that is one of the first k places."""
        extent = s.value.shape[-1]

        def element(e: Any) -> None:
            *lead, i = self.place(e, s.value.shape)
            own = self.machine.keep(self.key(s, [*lead, i]), key_dtype(s.value.dtype))
            rank = self.variable("int32", T.int32(0))
            with loop(extent) as j:
                other = T.bind(self.key(s, [*lead, j]))
                ahead = other > own if s.largest else other < own
                before = T.Or(ahead, T.And(other == own, j < i))
                rank[0] = rank[0] + T.Select(before, T.int32(1), T.int32(0))
            place = T.bind(rank[0])
            with when(place < s.k):
                if s.values is not None:
                    self.write(s.values, [*lead, place], self.read(s.value, [*lead, i], 1), 1)
                self.write(s.indices, [*lead, place], T.Cast("int64", i), 1)

        self.each(s.value.size, element)

    def key(self, s: TopK, indices: list) -> Any:
        """An integer that orders as the element does; NaN has its place, so that every place is taken."""
        x = self.read(s.value, indices, 1)
        if wide(s.value.dtype) != "float32":
            return x
        word = T.bind(T.reinterpret("int32", x))
        size = T.bitwise_and(word, T.int32(0x7FFFFFFF))
        return T.Select(word < 0, T.int32(0) - size, size)  # both zeros are 0

    def gather(self, s: Gather) -> None:
        def element(e: Any) -> None:
            at = self.place(e, s.to.shape)
            row = T.bind(T.Cast("int32", self.value(s.index, at, 1, {})))
            self.write(s.to, at, self.read(s.value, [*at[: s.axis], row, *at[s.axis + 1 :]], 1), 1)

        self.each(s.to.size, element)

    def scatter(self, s: Scatter) -> None:
        """A thread to a line along the axis: in rising order, so that the last of equals stays."""
        shape = s.update.shape
        lines = (*shape[: s.axis], *shape[s.axis + 1 :])

        def line(e: Any) -> None:
            at = self.place(e, lines)
            with loop(shape[s.axis]) as i:
                indices = [*at[: s.axis], i, *at[s.axis :]]
                row = T.bind(T.Cast("int32", self.value(s.index, indices, 1, {})))
                place = [*at[: s.axis], row, *at[s.axis :]]
                value = self.value(s.update, indices, 1, {})
                if s.add:
                    value = T.bind(self.read(s.to, place, 1) + value)
                self.write(s.to, place, value, 1)

        self.each(math.prod(lines), line)

    def scan(self, s: Scan) -> None:
        *outer, extent = s.value.shape
        dtype = wide(s.value.dtype)

        def row(e: Any) -> None:
            at = self.place(e, outer)
            total = self.variable(dtype, tvm.tirx.const(0, dtype))
            with loop(extent) as i:
                total[0] = total[0] + self.value(s.value, [*at, i], 1, {})
                self.write(s.to, [*at, i], total[0], 1)

        self.each(math.prod(outer), row)


def key_dtype(dtype: str) -> str:
    return "int32" if wide(dtype) == "float32" else wide(dtype)


def first(op: str, dtype: str) -> Any:
    """What a sum (or max, …) begins with: finite, as fast math wants it."""
    if op in ("sum", "prod"):
        return tvm.tirx.const(op == "prod", dtype)
    return tvm.tirx.min_value(dtype) if op == "max" else tvm.tirx.max_value(dtype)
