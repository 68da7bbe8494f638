"""Activations in 8 bits, as llmc.ir.quantized.round_activation says: the launch before a product that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import LARGEST

from .cache_codes import LEAST_BITS, decode, encode
from .machine import Machine, i64, loop, when
from .memory import Memory
from .product import Operands
from .quantized_layout import Layout

__all__ = ["round_codes", "round_rows"]

THREADS = 256  # of a block
NOT_FINITE = 0x7F800000  # bits of infinity; NaN's are more


def round_rows(operands: Operands, n: Any) -> Operands:
    """Launch the rounding of x [n, depth] into a workspace, in groups of product.rounded -> operands that read it.

    n, int64, is not 0. Without rounding: the operands as they are.
    """
    product, m = operands.product, operands.machine
    if product.rounded is None:
        return operands
    rounded = Memory(T.alloc_buffer((n * product.depth,), product.activation))

    def store(group: Group) -> None:
        with when(group.there), group.elements(group.size) as at:
            m.store(rounded.elements, [group.base + i64(at)], T.bind(group.number(at) * group.scale))

    _launch(operands, n, store)
    return replace(operands, x=rounded)


def round_codes(operands: Operands, n: Any) -> Operands:
    """The same as codes -> operands whose x is [n, stored depth of the weight], int8 or E4M3 as bytes, zeros past the
    depth, in the order of Layout.byte_place, and whose x_scales are float32 [n, groups].
    """
    product, m = operands.product, operands.machine
    layout = Layout(product.weight, product.depth)  # type: ignore[arg-type]  # a format: only those have codes
    depth, stored, size = product.depth, layout.stored_depth, product.rounded or product.depth
    codes = Memory(T.alloc_buffer((n * stored,), "uint8"))
    scales = Memory(T.alloc_buffer((n * (depth // size),), "float32"))

    def store(group: Group) -> None:
        with when(group.there):
            with when(group.lane == 0):
                T.buffer_store(scales.elements, group.scale, [group.index])
            row = T.bind(T.floordiv(group.index, depth // size))
            first = T.bind(T.floormod(group.index, depth // size) * size)
            with group.elements(size if size < depth else stored) as at:  # a row's only group has what is past it
                code = m.registers(1, "int32")
                code[0] = T.int32(0)
                with when(at < size):
                    # What is not finite has no code; its scale is NaN.
                    code[0] = T.Select(group.finite, group.code(T.min(at, size - 1)), T.int32(0))
                place = T.bind(layout.byte_place(first + i64(at)))
                T.buffer_store(codes.elements, T.Cast("uint8", code[0]), [row * stored + place])

    _launch(operands, n, store)
    return replace(operands, x=codes, x_scales=scales)


class Group:
    """A group of x as the lanes that round it see it.

    index: int64, among all; base: of its first element; there: whether it is. lane, lanes: this one, of so many.
    scale: float32; NaN where not all of its elements are finite.
    """

    def __init__(self, operands: Operands, index: Any, total: Any, size: int, lanes: int):
        self.operands, self.machine, self.size, self.lanes = operands, operands.machine, size, lanes
        self.kind = operands.product.weight.rounds  # type: ignore[union-attr]  # a format: floats meet none
        self.index, self.there = index, index < total
        self.base = T.bind(T.min(index, total - 1) * size)  # all lanes take part in a warp's maximum
        self.lane = T.bind(T.floormod(self.machine.thread, lanes))
        self.scale = self.inverse = self.finite = None

    @contextmanager
    def elements(self, count: int) -> Iterator[Any]:
        """with group.elements(count) as at: this lane's of so many."""
        with loop(count - self.lane, step=self.lanes) as offset:
            yield T.bind(self.lane + offset)

    def load(self, at: Any) -> Any:
        return self.machine.load_f32(self.operands.x.elements, [self.base + i64(at)])

    def number(self, at: Any) -> Any:
        """What an element is rounded to, before its scale, float32."""
        if self.kind == "fp8":
            return decode(self.machine, self.kind, T.bind(T.reinterpret("uint32", self.code(at))))
        return round_even(self.machine, self.load(at), self.inverse)

    def code(self, at: Any) -> Any:
        """Its code in the low byte of an int32."""
        if self.kind == "fp8":
            value = self.machine.fma(self.load(at), self.inverse, T.float32(0))  # a product that no compiler fuses
            return T.bind(encode(self.machine, self.kind, value))
        return T.bind(T.Cast("int32", self.number(at)))

    def find_scale(self) -> None:
        """The bits of sizes are in the order of the sizes, and NaN's above them all."""
        m = self.machine
        most = m.registers(1, "int32")
        most[0] = T.int32(LEAST_BITS)
        with self.elements(self.size) as at:
            size = T.bitwise_and(T.reinterpret("int32", self.load(at)), T.int32(0x7FFFFFFF))
            most[0] = T.max(most[0], size)
        if self.lanes < THREADS:
            largest = m.warp_reduce(T.max, T.bind(most[0]), self.lanes) if self.lanes > 1 else T.bind(most[0])
        else:
            largest = m.block_reduce(T.max, T.bind(most[0]), m.shared(THREADS // m.warp, "int32"))
        self.finite = T.bind(largest < NOT_FINITE)
        safe, units = m.keep(T.reinterpret("float32", largest), "float32"), LARGEST[self.kind]
        self.inverse = divide(m, T.float32(units), safe)
        scale = T.bind(safe * m.number(1 / units))
        nan = T.reinterpret("float32", T.uint32(0x7FC00000))
        self.scale = m.keep(T.Select(self.finite, scale, nan), "float32")


def _launch(operands: Operands, n: Any, store: Callable[[Group], None]) -> None:
    """Launch what finds the scale of every group and stores it."""
    product, m = operands.product, operands.machine
    size = product.rounded or product.depth
    lanes = THREADS
    if product.rounded:  # that share one: a power of two, within a warp
        lanes = 1
        while lanes * 2 <= min(size, m.warp):
            lanes *= 2
    at_once = THREADS // lanes
    total = T.bind(n * (product.depth // size))
    with m.launch([T.floordiv(total + (at_once - 1), T.int64(at_once))], THREADS) as (block,):
        index = T.bind(i64(block) * at_once + i64(T.floordiv(m.thread, lanes)))
        group = Group(operands, index, total, size, lanes)
        group.find_scale()
        store(group)


def round_even(m: Machine, x: Any, by: Any) -> Any:
    """x · by, rounded to float32, to the nearest whole number, ties to even; |x · by| < 2**22, by > 0."""
    size = m.keep(m.fma(T.max(x, -x), by, T.float32(0)), "float32")  # a product that no compiler fuses further
    below = m.keep(T.floor(size), "float32")
    over = m.keep(size - below, "float32")
    odd = below - T.float32(2) * T.floor(below * T.float32(0.5)) == T.float32(1)
    up = T.Or(over > T.float32(0.5), T.And(over == T.float32(0.5), odd))
    whole = T.bind(T.Select(up, below + T.float32(1), below))
    return T.bind(T.Select(x < T.float32(0), -whole, whole))


def divide(m: Machine, a: Any, b: Any) -> Any:
    """a / b rounded to the nearest: also where fast math takes less care, one step of Newton's with the exact rest."""
    quotient = m.keep(a / b, "float32")
    if m.language != "msl":
        return quotient
    rest = m.fma(T.float32(0) - quotient, b, a)
    return m.keep(m.fma(rest, T.float32(1) / b, quotient), "float32")
