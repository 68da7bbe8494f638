"""A cache in 8 bits: what its codes and scales mean.

A page holds a code for every number and, for every head and token, one scale: key = number(code) · scale. Codes are

    int8    int8, the number itself, -127 … 127
    fp8     uint8, the bits of an E4M3 number (OCP 8-bit floating point, 2023), up to 448

and the scale, float32, is the largest magnitude of the token's vector over the largest number. It costs 4 bytes a
vector where float16 would cost 2: 3% of the cache at 64 columns. float16 would lose digits where a vector's largest
magnitude is below 0.008 (int8) or 0.03 (fp8), as values of tokens that draw all attention are; float32 takes any.

All is float32 arithmetic on the vector x of one head of one token:

    most = max |x|, at least TINY       a NaN is larger than any number: it goes into the scale, and is never lost
    scale = most · (1 / largest)
    code = nearest(x · (largest / most))            ties to even

A kernel that does the same operations finds the same codes, bit for bit.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

__all__ = ["CODES", "LARGEST", "SCALE", "TINY", "code", "largest_bits", "number"]

CODES = {"int8": "int8", "fp8": "uint8"}  # kind of cache -> dtype of its codes
LARGEST = {"int8": 127.0, "fp8": 448.0}  # number that a code can say
SCALE = "float32"  # dtype of scales
TINY = 1e-30  # the least magnitude that a scale of 8 bits is made for: its inverse and the scale are normal numbers


def largest_bits(bits: Any, x: Any) -> Any:
    """The bits, uint32, of the larger of two magnitudes: of float32 x, and the one whose bits are given.

    Bits of magnitudes are ordered as the magnitudes are, and those of a NaN come after all.
    """
    return T.max(bits, T.bitwise_and(T.reinterpret("uint32", x), T.uint32(0x7FFFFFFF)))


def code(kind: str, x: Any) -> Any:
    """The code of the number nearest to float32 x, |x| <= LARGEST[kind] but for a rounding."""
    if kind == "int8":
        return T.Cast("int8", T.nearbyint(x))
    sign = T.bitwise_and(T.shift_right(T.reinterpret("uint32", x), T.uint32(24)), T.uint32(0x80))
    size = T.min(T.abs(x), T.float32(LARGEST["fp8"]))
    bits = T.reinterpret("uint32", size)
    even = T.bitwise_and(T.shift_right(bits, T.uint32(20)), T.uint32(1))
    normal = T.shift_right(bits + T.uint32(0x7FFFF) + even, T.uint32(20)) - T.uint32((127 - 7) << 3)
    subnormal = T.Cast("uint32", T.nearbyint(size * T.float32(2.0**9)))
    return T.Cast("uint8", T.bitwise_or(sign, T.Select(size < T.float32(2.0**-6), subnormal, normal)))


def number(kind: str, code: Any) -> Any:
    """What a code says, float32."""
    if kind == "int8":
        return T.Cast("float32", code)
    bits = T.Cast("uint32", code)
    sign = T.shift_left(T.bitwise_and(bits, T.uint32(0x80)), T.uint32(24))
    size = T.shift_left(T.bitwise_and(bits, T.uint32(0x7F)), T.uint32(20))
    # Exponent and mantissa lie as float32's, but for the bias: 7 in place of 127.
    return T.reinterpret("float32", T.bitwise_or(sign, size)) * T.float32(2.0**120)
