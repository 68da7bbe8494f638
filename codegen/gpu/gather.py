"""Rows of a weight by number: the embedding of tokens."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import GpuTarget

from ..cpu.vector import Params
from .machine import BYTES, Machine, flat, i64, kernel, loop, when, whole, widen

__all__ = ["take"]

THREADS = 128  # of a block: 2 KB of a row in one round of 16-byte accesses


def take(
    target: GpuTarget,
    rows: int,
    depth: int,
    *,
    weight: str = "float32",
    out: str = "float32",
    packed: bool = False,
    ids: str = "int32",
    name: str = "take",
) -> tvm.tirx.PrimFunc:
    """y[i] = W[ids[i]] for a weight W [rows, depth], so that an embedding tied to the head is stored once.

    Arguments of the PrimFunc, in this order:
      w: [rows, depth] weight, or, if `packed`, with rows padded to whole 16 bytes;
      ids [n] of dtype `ids`, each in 0 … rows-1; y [n, depth] out. n may be 0.
    weight, out: "float32", "float16" or "bfloat16"; rounded to nearest even where out is narrower.
    """
    unit = 16 // BYTES[weight]
    stride = -(-depth // unit) * unit if packed else depth
    params: Params = [("w", (rows, stride), weight), ("ids", ("n",), ids), ("y", ("n", depth), out)]
    at_once = min(whole(stride, weight), whole(depth, out))
    wide = at_once * min(BYTES[weight], BYTES[out]) >= 4

    def body(symbols: dict, w: Any, ids: Any, y: Any) -> None:
        m = Machine(target)
        w, y = (flat(buffer, "uint32" if wide else None) for buffer in (w, y))
        with when(symbols["n"] > 0), m.launch([symbols["n"]], THREADS) as [i]:
            number = m.keep(i64(ids[i64(i)]), "int64")
            source, result = m.registers(4, "uint32"), m.registers(4, "uint32")
            with loop(depth // at_once - m.thread, step=THREADS) as offset:
                column = T.bind((offset + m.thread) * at_once)
                old, new = T.bind(number * stride + column), T.bind(i64(i) * depth + column)
                if not wide:
                    m.store(y, [new], widen(w[old]))
                elif weight == out:
                    m.fetch(w, old, weight, source, 0, at_once)
                    m.put(y, new, out, source, 0, at_once)
                else:
                    m.fetch(w, old, weight, source, 0, at_once)
                    m.pack(m.unpack(source, 0, weight, at_once), out, result, 0)
                    m.put(y, new, out, result, 0, at_once)

    return kernel(name, params, body)
