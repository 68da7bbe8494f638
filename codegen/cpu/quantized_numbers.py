"""Codes in int32 lanes become the float32 numbers that they stand for, on any CPU."""

import struct
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized import TABLES, Format

from .vector import Vector

# What a vector of so many lanes looks 16 floats up with.
_LOOKUPS = {
    16: """declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
define linkonce_odr <16 x float> @{name}(<16 x i32> %codes) alwaysinline {{
  %r = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <{low}, {high}>, <16 x i32> %codes)
  ret <16 x float> %r
}}
""",
    8: """declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)
define linkonce_odr <8 x float> @{name}(<8 x i32> %codes) alwaysinline {{
  %low = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{low}>, <8 x i32> %codes)
  %high = call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{high}>, <8 x i32> %codes)
  %above = icmp ugt <8 x i32> %codes, splat (i32 7)
  %r = select <8 x i1> %above, <8 x float> %high, <8 x float> %low
  ret <8 x float> %r
}}
""",
    1: """@{name}_values = private unnamed_addr constant [16 x float] [{low}, {high}]
define linkonce_odr float @{name}(i32 %code) alwaysinline {{
  %at = getelementptr [16 x float], ptr @{name}_values, i32 0, i32 %code
  %r = load float, ptr %at
  ret float %r
}}
""",
}


def text(format: Format, lanes: int) -> str:
    """LLVM functions that `number` calls, for vectors of so many lanes."""
    if format.table not in ("nf4", "e2m1"):
        return ""
    entries = [f"float {_hex(x)}" for x in TABLES[format.table]]
    name = _name(format, lanes)
    if lanes in _LOOKUPS:
        return _LOOKUPS[lanes].format(name=name, low=", ".join(entries[:8]), high=", ".join(entries[8:]))
    lines = [text(format, 1), f"define linkonce_odr <{lanes} x float> @{name}(<{lanes} x i32> %codes) alwaysinline {{"]
    found = "poison"
    for i in range(lanes):
        lines.append(f"  %c{i} = extractelement <{lanes} x i32> %codes, i32 {i}")
        lines.append(f"  %x{i} = call float @{_name(format, 1)}(i32 %c{i})")
        lines.append(f"  %r{i} = insertelement <{lanes} x float> {found}, float %x{i}, i32 {i}")
        found = f"%r{i}"
    return "\n".join([*lines, f"  ret <{lanes} x float> {found}", "}", ""])


def number(v: Vector, format: Format, codes: Any, zero: Any = None) -> Any:
    """float32 lanes of codes in int32 lanes; zero: those of their groups, in int32 lanes, if the format has them."""
    if format.table == "e4m3":
        nan = v.broadcast(T.reinterpret("float32", T.int32(0x7FC00000)))
        return T.bind(T.Select(T.bitwise_and(codes, v.iconst(0x7F)) == v.iconst(0x7F), nan, e4m3(v, codes)))
    if format.table:
        return T.bind(T.call_extern(v.f32, _name(format, v.lanes), codes))
    if zero is not None:
        codes = codes - zero
    elif format.offset:
        codes = codes - v.iconst(format.offset)
    return T.bind(T.Cast(v.f32, codes))


def e4m3(v: Vector, codes: Any) -> Any:
    """float32 lanes of E4M3 codes that are numbers; 480 for those that are none."""
    # Its exponent and mantissa are those of a float32 with a bias larger by 120, subnormal numbers too.
    up = T.shift_right(T.shift_left(codes, v.iconst(24)), v.iconst(4))
    small = T.reinterpret(v.f32, T.bitwise_and(up, v.iconst(0x87F00000 - (1 << 32))))
    return T.bind(small * v.const(2.0**120))


def not_e4m3(v: Vector, bytes: Any) -> Any:
    """int32 lanes that are not 0 where one of four E4M3 codes, the bytes of a lane, is no number."""
    carried = T.bitwise_and(bytes, v.iconst(0x7F7F7F7F)) + v.iconst(0x01010101)
    return T.bind(T.bitwise_and(carried, v.iconst(0x80808080 - (1 << 32))))


def _name(format: Format, lanes: int) -> str:
    return f"llmc_{format.table}_x{lanes}"


def _hex(value: float) -> str:
    """As LLVM spells a float: the bits of the double of equal value."""
    [single] = struct.unpack("f", struct.pack("f", value))
    return f"0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"
