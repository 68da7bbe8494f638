"""Products and lookups over quantized weights as plain loops, over the layout of GPUs; any machine can run them.

Numbers are read one by one as the formats say, from tables and by powers of two, and share nothing with the kernels but
where codes lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized import TABLES, Format
from llmc.ir.quantized_cache import LARGEST, TINY, code, number

from ..cpu.vector import Params
from ..gpu.machine import flat, i64, kernel, loop, widen
from ..gpu.quantized import pack
from ..gpu.quantized_layout import Layout

__all__ = ["expert_linear", "matmul", "pack", "take"]


def matmul(
    target: Any, columns: int, depth: int, *, format: Format, activation: str, out: str, rounded: int | None = None
) -> tvm.tirx.PrimFunc:
    """matmul(x, *packed, y): y [n, columns] = x [n, depth] @ W^T, x as round_activation(group=rounded) makes it."""
    return _product(None, columns, depth, format, activation, out, None, None, rounded)


def expert_linear(
    target: Any,
    experts: int,
    columns: int,
    depth: int,
    *,
    format: Format,
    activation: str,
    ids: str,
    bias: str | None = None,
    rounded: int | None = None,
) -> tvm.tirx.PrimFunc:
    """expert_linear(x, *packed, ids, (bias,) y): y[s] = x[s] @ W[ids[s]]^T + bias[ids[s]]."""
    return _product(experts, columns, depth, format, activation, activation, ids, bias, rounded)


def take(target: Any, rows: int, depth: int, *, format: Format, out: str, ids: str) -> tvm.tirx.PrimFunc:
    """take(*packed, ids, y): y[i] = W[ids[i]]."""
    layout = Layout(format, depth)
    params: Params = [*layout.tensors(rows), ("ids", ("n",), ids), ("y", ("n", depth), out)]

    def body(symbols: dict, *buffers: Any) -> None:
        *stored, numbers, y = buffers
        weight, y = _Weight(layout, stored), flat(y)
        with T.serial(T.int64(0), symbols["n"]) as i:
            row = T.bind(i64(numbers[i]))
            with loop(depth) as k:
                T.buffer_store(y, _narrow(weight.value(row, k), out), [i * depth + k])

    return kernel("take", params, body)


def _product(
    experts: int | None,
    columns: int,
    depth: int,
    format: Format,
    activation: str,
    out: str,
    ids: str | None,
    bias: str | None,
    rounded: int | None,
) -> tvm.tirx.PrimFunc:
    layout, lead = Layout(format, depth), () if experts is None else (experts,)
    params: list = [("x", ("n", depth), activation), *layout.tensors(columns, lead)]
    params += [("ids", ("n",), ids)] if ids else []
    params += [("bias", (*lead, columns), bias)] if bias else []
    params += [("y", ("n", columns), out)]

    def body(symbols: dict, *buffers: Any) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        weight = _Weight(layout, buffers[1 : 1 + len(layout.tensors(columns))])
        x, y = flat(named["x"]), flat(named["y"])
        added = flat(named["bias"]) if bias else None
        values, total = T.alloc_buffer((depth,), "float32"), T.alloc_buffer((1,), "float32")
        with T.serial(T.int64(0), symbols["n"]) as i:
            with loop(depth) as k:
                T.buffer_store(values, widen(x[i * depth + k]), [k])
            if rounded is not None:
                _round(values, depth, rounded or depth, activation, format.rounds)
            first = T.bind(i64(named["ids"][i]) * columns) if ids else T.int64(0)
            with loop(columns) as j:
                row = T.bind(first + i64(j))
                T.buffer_store(total, widen(added[row]) if added is not None else T.float32(0), [0])
                with loop(depth) as k:
                    T.buffer_store(total, total[0] + values[k] * weight.value(row, k), [0])
                T.buffer_store(y, _narrow(total[0], out), [i * columns + i64(j)])

    return kernel("product", params, body)


def _round(values: Any, depth: int, size: int, dtype: str, kind: str) -> None:
    """The row `values` as llmc.ir.quantized.round_activation says it, in groups of `size`."""
    units = LARGEST[kind]
    most = T.alloc_buffer((1,), "float32")
    with loop(depth // size) as group:
        T.buffer_store(most, T.float32(TINY), [0])
        with loop(size) as k:
            T.buffer_store(most, T.max(most[0], T.abs(values[group * size + k])), [0])
        with loop(size) as k:
            at = T.bind(group * size + k)
            near = _nearest(T.bind(values[at] * (T.float32(units) / most[0])), kind)
            value = T.bind(near * (most[0] * T.float32(float(np.float32(1 / units)))))
            T.buffer_store(values, widen(_narrow(value, dtype)), [at])


def _nearest(value: Any, kind: str) -> Any:
    """The integer or the E4M3 number nearest to float32 `value`."""
    return T.nearbyint(value) if kind == "int8" else number(kind, T.bind(code(kind, value)))


def _narrow(value: Any, dtype: str) -> Any:
    """A float32 value as an element of a flat buffer of that dtype."""
    if dtype != "bfloat16":
        return T.Cast(dtype, value)
    bits = T.bind(T.reinterpret("uint32", value))
    even = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    nan = T.bitwise_and(bits, T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
    rounded = T.shift_right(bits + even + T.uint32(0x7FFF), T.uint32(16))
    return T.Cast("uint16", T.Select(nan, T.uint32(0x7FC0), rounded))


class _Weight:
    """A stored weight, number by number."""

    def __init__(self, layout: Layout, stored: Any):
        self.layout, self.format = layout, layout.format
        self.codes, self.scales, *zeros = (flat(buffer) for buffer in stored)
        self.zeros = zeros[0] if zeros else None
        self.table = self._filled(TABLES[self.format.table]) if self.format.table else None

    @staticmethod
    def _filled(values: tuple[float, ...]) -> Any:
        table = T.alloc_buffer((len(values),), "float32")
        for i, value in enumerate(values):
            T.buffer_store(table, T.float32(value), [i])
        return table

    def value(self, row: Any, k: Any) -> Any:
        """float32: element k of a row, of all experts' rows."""
        f, base = self.format, row * self.layout.row_bytes
        code = T.bind(self.layout.code(k, lambda byte: T.Cast("int32", self.codes[base + i64(byte)])))
        group = T.bind(row * self.layout.groups + (i64(T.floordiv(k, f.group)) if f.group else 0))
        if self.table is not None:
            number = self.table[code]
        elif self.zeros is not None:
            number = T.Cast("float32", code - T.Cast("int32", self.zeros[group]))
        else:
            number = T.Cast("float32", code - f.offset)
        if f.scale != "e8m0":
            return T.bind(number * widen(self.scales[group]))
        exponent = T.bind(T.Cast("float32", self.scales[group]))
        power = T.Select(exponent == T.float32(255), T.float32(float("nan")), T.exp2(exponent - T.float32(127)))
        return T.bind(number * power)
