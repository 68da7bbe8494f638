"""Activations in 8 bits, as llmc.ir.quantized.round_activation says: the launch before a product that reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Machine, i64, loop, when
from .memory import Memory
from .product import Operands

__all__ = ["round_rows"]

THREADS = 256  # of a block


def round_rows(operands: Operands, n: Any, group: int) -> Operands:
    """Launch the rounding of x [n, depth] into a workspace, in groups of so many (0: rows) -> operands that read it.

    n, int64, is not 0.
    """
    product, m = operands.product, operands.machine
    depth = product.depth
    rounded = Memory(T.alloc_buffer((n * depth,), product.activation))
    size = group or depth
    lanes = THREADS
    if group:  # that share one: a power of two, within a warp
        lanes = 1
        while lanes * 2 <= min(size, m.warp):
            lanes *= 2
    at_once = THREADS // lanes
    total = T.bind(n * (depth // size))
    with m.launch([T.floordiv(total + (at_once - 1), T.int64(at_once))], THREADS) as (block,):
        lane = T.bind(T.floormod(m.thread, lanes))
        number = T.bind(i64(block) * at_once + i64(T.floordiv(m.thread, lanes)))
        base = T.bind(T.min(number, total - 1) * size)  # all lanes take part in a warp's maximum

        def load(i: Any) -> Any:
            return m.load_f32(operands.x.elements, [base + i64(i)])

        most = m.registers(1)
        most[0] = T.float32(0)
        with loop(size - lane, step=lanes) as offset:
            x = load(lane + offset)
            most[0] = T.max(most[0], T.max(x, -x))
        if group:
            largest = m.warp_reduce(T.max, T.bind(most[0]), lanes) if lanes > 1 else T.bind(most[0])
        else:
            largest = m.block_reduce(T.max, T.bind(most[0]), m.shared(THREADS // m.warp))
        safe = m.keep(T.Select(largest > T.float32(0), largest, T.float32(1)), "float32")
        inverse = divide(m, T.float32(127), safe)
        scale = m.keep(safe * m.number(1 / 127), "float32")
        with when(number < total), loop(size - lane, step=lanes) as offset:
            at = T.bind(lane + offset)
            m.store(rounded.elements, [base + i64(at)], T.bind(round_even(m, load(at), inverse) * scale))
    return replace(operands, x=rounded)


def round_even(m: Machine, x: Any, by: Any) -> Any:
    """x · by, rounded to float32, to the nearest whole number, ties to even; |x · by| < 2**22, by > 0."""
    size = m.keep(m.fma(T.max(x, -x), by, T.float32(0)), "float32")  # a product that no compiler fuses further
    below = m.keep(T.floor(size), "float32")
    over = m.keep(size - below, "float32")
    odd = below - T.float32(2) * T.floor(below * T.float32(0.5)) == T.float32(1)
    up = T.Or(over > T.float32(0.5), T.And(over == T.float32(0.5), odd))
    whole = T.bind(T.Select(up, below + T.float32(1), below))
    return T.bind(T.Select(x < T.float32(0), -whole, whole))


def divide(m: Machine, a: Any, b: Any) -> Any:
    """a / b rounded to the nearest: also where fast math takes less care, one step of Newton's with the exact rest."""
    quotient = m.keep(a / b, "float32")
    if m.language != "msl":
        return quotient
    rest = m.fma(T.float32(0) - quotient, b, a)
    return m.keep(m.fma(rest, T.float32(1) / b, quotient), "float32")
