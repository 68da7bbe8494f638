"""float32 numbers of one GPU thread, and the functions that row kernels make of them: the same in every language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Machine

__all__ = ["CALLS", "Arithmetic"]


class Arithmetic:
    """See llmc.codegen.rows.elements.Arithmetic; one number at a time."""

    lanes = 1
    f32, i32, u32 = "float32", "int32", "uint32"

    def __init__(self, machine: Machine):
        self.machine = machine

    def dtype(self, element: str) -> str:
        return element

    def broadcast(self, scalar: Any) -> Any:
        return scalar

    def const(self, value: float) -> Any:
        return self.machine.number(value)

    def iconst(self, value: int) -> Any:
        return T.int32(value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.machine.fma(a, b, c)

    def rint(self, x: Any) -> Any:
        """The nearest whole number of |x| < 2**22, halves up: no language's own, they differ in name and in ties."""
        return T.floor(x + T.float32(0.5))

    def sqrt(self, x: Any) -> Any:
        return T.sqrt(x)

    def bits_to_f32(self, bits: Any) -> Any:
        return T.reinterpret("float32", T.shift_left(bits, T.int32(16)))

    def round_bf16(self, value: Any) -> Any:
        return self.machine.narrow(value, "uint16")

    @staticmethod
    def functions(machine: Machine) -> dict[str, Callable[[Any, Any], Any]]:
        """Functions that the machine reduces the argument of."""
        sin, cos = machine.sin, machine.cos
        return {
            "sin": lambda v, x: sin(x),
            "cos": lambda v, x: cos(x),
            "tan": lambda v, x: T.bind(sin(x) / cos(x)),
            "round": lambda v, x: _round(machine.keep(x, "float32")),
            "nn.softplus": lambda v, x: _softplus(v, machine.keep(x, "float32")),
        }


def _round(x: Any) -> Any:
    """The nearest whole number, ties to even."""
    nearest = T.bind(T.floor(x + T.float32(0.5)))
    odd = T.bind(nearest - T.float32(2) * T.floor(nearest * T.float32(0.5)))
    tie = T.And(nearest - x == T.float32(0.5), odd == T.float32(1))
    # From 2**22 on there are no halves, and adding one would round.
    small = T.bind(T.max(x, -x) < T.float32(1 << 22))
    return T.bind(T.Select(small, T.Select(tie, nearest - T.float32(1), nearest), x))


def _softplus(v: Arithmetic, x: Any) -> Any:
    """max(x, 0) + log(1 + e**-|x|); the logarithm as 2 artanh(y / (2 + y)), whose series ends at 1e-9 for y <= 1."""
    y = v.machine.keep(v.machine.exp(T.min(x, -x)), "float32")
    s = T.bind(y / (y + T.float32(2)))
    z = T.bind(s * s)
    p: Any = v.const(1 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        p = v.fma(p, z, v.const(1 / k))
    return v.fma(T.bind(p * T.float32(2)), s, T.max(x, T.float32(0)))


def _bits(x: Any) -> Any:
    """The bits of |x|; fast math would take questions about infinity and NaN for answered."""
    return T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF))


# Ops that are one call, of one name in every language, or of bits.
CALLS: dict[str, Callable[..., Any]] = {
    "log": T.log,
    "power": T.pow,
    "isfinite": lambda x: _bits(x) < 0x7F800000,
    "isinf": lambda x: _bits(x) == 0x7F800000,
    "isnan": lambda x: _bits(x) > 0x7F800000,
}
