"""The codes of a quantized cache in vectors: `llmc.ir.quantized_cache`, operation by operation."""

from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import LARGEST

from .vector import Vector

__all__ = ["decode", "encode", "magnitude"]


def magnitude(v: Vector, x: Any) -> Any:
    """The bits of |x| in int32 lanes: ordered as magnitudes are, a NaN after all."""
    return T.bitwise_and(T.reinterpret(v.i32, x), v.iconst(0x7FFFFFFF))


def encode(v: Vector, kind: str, x: Any) -> Any:
    """The codes nearest to float32 lanes, int8 or uint8 lanes."""
    if kind == "int8":
        return T.bind(T.Cast(v.dtype("int8"), T.Cast(v.i32, v.rint(x))))
    size = T.bind(T.min(T.reinterpret(v.f32, magnitude(v, x)), v.const(LARGEST["fp8"])))
    bits = T.bind(T.reinterpret(v.i32, size))
    even = T.bitwise_and(T.shift_right(bits, v.iconst(20)), v.iconst(1))
    normal = T.shift_right(bits + v.iconst(0x7FFFF) + even, v.iconst(20)) - v.iconst((127 - 7) << 3)
    subnormal = T.Cast(v.i32, v.rint(size * v.const(2.0**9)))
    sign = T.bitwise_and(T.shift_right(T.reinterpret(v.i32, x), v.iconst(24)), v.iconst(0x80))
    code = T.bitwise_or(sign, T.Select(size < v.const(2.0**-6), subnormal, normal))
    return T.bind(T.Cast(v.dtype("uint8"), code))


def decode(v: Vector, kind: str, codes: Any) -> Any:
    """What int8 or uint8 lanes say, float32 lanes."""
    if kind == "int8":
        return T.bind(T.Cast(v.f32, T.Cast(v.i32, codes)))
    # Widened with its sign, a code has it where float32 does; three copies below are cleared.
    wide = T.Cast(v.i32, T.reinterpret(v.dtype("int8"), codes))
    bits = T.bitwise_and(T.shift_left(wide, v.iconst(20)), v.iconst(-0x78100000))
    return T.bind(T.reinterpret(v.f32, bits) * v.const(2.0**120))
