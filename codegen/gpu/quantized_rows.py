"""Rows of codes, decoded in a thread's registers.

An integer code becomes float32 without a conversion: its bits, wherever they stand below bit 23 of a word, are the low
bits of a mantissa whose exponent says that the lowest of them is one; that and the zero point are then subtracted, both
exactly. Values of 4-bit tables are looked up in shared memory: 16 words, all on different banks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from llmc.ir.quantized import TABLES

from .machine import Machine, Registers, when, widen
from .memory import Memory
from .quantized_layout import SCALE_BYTES, STEP, Layout

__all__ = ["QuantizedRows"]

Piece = tuple[Memory, Any, int, int]  # of a run: tensor, its first word there, its first register, their number
EXACT = 23  # bits of a float32 mantissa


def words_of_run(layout: Layout, run: int, codes_only: bool = False) -> tuple[int, int, int, int]:
    """Of a run of so many elements: elements that share a scale; words of codes, of scales, of zero points.

    codes_only: without scales.
    """
    f = layout.format
    if not f.group:
        return run, run * f.bits // 32, 0, 0
    part = min(f.group, run)
    scales = 0 if codes_only else max(1, run // part * SCALE_BYTES[f.scale] // 4)
    return part, run * f.bits // 32, scales, int(f.zeros)


class QuantizedRows:
    """See llmc.codegen.gpu.weight_rows.WeightRows. memories: of Layout.tensors; most: elements of a run.

    codes_only: a run comes without its scales, for `bytes_run`.
    """

    step = STEP

    def __init__(
        self, machine: Machine, layout: Layout, memories: Sequence[Memory], most: int = 32, codes_only: bool = False
    ):
        self.machine, self.layout, self.format = machine, layout, layout.format
        self.memories = tuple(memories)
        self.codes, self.scales, *zeros = memories
        self.zeros = zeros[0] if zeros else None
        self.run = layout.run(most)
        self.scaled, self.rows_scaled = self.format.group > 0, self.format.group == 0
        sizes = words_of_run(layout, self.run, codes_only)
        self.part, self.code_words, self.scale_words, self.zero_words = sizes
        self.words = self.code_words + self.scale_words + self.zero_words
        self.per_word = 4 // SCALE_BYTES[self.format.scale]
        self.looked_up = bool(self.format.table) and self.format.bits == 4
        self.table = len(TABLES[self.format.table]) if self.looked_up else 0
        self.values: Any = None

    def prepare(self, shared: Any) -> None:
        self.values = shared
        if not self.looked_up:
            return
        m = self.machine
        with when(m.thread < self.table):
            own = m.registers(1)
            own.fill(0)
            for i, value in enumerate(TABLES[self.format.table]):
                own[0] = T.Select(m.thread == i, m.number(value), own[0])
            T.buffer_store(shared, own[0], [m.thread])
        m.barrier()

    def start(self, row: Any) -> tuple[Any, Any, Any]:
        """First words of its codes, number of its first group, and its zero point where it has one for all."""
        codes, groups = T.bind(row * (self.layout.row_bytes // 4)), T.bind(row * self.layout.groups)
        zero = None
        if self.rows_scaled and self.zeros:
            zero = T.bind(T.Cast("float32", self.zeros.elements[groups]))
        return codes, groups, zero

    def pieces(self, start: Any, k: Any) -> list[Piece]:
        """The words of a run."""
        codes, groups, _ = start
        if self.format.bits == 3:
            high = self.layout.stored_depth // 16
            found = [
                (self.codes, codes + T.floordiv(k, 16), 0, 2),
                (self.codes, codes + high + T.floordiv(k, 32), 2, 1),
            ]
        else:
            found = [(self.codes, codes + T.floordiv(k, 32 // self.format.bits), 0, self.code_words)]
        if self.scaled:
            group = T.bind(groups + T.floordiv(k, self.format.group))
            if self.scale_words:
                found.append((self.scales, T.floordiv(group, self.per_word), self.code_words, self.scale_words))
            if self.zeros:
                found.append((self.zeros, T.floordiv(group, 4), self.code_words + self.scale_words, 1))
        return found

    def fetch(self, held: Registers, at: int, start: Any, k: Any) -> None:
        for memory, word, first, count in self.pieces(start, k):
            once = memory is self.codes
            self.machine.fetch(memory.words, word, "uint32", held, at + first, count, once=once)

    def numbers(self, held: Registers, at: int, start: Any, k: Any, first: int) -> list[Any]:
        zero = start[2]
        if self.zero_words:
            word = held[at + self.code_words + self.scale_words]
            zero = T.bind(T.Cast("float32", self._field(word, 8, self._place(k, first // self.part, 4))))
        if self.format.bits == 3:
            low, high = held[at + first // 16], held[at + 2]
            return self._three(low, first % 16 * 2, high, first, zero, STEP)
        count = 32 // self.format.bits
        words = [held[at + (first + i) // count] for i in range(0, STEP, count)]
        return [value for word in words for value in self._decoded(word, zero, count)]

    def scale(self, held: Registers, at: int, k: Any, part: int) -> Any:
        parts = self.run // self.part
        if parts >= self.per_word:
            word, place = held[at + self.code_words + part // self.per_word], T.int64(part % self.per_word)
        else:
            word, place = held[at + self.code_words], self._place(k, part, self.per_word)
        bits = 32 // self.per_word
        return self._scale(word if bits == 32 else self._field(word, bits, place))

    def row_scale(self, row: Any) -> Any:
        return self.scale_at(row)

    def few(self, start: Any, k: Any, count: int) -> list[Any]:
        codes, groups, zero = start
        bits = self.format.bits
        group = T.bind(groups + T.floordiv(k, self.format.group)) if self.scaled else None
        if self.scaled and self.zeros:
            zero = T.bind(T.Cast("float32", self.zeros.elements[group]))

        def word(index: Any, shift: Any = None) -> Any:
            found = T.bind(self.codes.words[codes + index])
            return found if shift is None else T.bind(T.shift_right(found, T.Cast("uint32", shift)))

        quarter = T.floordiv(k, 4)
        if bits == 8:
            values = self._decoded(word(quarter), zero, count)
        elif bits == 4:
            values = self._decoded(word(T.floordiv(k, 8), T.floormod(quarter, 2) * 8), zero, count)
        else:
            low = word(T.floordiv(k, 16), T.floormod(quarter, 4) * 8)
            high = word(self.layout.stored_depth // 16 + T.floordiv(k, 32), T.floormod(quarter, 8) * 4)
            values = self._three(low, 0, high, 0, zero, count)
        if not self.scaled:
            return values
        scale = self.scale_at(group)
        return [T.bind(value * scale) for value in values]

    def scaled_run(self, held: Registers, at: int, start: Any, k: Any) -> list[list[Any]]:
        """A run as float32, scaled but for what rows have, in steps."""
        found = []
        for first in range(0, self.run, STEP):
            values = self.numbers(held, at, start, k, first)
            if self.scaled:
                scale = self.scale(held, at, k, first // self.part)
                values = [T.bind(value * scale) for value in values]
            found.append(values)
        return found

    def bytes_run(self, held: Registers, at: int, start: Any, k: Any) -> Registers:
        """A run of 4-bit codes as signed bytes, code less its zero, four a word in the order of Layout.byte_place."""
        u, found = T.uint32, self.machine.registers(self.run // 4, "uint32")
        zero: Any = u(self.format.offset * 0x01010101)
        if self.zero_words:
            zero = self._field(held[at + self.code_words + self.scale_words], 8, self._place(k, 0, 4)) * u(0x01010101)
        elif self.zeros:
            zero = T.Cast("uint32", start[2]) * u(0x01010101)
        zero = T.bind(zero)
        for i in range(self.run // 8):
            for j, word in enumerate((held[at + i], T.shift_right(held[at + i], u(4)))):
                # 128 + code - zero borrows nothing from its neighbours; less 128, it is signed.
                raised = self.machine.masked(word, 0x0F0F0F0F, 0x80808080)
                found[2 * i + j] = T.bitwise_xor(raised - zero, u(0x80808080))
        return found

    # Words

    def _place(self, k: Any, part: int, per_word: int) -> Any:
        """The place, in a word of so many, of what a part's group has: groups of a run don't cross words."""
        parts = self.run // self.part
        if parts >= per_word:
            return T.int64(part % per_word)
        return T.floormod(T.floordiv(k, self.format.group), per_word) + part

    def _field(self, word: Any, bits: int, place: Any) -> Any:
        """Bits `place` · bits … of a word."""
        shifted = T.shift_right(word, T.Cast("uint32", place * bits))
        return T.bind(T.bitwise_and(shifted, T.uint32((1 << bits) - 1)))

    def _scale(self, bits: Any) -> Any:
        """A scale of its bits."""
        kind = self.format.scale
        if kind == "float32":
            return T.bind(T.reinterpret("float32", bits))
        if kind == "float16":
            return T.bind(T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits))))
        if kind == "bfloat16":
            return T.bind(T.reinterpret("float32", T.shift_left(bits, T.uint32(16))))
        ends = T.Select(bits == 0, T.uint32(1 << 22), T.uint32(0x7FC00000))  # 2**-127, NaN
        inside = T.And(bits != 0, bits != 255)
        return T.bind(T.reinterpret("float32", T.Select(inside, T.shift_left(bits, T.uint32(23)), ends)))

    def scale_at(self, group: Any) -> Any:
        """The scale at an index, int64, of all scales."""
        if self.format.scale == "e8m0":
            return self._scale(T.bind(T.Cast("uint32", self.scales.elements[group])))
        return T.bind(widen(self.scales.elements[group]))

    # Codes

    def _decoded(self, word: Any, zero: Any, count: int) -> list[Any]:
        """Codes 0 … count-1 of a word of 4- or 8-bit codes."""
        bits = self.format.bits
        low = T.bind(word)
        high = T.bind(T.shift_right(low, T.uint32(16)))
        if bits == 8:
            places = [((low, high)[i // 2], i % 2 * 8) for i in range(count)]
        else:  # nibbles 0 2 4 6 of the low half-word and 1 3 5 7 of the high one
            places = [((low, high)[i % 2], i // 2 * 4) for i in range(count)]
        return [self._number(source, place, zero) for source, place in places]

    def _three(self, low: Any, low_bit: int, high: Any, high_bit: int, zero: Any, count: int) -> list[Any]:
        u, found = T.uint32, []
        for i in range(count):
            two = T.bitwise_and(T.shift_right(low, u(low_bit + 2 * i)), u(3))
            one = T.bitwise_and(T.shift_right(high, u(high_bit + i)), u(1))
            found.append(self._number(T.bind(T.bitwise_or(two, T.shift_left(one, u(2)))), 0, zero))
        return found

    def _number(self, word: Any, place: int, zero: Any) -> Any:
        """What the code at bit `place` of a word stands for; `place` and its bits are within 23."""
        bits, m = self.format.bits, self.machine
        mask = ((1 << bits) - 1) << place
        if self.format.table:
            code = T.bind(T.shift_right(T.bitwise_and(word, T.uint32(mask)), T.uint32(place)))
            return T.bind(self.values[T.Cast("int32", code)]) if self.looked_up else self._e4m3(code)
        one = 2.0 ** (EXACT - place)  # the number whose mantissa counts ones from bit `place`
        found = T.reinterpret("float32", m.masked(word, mask, int(np.float32(one).view(np.uint32))))
        if zero is not None:
            return T.bind(found - T.bind(zero + m.number(one)))
        return T.bind(found - m.number(one + self.format.offset))

    def _e4m3(self, code: Any) -> Any:
        """E4M3: sign, four bits of exponent, bias 7, three of mantissa; no number that float32 calls subnormal on the
        way, as some machines take those for 0.
        """
        u, m = T.uint32, self.machine
        size = T.bind(T.bitwise_and(code, u(127)))
        # The exponent 1 + m/8 times 2**-7 of a subnormal, m/8 times 2**-6, is twice as much less 2**-6.
        raised = T.bind(T.reinterpret("float32", T.shift_left(size, u(20)) + u(120 << 23)))
        number = T.Select(size < u(8), m.fma(raised, T.float32(2), m.number(-(2.0**-6))), raised)
        bits = T.bitwise_or(T.reinterpret("uint32", number), T.shift_left(T.bitwise_and(code, u(128)), u(24)))
        return T.bind(T.reinterpret("float32", T.Select(size == u(127), u(0x7FC00000), bits)))
