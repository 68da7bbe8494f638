"""Rows of a weight by number: the embedding of tokens."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format
from llmc.targets import GpuTarget

from ..cpu.vector import Params
from .machine import BYTES, Machine, flat, i64, kernel, loop, when, whole, widen
from .memory import Memory
from .quantized_layout import STEP, Layout
from .quantized_rows import QuantizedRows

__all__ = ["take", "take_quantized"]

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


def take_quantized(
    target: GpuTarget, rows: int, depth: int, *, format: Format, out: str, ids: str, name: str = "take"
) -> tvm.tirx.PrimFunc:
    """y[i] = W[ids[i]] for a weight W [rows, depth] of a format: its numbers as dequantize says, rounded to `out`.

    Arguments of the PrimFunc: the tensors of quantized_layout.Layout; ids [n] of dtype `ids`; y [n, depth] out.
    """
    layout = Layout(format, depth, target.name)
    stored = layout.tensors(rows)
    params: Params = [*stored, ("ids", ("n",), ids), ("y", ("n", depth), out)]
    words = STEP * BYTES[out] // 4
    run = layout.run(STEP)

    def body(symbols: dict, *buffers: Any) -> None:
        m = Machine(target)
        *parts, numbers, y = buffers
        elements, wide = flat(y), flat(y, "uint32")
        with when(symbols["n"] > 0), m.launch([symbols["n"]], THREADS) as [i]:
            weight = QuantizedRows(m, layout, [Memory(b) for b in parts], STEP)
            if weight.table:
                weight.prepare(m.shared(weight.table))
            row = m.keep(i64(numbers[i64(i)]), "int64")
            start = weight.start(row)
            scale = weight.row_scale(row) if weight.rows_scaled else None
            held, result = m.registers(weight.words, "uint32"), m.registers(words, "uint32")
            with loop(-(-depth // run) - m.thread, step=THREADS) as offset:
                first = T.bind(i64(offset + m.thread) * run)
                weight.fetch(held, 0, start, first)
                for step, values in enumerate(weight.scaled_run(held, 0, start, first)):
                    if scale is not None:
                        values = [T.bind(value * scale) for value in values]
                    column = T.bind(first + step * STEP)
                    new = T.bind(i64(i) * depth + column)
                    if depth % STEP:
                        for e, value in enumerate(values):
                            with when(column + e < depth):
                                m.store(elements, [new + e], value)
                        continue
                    m.pack(values, out, result, 0)
                    with when(column < depth):
                        for at in range(0, words, 4):
                            m.put(wide, T.bind(T.floordiv(new * BYTES[out], 4) + at), "uint32", result, at, 4)

    return kernel(name, params, body)
