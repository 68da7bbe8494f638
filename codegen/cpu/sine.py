"""Sine and cosine in float64: angles of positions far beyond any context."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from .vector import Vector

__all__ = ["cos", "sin"]

_SINE = (1.58962301576546568060e-10, -2.50507477628578072866e-8, 2.75573136213857245213e-6, -1.98412698295895385996e-4,
         8.33333333332211858878e-3, -1.66666666666666307295e-1)  # fmt: skip
_COSINE = (-1.13585365213876817300e-11, 2.08757008419747316778e-9, -2.75573141792967388112e-7,
           2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2)  # fmt: skip


def _turn(v: Vector, x: Any, quarter: int) -> Any:
    """sin(x + quarter · π/2) in float64, rounded once. |x| < 2**31: angles of positions far beyond any context.

    Reduction by π/2 in two parts with fused multiply-adds; coefficients from Cephes' sin.c.
    """
    wide, whole = v.dtype("float64"), v.i32

    def c(value: float) -> Any:
        return v.broadcast(T.float64(value))

    def fma(a: Any, b: Any, d: Any) -> Any:
        return T.bind(T.call_llvm_pure_intrin(wide, "llvm.fma", a, b, d))

    d = T.bind(T.Cast(wide, x))
    k = T.bind(T.call_llvm_pure_intrin(wide, "llvm.rint", d * c(0.63661977236758134308)))
    r = fma(k, c(-1.57079632679489655800), d)
    r = fma(k, c(-6.12323399573676603587e-17), r)
    z = T.bind(r * r)
    s, co = c(_SINE[0]), c(_COSINE[0])
    for a, b in zip(_SINE[1:], _COSINE[1:], strict=True):
        s, co = fma(s, z, c(a)), fma(co, z, c(b))
    sine = fma(s, T.bind(z * r), r)
    cosine = fma(co, T.bind(z * z), fma(z, c(-0.5), c(1.0)))
    q = T.bind(T.Cast(whole, k) + v.iconst(quarter))
    value = T.bind(T.Select(T.bitwise_and(q, v.iconst(1)) == v.iconst(1), cosine, sine))
    value = T.bind(T.Select(T.bitwise_and(q, v.iconst(2)) == v.iconst(2), c(0.0) - value, value))
    return T.bind(T.Cast(v.f32, value))


def sin(v: Vector, x: Any) -> Any:
    return _turn(v, x, 0)


def cos(v: Vector, x: Any) -> Any:
    return _turn(v, x, 1)
