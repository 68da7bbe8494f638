"""Elementwise functions on vectors: accurate to an ulp or two, without a call.

float32 in and out.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from .vector import Vector

__all__ = ["FUNCTIONS"]


def exp(v: Vector, x: Any) -> Any:
    """e**x within 1.5 ulp, infinity above 88.8, denormals and 0 below -87.3. Reduction after Cody and Waite."""
    c = v.const
    x = T.bind(T.min(T.max(x, c(-104.5)), c(89.5)))
    i = T.bind(T.call_llvm_pure_intrin(v.f32, "llvm.rint", x * c(1.44269504088896341)))
    r = T.bind(v.fma(i, c(-0.693359375), x))
    r = T.bind(v.fma(i, c(2.12194440e-4), r))
    p = c(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = T.bind(v.fma(p, r, c(coefficient)))
    p = T.bind(v.fma(p, r * r, r))
    # 2**i in two factors: i reaches past both ends of the exponent.
    n = T.bind(T.Cast(v.i32, i))
    half = T.bind(T.shift_right(n, v.iconst(1)))
    first, second = (
        T.bind(T.reinterpret(v.f32, T.shift_left(e + v.iconst(127), v.iconst(23)))) for e in (half, n - half)
    )
    return T.bind(v.fma(p, first, first) * second)


def expm1_of_positive(v: Vector, x: Any) -> Any:
    """e**x - 1 for 0 <= x <= 1.25: a series to x**10 / 10!."""
    c = v.const
    p = c(2.7557319e-7)
    for coefficient in (2.7557319e-6, 2.4801587e-5, 1.9841270e-4, 1.3888889e-3, 8.3333333e-3, 4.1666667e-2,
                        1.6666667e-1, 0.5):  # fmt: skip
        p = T.bind(v.fma(p, x, c(coefficient)))
    return T.bind(v.fma(p, x * x, x))


def tanh(v: Vector, x: Any) -> Any:
    """1 - 2 / (e**2|x| + 1), and a quotient of e**2|x| - 1 where that cancels."""
    c = v.const
    y = T.bind(T.min(T.abs(x), c(10.0)))
    large = T.bind(c(1.0) - c(2.0) / (exp(v, y + y) + c(1.0)))
    e = expm1_of_positive(v, T.bind(T.min(y + y, c(1.25))))
    small = T.bind(e / (e + c(2.0)))
    size = T.bind(T.Select(y < c(0.625), small, large))
    return T.bind(T.Select(x < c(0.0), c(0.0) - size, size))


def sigmoid(v: Vector, x: Any) -> Any:
    return T.bind(v.const(1.0) / (v.const(1.0) + exp(v, v.const(0.0) - x)))


def silu(v: Vector, x: Any) -> Any:
    return T.bind(x / (v.const(1.0) + exp(v, v.const(0.0) - x)))


def erf(v: Vector, x: Any) -> Any:
    """erf(x) within 1 ulp, after Norbert Juffa's erff."""
    c = v.const
    t, s = T.bind(T.abs(x)), T.bind(x * x)
    r = T.bind(v.fma(c(-1.72853470e-5), t, c(3.83197126e-4)))
    u = T.bind(v.fma(c(-3.88396438e-3), t, c(2.42546219e-2)))
    r = T.bind(v.fma(r, s, u))
    for coefficient in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = T.bind(v.fma(r, t, c(coefficient)))
    r = T.bind(v.fma(r, t, c(0.0) - t))
    large = T.bind(c(1.0) - exp(v, r))
    large = T.bind(T.Select(x < c(0.0), c(0.0) - large, large))
    p = c(-5.96761703e-4)
    for coefficient in (4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1):
        p = T.bind(v.fma(p, s, c(coefficient)))
    return T.bind(T.Select(t > c(0.927734375), large, v.fma(p, x, x)))


def gelu(v: Vector, x: Any) -> Any:
    c = v.const
    return T.bind(x * c(0.5) * (c(1.0) + erf(v, T.bind(x * c(0.70710678118654752)))))


def gelu_tanh(v: Vector, x: Any) -> Any:
    c = v.const
    inner = T.bind(c(0.79788456080286536) * v.fma(c(0.044715) * (x * x), x, x))
    return T.bind(c(0.5) * x * (c(1.0) + tanh(v, inner)))


def rsqrt(v: Vector, x: Any) -> Any:
    return T.bind(v.const(1.0) / T.call_llvm_pure_intrin(v.f32, "llvm.sqrt", x))


def sqrt(v: Vector, x: Any) -> Any:
    return T.bind(T.call_llvm_pure_intrin(v.f32, "llvm.sqrt", x))


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


FUNCTIONS = {
    "exp": exp,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "nn.silu": silu,
    "erf": erf,
    "nn.gelu": gelu,
    "nn.gelu_tanh": gelu_tanh,
    "rsqrt": rsqrt,
    "sqrt": sqrt,
    "sin": sin,
    "cos": cos,
}
