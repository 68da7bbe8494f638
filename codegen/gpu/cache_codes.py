"""The codes of a quantized cache on a GPU: `llmc.ir.quantized_cache`, operation by operation.

No denormal float32 is made on the way, which Metal takes for zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import LARGEST, TINY

from .machine import Machine

__all__ = ["KIND_OF", "LEAST_BITS", "decode", "encode", "magnitude"]

KIND_OF = {"int8": "int8", "uint8": "fp8"}  # dtype of codes -> kind of cache
SMALLEST = 2.0**-6  # of E4M3's normal numbers


def bits_of(value: float) -> int:
    """The bits of a float32 number."""
    return int(np.float32(value).view(np.int32))


LEAST_BITS = bits_of(TINY)


def magnitude(x: Any) -> Any:
    """The bits, int32, of |x|: ordered as magnitudes are, a NaN after all."""
    return T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF))


def encode(m: Machine, kind: str, x: Any) -> Any:
    """The code nearest to float32 x in the low byte of an int32; the rest of it is zeros."""
    x = m.keep(x, "float32")
    if kind == "int8":
        # In 1.5 · 2**23 + x the last bit is worth 1: the sum is rounded to nearest even, its low byte is the number.
        return T.bitwise_and(T.reinterpret("int32", x + m.number(1.5 * 2**23)), T.int32(0xFF))
    bits = m.keep(T.min(magnitude(x), T.int32(bits_of(LARGEST["fp8"]))))
    even = T.bitwise_and(T.shift_right(bits, T.int32(20)), T.int32(1))
    normal = T.shift_right(bits + (even + T.int32(0x7FFFF)), T.int32(20)) - T.int32((127 - 7) << 3)
    # In 2**14 + x the last bit is worth 2**-9, as the last of a subnormal code.
    subnormal = T.bitwise_and(T.reinterpret("int32", T.reinterpret("float32", bits) + m.number(2.0**14)), T.int32(0xF))
    sign = T.bitwise_and(T.shift_right(T.reinterpret("int32", x), T.int32(24)), T.int32(0x80))
    return T.bitwise_or(sign, T.Select(bits < T.int32(bits_of(SMALLEST)), subnormal, normal))


def decode(m: Machine, kind: str, word: Any, byte: int = 0) -> Any:
    """What a byte of a uint32 word says, float32."""
    word = T.reinterpret("int32", word)
    if kind == "int8":
        return T.bind(T.Cast("float32", T.shift_right(T.shift_left(word, T.int32(24 - 8 * byte)), T.int32(24))))
    code = T.bind(T.shift_right(word, T.int32(8 * byte)))
    size = T.bind(T.bitwise_and(code, T.int32(0x7F)))
    normal = T.reinterpret("float32", T.shift_left(size, T.int32(20)) + T.int32((127 - 7) << 23))
    number = T.Select(size < 8, T.Cast("float32", size) * m.number(2.0**-9), normal)
    sign = T.shift_left(T.bitwise_and(code, T.int32(0x80)), T.int32(24))
    return T.bind(T.reinterpret("float32", T.bitwise_or(T.reinterpret("int32", number), sign)))
