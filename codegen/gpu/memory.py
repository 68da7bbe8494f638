"""Memory of a GPU as kernels read and write it: tensors in runs, as float32; shared memory in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from .machine import BYTES, Machine, Registers, flat, widen


class Memory:
    """A tensor as flat memory: elements (bfloat16 as its bits in uint16), and words of 4 bytes."""

    def __init__(self, buffer: Any):
        self.dtype = str(buffer.dtype)
        self.buffer = buffer
        self.elements = flat(buffer)
        self.words = flat(buffer, "uint32")


class Halves:
    """A block's memory of 16-bit elements, uint16, that words of two are stored to.

    Through a view in words; but TVM takes a view of AMD's shared memory in another dtype for global memory, so there
    words are stored as the elements that they hold.
    """

    def __init__(self, m: Machine, buffer: Any):
        self.m, self.buffer = m, buffer
        size, scope = int(buffer.shape[0]), buffer.scope()
        self.view = None
        if m.language != "amdgpu":
            self.view = T.decl_buffer((size // 2,), "uint32", data=buffer.data, scope=scope)

    def put(self, element: Any, words: Registers, at: int, count: int) -> None:
        """Store `count` elements from words[at], … on in one access; `element` is a multiple of `count`."""
        if self.view is not None:
            self.m.put(self.view, element, "uint16", words, at, count)
        else:
            elements = T.reinterpret(f"uint16x{count}", words.buffer.vload([at], f"uint32x{count // 2}"))
            T.buffer_store(self.buffer, elements, [T.ramp(element, 1, count)])


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
