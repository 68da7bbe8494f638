"""Weights in few bits and activations rounded to 8: what the numbers mean, whatever kernel reads them.

A quantized weight is a few tensors, its *parts*, and a `Format` that says how to read them. `dequantize` is the
semantic op that gives the weight again; `round_activation` the one that says that a product sees its activations in 8
bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from .ops import callee, emit_op, op_of
from .quantized_cache import LARGEST, TINY

__all__ = [
    "TABLES",
    "Format",
    "activation_group",
    "activation_kind",
    "dequantize",
    "format_of",
    "round_activation",
]

# The 16 values of NF4: quantiles of a normal distribution (Dettmers et al., QLoRA, 2023, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# E2M1 (OCP Microscaling Formats v1.0, 5.3.3): sign, two bits of exponent, one of mantissa.
_E2M1 = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def _e4m3(code: int) -> float:
    """E4M3 (OCP 8-bit floating point, 2023): sign, four bits of exponent, bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# Values of codes, by code, where a code is no integer.
TABLES: dict[str, tuple[float, ...]] = {"nf4": _NF4, "e2m1": _E2M1, "e4m3": tuple(_e4m3(c) for c in range(256))}


@dataclass(frozen=True)
class Format:
    """How the parts of a weight [..., columns, depth] are read: value = number(code) · scale of its group.

    Parts, in this order, all with the weight's rows as their rows:
      codes   [..., columns, depth] uint8, one byte a code whatever its bits; code < 2 ** bits
      scales  [..., columns, depth / group] of dtype `scale`; "e8m0" is uint8, 2 ** (byte - 127)
      zeros   [..., columns, depth / group] uint8, only if `zeros`

    number(code) is TABLES[table][code] with a table, else code - zero of its group with `zeros`, else code - offset.

    bits    of a code: 3, 4 or 8
    group   consecutive weights of a row that share a scale, a divisor of depth; 0: the whole row does
    scale   "float16", "bfloat16", "float32" or "e8m0"
    zeros   every group has a zero point of its own
    offset  the code of zero (128: 8 bits, 8: 4 bits), where neither `zeros` nor `table` says more
    table   name of a table of values, "" for none
    """

    bits: int
    group: int
    scale: str = "float16"
    zeros: bool = False
    offset: int = 0
    table: str = ""

    def __str__(self) -> str:
        """Short, for names of kernels and messages: "int4-g32-zp", "int8", "nf4-g64"."""
        group = f"-g{self.group}" if self.group else ""
        return (self.table or f"int{self.bits}") + group + ("-zp" if self.zeros else "")

    @property
    def rounds(self) -> str:
        """What activations are rounded to, where they are, that such a weight multiplies: "fp8" (E4M3) or "int8"."""
        return "fp8" if self.table == "e4m3" else "int8"

    def groups(self, depth: int) -> int:
        """Scales of a row."""
        return depth // self.group if self.group else 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """part -> (shape, dtype) for a weight [..., columns, depth]. ValueError where groups do not fill a row."""
        if self.group and shape[-1] % self.group:
            raise ValueError(f"expected rows of whole groups of {self.group}, found rows of {shape[-1]}")
        scales = (*shape[:-1], self.groups(shape[-1]))
        parts = {"codes": (shape, "uint8"), "scales": (scales, "uint8" if self.scale == "e8m0" else self.scale)}
        return parts | ({"zeros": (scales, "uint8")} if self.zeros else {})

    def bits_per_weight(self, depth: int) -> float:
        """Bits that a weight takes with its share of scales and zero points."""
        scale = {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8}[self.scale]
        return self.bits + (scale + (8 if self.zeros else 0)) * self.groups(depth) / depth


def dequantize(bb: relax.BlockBuilder, format: Format, *parts: relax.Expr) -> relax.Var:
    """The weight [..., columns, depth] float32 that the parts (in Format's order) stand for."""

    def meaning(emit, codes, scales, zeros=None):
        def per_weight(x):  # [..., groups] -> [..., depth], or [..., 1] for a whole row
            return emit(R.repeat(x, format.group, axis=-1)) if format.group else x

        if format.table:
            numbers = emit(R.take(_constant(TABLES[format.table]), emit(R.astype(codes, "int32")), axis=0))
        else:
            numbers = emit(R.astype(codes, "float32"))
            if zeros is not None:
                numbers = emit(R.subtract(numbers, per_weight(emit(R.astype(zeros, "float32")))))
            elif format.offset:
                numbers = emit(R.subtract(numbers, relax.const(float(format.offset), "float32")))
        if format.scale == "e8m0":
            powers = [2.0 ** (e - 127) for e in range(255)] + [float("nan")]
            scales = emit(R.take(_constant(powers), emit(R.astype(scales, "int32")), axis=0))
        elif format.scale != "float32":
            scales = emit(R.astype(scales, "float32"))
        return emit(R.multiply(numbers, per_weight(scales)))

    operands = dict(zip(("codes", "scales", "zeros"), parts, strict=False))
    parameters: dict[str, Any] = {f.name: getattr(format, f.name) for f in fields(format)}
    return emit_op(bb, "dequantize", operands, meaning, **parameters)


def format_of(module: tvm.IRModule, call: relax.Expr) -> Format | None:
    """The format that a call of dequantize reads; None if `call` is no such call."""
    function = callee(module, call)
    if function is None or op_of(module, call) != "dequantize":
        return None
    attrs = function.attrs
    read = {"bits": int, "group": int, "scale": str, "zeros": bool, "offset": int, "table": str}
    return Format(**{name: kind(getattr(attrs[name], "value", attrs[name])) for name, kind in read.items()})


def round_activation(bb: relax.BlockBuilder, x: relax.Expr, *, group: int = 0, kind: str = "int8") -> relax.Var:
    """x [n, i] as 8-bit numbers of a kind say it, token by token: q · s, in x's dtype.

    "int8": q is an integer in [-127, 127], "fp8": an E4M3 number in [-448, 448]; with L the largest of them, every
    `group` consecutive elements (0: the whole row) share s = most · (1/L); q = x · (L / most) rounded to the nearest,
    ties to even, all in float32; most = max(max|x|, TINY), for which neither L / most is infinite nor s a subnormal
    number. A kernel that does the same operations finds the same q, bit for bit. Zeros stay zeros.
    """
    largest = LARGEST[kind]

    def meaning(emit, x):
        n, depth = x.ty.shape[0], int(x.ty.shape[1])
        size = group or depth
        y = emit(R.reshape(emit(R.astype(x, "float32")), [n, depth // size, size]))
        most = emit(R.max(emit(R.abs(y)), axis=[-1], keepdims=True))
        safe = emit(R.maximum(most, _f32(TINY)))
        q = emit(R.multiply(y, emit(R.divide(_f32(largest), safe))))
        q = emit(R.round(q)) if kind == "int8" else nearest_e4m3(emit, q)
        y = emit(R.multiply(q, emit(R.multiply(safe, _f32(1.0 / largest)))))
        y = emit(R.reshape(y, [n, depth]))
        return y if dtype == "float32" else emit(R.astype(y, dtype))

    def nearest_e4m3(emit, q):
        """In [2**e, 2**(e + 1)) numbers are 2**(e - 3) apart, from e = -6 on; below that, 2**-9. Both it and what it is
        multiplied with are powers of two: products with them are exact."""
        size, apart, inverse = emit(R.abs(q)), _f32(2.0**-9), _f32(2.0**9)
        for e in range(-5, 9):
            above = emit(R.greater_equal(size, _f32(2.0**e)))
            apart = emit(R.where(above, _f32(2.0 ** (e - 3)), apart))
            inverse = emit(R.where(above, _f32(2.0 ** (3 - e)), inverse))
        return emit(R.multiply(emit(R.round(emit(R.multiply(q, inverse)))), apart))

    dtype = str(x.ty.dtype)
    parameters: dict[str, Any] = {"group": int(group), "kind": kind}
    return emit_op(bb, "round_activation", {"x": x}, meaning, **parameters)


def activation_group(module: tvm.IRModule, call: relax.Expr) -> int | None:
    """The group of a call of round_activation; None if `call` is no such call."""
    function = callee(module, call)
    if function is None or op_of(module, call) != "round_activation":
        return None
    value = function.attrs["group"]
    return int(getattr(value, "value", value))


def activation_kind(module: tvm.IRModule, call: relax.Expr) -> str | None:
    """What a call of round_activation rounds to, "int8" or "fp8"; None if `call` is no such call."""
    function = callee(module, call)
    if function is None or op_of(module, call) != "round_activation":
        return None
    return str(function.attrs["kind"])


def _f32(value: float) -> relax.Expr:
    return relax.const(np.float32(value), "float32")


def _constant(values) -> relax.Expr:
    return relax.const(np.asarray(values, "float32"), "float32")
