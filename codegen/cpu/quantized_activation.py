"""Activations become whole numbers, a group at a time: N = round(x · M / most), to the nearest, ties to even.

most = max(max|x|, TINY): also of a group of zeros, M / most and most / M are normal numbers.

With M = 127 these are the numbers of `llmc.ir.quantized.round_activation`, bit for bit; with M = 448 the nearest E4M3
numbers are its others.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import TINY

from .vector import Vector, chunks, loop


def largest(x: Any, row: Any, start: Any, size: int, lanes: int, units: float) -> tuple[Any, Any]:
    """(M / most, most / M) of x[row, start : start + size], M = units.

    An infinity or a NaN makes the second what makes a product with it NaN.
    """
    wide = Vector(lanes)
    least = int(np.float32(TINY).view(np.int32))
    most = wide.register(wide.iconst(least), "int32")
    few = Vector(1).register(T.int32(least), "int32")

    def larger(at: Any, width: int) -> None:
        # As whole numbers, magnitudes compare as they do as floats, with infinity above them and NaN above all.
        v = Vector(width)
        magnitude = T.bind(T.bitwise_and(T.reinterpret(v.i32, v.load(x, [row, start + at])), v.iconst(0x7FFFFFFF)))
        if width == lanes:
            most.set(T.max(most.get(), magnitude))
        else:
            few.set(T.max(few.get(), reduce(v, "smax", magnitude)))

    pieces(size, lanes, larger)
    bound = T.bind(T.max(few.get(), reduce(wide, "smax", most.get())) if size >= lanes else few.get())
    safe = T.bind(T.reinterpret("float32", bound))
    return T.bind(T.float32(units) / safe), T.bind(safe * T.float32(1 / units))


def whole(v: Vector, x: Any, factor: Any) -> Any:
    """round(x · factor) in int32 lanes, for |x · factor| < 2**22.

    The bits of a sum with 1.5 · 2**23 count in ones from there, whatever x is; a conversion of NaN would be undefined.
    The sum alone would round too, but as one multiply-add, which sees what the product's own rounding drops.
    """
    near = T.bind(v.rint(x * v.broadcast(factor)) + v.const(12582912.0))
    return T.bind(T.reinterpret(v.i32, near) - v.iconst(0x4B400000))


def e4m3(v: Vector, x: Any, factor: Any) -> Any:
    """The E4M3 numbers nearest to x · factor, |x · factor| up to 448 but for a rounding, as float32 lanes.

    From 2**-6 on, 20 bits of float32's mantissa go, and a carry is right; below, numbers are 2**-9 apart.
    """
    bits = T.bind(T.reinterpret(v.i32, x * v.broadcast(factor)))
    size = T.bind(T.bitwise_and(bits, v.iconst(0x7FFFFFFF)))
    even = T.bitwise_and(T.shift_right(size, v.iconst(20)), v.iconst(1))
    normal = T.bitwise_and(size + (even + v.iconst(0x7FFFF)), v.iconst(0x7FF00000))
    small = T.reinterpret(v.i32, v.rint(T.reinterpret(v.f32, size) * v.const(2.0**9)) * v.const(2.0**-9))
    near = T.Select(size < v.iconst(0x3C800000), small, normal)  # 2**-6
    return T.bind(T.reinterpret(v.f32, T.bitwise_or(near, T.bitwise_and(bits, v.iconst(-0x80000000)))))


def reduce(v: Vector, how: str, value: Any) -> Any:
    """The lanes of an int32 vector as one: how is "add" or "smax"."""
    return value if v.lanes == 1 else T.bind(T.call_llvm_intrin("int32", f"llvm.vector.reduce.{how}", value))


def pieces(size: int, lanes: int, emit: Callable[[Any, int], None]) -> None:
    """Emit emit(offset, width) over `size` elements: whole vectors, ever smaller ones, single elements from 3 down."""
    full = size // lanes
    if full > 4:
        with loop(0, full) as i:
            emit(i * lanes, lanes)
    else:
        for i in range(full):
            emit(T.int64(i * lanes), lanes)
    for offset, width in chunks(size % lanes, lanes):
        for at, one in [(offset, width)] if width >= 4 else [(offset + i, 1) for i in range(width)]:
            emit(T.int64(full * lanes + at), one)
