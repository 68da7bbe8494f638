"""Tensors in a GPU's memory as product kernels read and write them: in runs, as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from .machine import BYTES, Machine, flat, widen


class Memory:
    """A tensor as flat memory: elements (bfloat16 as its bits in uint16), and words of 4 bytes."""

    def __init__(self, buffer: Any):
        self.dtype = str(buffer.dtype)
        self.buffer = buffer
        self.elements = flat(buffer)
        self.words = flat(buffer, "uint32")


def store_run(m: Machine, to: Any, element: Any, values: Sequence[Any]) -> None:
    """Store float32 values to consecutive elements in one access; `element` is a multiple of their number."""
    if len(values) == 1:
        m.store(to, [element], values[0])
        return
    dtype = str(to.dtype)
    run = m.registers(len(values), dtype)
    for i, value in enumerate(values):
        run[i] = m.narrow(value, dtype)
    vector = run.buffer.vload([0], f"{dtype}x{len(values)}")
    T.buffer_store(to, vector, [T.ramp(element, 1, len(values))])


def load_run(m: Machine, source: Memory, element: Any, count: int) -> list[Any]:
    """`count` consecutive elements as float32, in as few accesses as can be; `element` is a multiple of `count`."""
    at_once = min(count, 16 // BYTES[source.dtype])
    words = m.registers(count * BYTES[source.dtype] // 4, "uint32")
    each = at_once * BYTES[source.dtype] // 4
    for i in range(count // at_once):
        m.fetch(source.words, element + i * at_once, source.dtype, words, i * each, at_once)
    return m.unpack(words, 0, source.dtype, count)


def load_guarded(m: Machine, source: Memory, base: Any, first: Any, stop: int, count: int) -> list[Any]:
    """Elements base + first, … of a row of `stop` elements that begins at `base` as float32; zero from `stop` on."""
    return [
        T.bind(T.if_then_else(first + i < stop, widened(source, base + first + i), T.float32(0))) for i in range(count)
    ]


def widened(source: Memory, element: Any) -> Any:
    """An element as a float32 expression: for use in a branch that is not always taken."""
    return widen(source.elements[element])
