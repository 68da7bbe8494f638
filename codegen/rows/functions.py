"""Elementwise functions: accurate to an ulp or two, without a call, out of what every machine has.

float32 in and out. v: the machine's arithmetic (see elements.py).
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from .elements import Arithmetic

__all__ = ["FUNCTIONS"]


def exp(v: Arithmetic, x: Any) -> Any:
    """e**x within 1.5 ulp, infinity above 88.8, denormals and 0 below -87.3. Reduction after Cody and Waite."""
    c = v.const
    x = T.bind(T.min(T.max(x, c(-104.5)), c(89.5)))
    i = T.bind(v.rint(x * c(1.44269504088896341)))
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


def expm1_of_positive(v: Arithmetic, x: Any) -> Any:
    """e**x - 1 for 0 <= x <= 1.25: a series to x**10 / 10!."""
    c = v.const
    p = c(2.7557319e-7)
    for coefficient in (2.7557319e-6, 2.4801587e-5, 1.9841270e-4, 1.3888889e-3, 8.3333333e-3, 4.1666667e-2,
                        1.6666667e-1, 0.5):  # fmt: skip
        p = T.bind(v.fma(p, x, c(coefficient)))
    return T.bind(v.fma(p, x * x, x))


def tanh(v: Arithmetic, x: Any) -> Any:
    """1 - 2 / (e**2|x| + 1), and a quotient of e**2|x| - 1 where that cancels."""
    c = v.const
    y = T.bind(T.min(T.abs(x), c(10.0)))
    large = T.bind(c(1.0) - c(2.0) / (exp(v, y + y) + c(1.0)))
    e = expm1_of_positive(v, T.bind(T.min(y + y, c(1.25))))
    small = T.bind(e / (e + c(2.0)))
    size = T.bind(T.Select(y < c(0.625), small, large))
    return T.bind(T.Select(x < c(0.0), c(0.0) - size, size))


def sigmoid(v: Arithmetic, x: Any) -> Any:
    return T.bind(v.const(1.0) / (v.const(1.0) + exp(v, v.const(0.0) - x)))


def silu(v: Arithmetic, x: Any) -> Any:
    return T.bind(x / (v.const(1.0) + exp(v, v.const(0.0) - x)))


def erf(v: Arithmetic, x: Any) -> Any:
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


def gelu(v: Arithmetic, x: Any) -> Any:
    c = v.const
    return T.bind(x * c(0.5) * (c(1.0) + erf(v, T.bind(x * c(0.70710678118654752)))))


def gelu_tanh(v: Arithmetic, x: Any) -> Any:
    c = v.const
    inner = T.bind(c(0.79788456080286536) * v.fma(c(0.044715) * (x * x), x, x))
    return T.bind(c(0.5) * x * (c(1.0) + tanh(v, inner)))


def rsqrt(v: Arithmetic, x: Any) -> Any:
    return T.bind(v.const(1.0) / v.sqrt(x))


def sqrt(v: Arithmetic, x: Any) -> Any:
    return T.bind(v.sqrt(x))


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
}
