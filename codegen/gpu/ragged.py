"""Whose work a block does: sequences have ragged lengths, which stand in device memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Machine, i32, i64, loop, when

__all__ = ["sequence_of"]


def sequence_of(m: Machine, b: Any, begin: Callable[[Any], Any], item: Any) -> Any:
    """The one sequence s of 0 … b-1 with begin(s) <= item < begin(s + 1), or -1; the whole block must come here.

    begin(s), int32, never falls; items of a sequence that has none are no one's. The threads of the block look at a
    sequence each: two loads one after the other, however many sequences there are.
    """
    found = m.shared(1, "int32")
    with when(m.thread == 0):
        T.buffer_store(found, T.int32(-1), [0])
    m.barrier()
    with loop(i32(b) - m.thread, step=m.threads) as offset:
        s = T.bind(i64(offset + m.thread))
        with when(T.And(begin(s) <= item, item < begin(s + 1))):
            T.buffer_store(found, T.Cast("int32", s), [0])
    m.barrier()
    return T.bind(found[0])
