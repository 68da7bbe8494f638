"""Products of quantized weights by integer dot products: four codes by four 8-bit activations in every 32-bit lane.

Activations become whole numbers, a group of a row at a time: N = round(x · M / max|x|), see quantized_activation.
  rounded        M = 127, one 8-bit term: what `llmc.ir.quantized.round_activation` says, the same N bit for bit.
  not rounded    M = 127 · 256, two 8-bit terms, N = 256 · high + low: x within max|x| / 65024 of its group, where
                 bfloat16 is within |x| / 512.
Sums of N · code are exact in 32 bits (modulo 2**32, and the sum of N · number fits), so only what scales meet is
rounded: once a segment, the longest run of k in which neither scale changes, in rising k. A group with an infinity or a
NaN has a scale that is none, which makes its row's outputs NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.errors import CompileError
from llmc.ir.quantized import Format
from llmc.targets import CpuTarget

from .quantized_activation import largest, pieces, reduce, whole
from .quantized_layout import STEP, QuantizedProduct
from .vector import Vector, choose, loop, scratch

OWN_GROUP = 128  # activations that share a scale where a weight's row is one group
UNROLLED = 16  # steps of a segment that are written out; longer segments are loops
# The sum of N · number, |number| < 256, stays below 2**31.
LONGEST = {1: 32768, 2: 256}

# Twice the values of E2M1 are whole numbers; 12 more makes them codes of a zero at 12.
_E2M1_CODES = (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)


def has_dots(target: CpuTarget) -> bool:
    """The target multiplies unsigned by signed bytes and sums fours of them (vpdpbusd)."""
    return "avx512_vnni" in target.features or "avx_vnni" in target.features


def takes(target: CpuTarget, depth: int, format: Format, rounded: int | None) -> bool:
    """Whether there is a product by dots for this: see DotProduct."""
    if not has_dots(target) or format.table not in ("", "e2m1"):
        return False
    return not rounded or rounded % STEP == 0


@dataclass(frozen=True, kw_only=True)
class DotProduct(QuantizedProduct):
    """A product with a quantized weight by integer dots."""

    def __post_init__(self):
        if self.rounded and self.depth % self.rounded:
            raise CompileError(
                f"activations in groups of {self.rounded}: expected rows of whole groups, found rows of {self.depth}"
            )

    @property
    def llvm_text(self) -> str:
        return e2m1_text(self.target.lanes) if self.format.table else ""

    @property
    def terms(self) -> int:
        """8-bit terms of an activation."""
        return 2 if self.rounded is None else 1

    @property
    def group(self) -> int:
        """Activations that share a scale; the last group of a row may be shorter."""
        if self.rounded is not None:
            return self.rounded or self.depth
        return math.gcd(self.format.group, OWN_GROUP) if self.format.group else min(OWN_GROUP, self.depth)

    @property
    def groups(self) -> int:
        return -(-self.depth // self.group)

    @property
    def segment(self) -> int:
        """k in which no scale changes; the last segment of a row may be shorter."""
        return min(math.gcd(self.format.group or self.group, self.group), LONGEST[self.terms])

    @property
    def segments(self) -> int:
        return -(-self.depth // self.segment)

    @property
    def offset(self) -> int | None:
        """The code of zero; None where every group has its own."""
        if self.format.zeros:
            return None
        return 12 if self.format.table else self.format.offset

    @property
    def stride(self) -> int:
        """Words of a row in a block: a line more than the steps, so that rows do not meet in one set of the cache."""
        return -(-self.layout.steps // 16) * 16 + 16

    @property
    def row_bytes(self) -> int:
        return 4 * (self.stride * self.terms + self.groups + self.segments)

    @property
    def weight_varies(self) -> bool:
        """A row of the weight has several scales."""
        return self.format.groups(self.depth) > 1

    @property
    def sums(self) -> bool:
        """Segments are summed in float32."""
        return self.segments > 1

    @property
    def block(self) -> int:
        """Rows of a full block: sums of every term and of segments leave registers for the panel's codes and scales."""
        registers = self.target.vector_registers - (8 if self.target.vector_registers > 16 else 5)
        return max(1, registers // self.layout.vectors // (self.terms + (1 if self.sums else 0)))

    def blocks(self, rows: Any) -> tuple[Any, ...]:
        """Scratch for rows: words of each term [row][stride], scales [row][groups], and what sums begin with
        [row][segments]: minus the sum of N, times the offset if there is one.
        """
        padded = rows + self.block
        words = [scratch([padded * self.stride], "int32") for _ in range(self.terms)]
        return (*words, scratch([padded * self.groups], "float32"), scratch([padded * self.segments], "int32"))

    def copy_block(self, x: Any, blocks: Any, source: Callable[[Any], Any], base: Any, rows: Any) -> None:
        *words, scales, sums = blocks
        with loop(0, self.padded(rows)) as r:
            to = T.bind(base + r)

            def copy(to: Any = to, r: Any = r) -> None:
                row = T.bind(source(r))
                full, rest = divmod(self.depth, self.group)
                with loop(0, full) as g:
                    self._round(x, words, scales, sums, row, to, g, self.group)
                if rest:
                    self._round(x, words, scales, sums, row, to, T.int64(full), rest)
                for term in words:
                    for at in range(-(-self.depth // STEP), self.layout.steps):
                        T.buffer_store(term, T.int32(0), [to * self.stride + at])

            def zero(to: Any = to) -> None:
                for term in words:
                    with loop(0, self.layout.steps) as at:
                        T.buffer_store(term, T.int32(0), [to * self.stride + at])
                with loop(0, self.groups) as g:
                    T.buffer_store(scales, T.float32(0), [to * self.groups + g])
                with loop(0, self.segments) as g:
                    T.buffer_store(sums, T.int32(0), [to * self.segments + g])

            choose([(r < rows, copy)], zero)

    def _round(self, x: Any, words: list, scales: Any, sums: Any, row: Any, to: Any, g: Any, size: int) -> None:
        """Emit: group g of a row, `size` activations, as whole numbers at row `to` of the block."""
        lanes = self.target.lanes
        start = T.bind(g * self.group)
        wide = Vector(lanes)
        factor, scale = largest(x, row, start, size, lanes, 127.0 * 256 ** (self.terms - 1))
        T.buffer_store(scales, scale, [to * self.groups + g])

        def segment(first: Any, index: Any, size: int) -> None:
            total, rest = wide.register(wide.iconst(0), "int32"), Vector(1).register(T.int32(0), "int32")

            def put(at: Any, width: int) -> None:
                v = Vector(width)
                n = whole(v, v.load(x, [row, first + at]), factor)
                if width == lanes:
                    total.set(total.get() + n)
                else:
                    rest.set(rest.get() + reduce(v, "add", n))
                high = T.bind(T.shift_right(n + v.iconst(128), v.iconst(8))) if self.terms == 2 else n
                for term, value in zip(words, (high, n), strict=False):
                    store(term, value, at, width)

            def store(term: Any, value: Any, at: Any, width: int) -> None:
                index = to * self.stride + T.floordiv(first + at, T.int64(STEP))
                if width >= STEP:
                    packed = T.reinterpret(
                        Vector(width // STEP).dtype("int32"), T.Cast(Vector(width).dtype("int8"), value)
                    )
                    T.buffer_store(term, packed, [T.ramp(index, 1, width // STEP) if width > STEP else index])
                else:  # an odd end of the row: byte by byte into a word of zeros
                    byte = T.bitwise_and(value, T.int32(255))
                    place = int(at) % STEP
                    before = T.int32(0) if place == 0 else term[index]
                    T.buffer_store(term, T.bitwise_or(before, T.shift_left(byte, T.int32(8 * place))), [index])

            pieces(size, lanes, put)
            all = rest.get() + reduce(wide, "add", total.get()) if size >= lanes else rest.get()
            less = T.int32(0) - all * T.int32(1 if self.offset is None else self.offset)
            T.buffer_store(sums, less, [to * self.segments + index])

        full, rest = divmod(size, self.segment)
        before = T.bind(T.floordiv(start, T.int64(self.segment)))
        with loop(0, full) as s:
            segment(T.bind(start + s * self.segment), before + s, self.segment)
        if rest:
            segment(T.bind(start + full * self.segment), before + full, rest)

    def multiply(self, blocks: Any, w: Sequence[Any], lead: list[Any], p: Any, base: Any, rows: Any, tile: Any) -> None:
        *terms, x_scales, x_sums = blocks
        layout = self.layout
        words, w_scales, zeros = layout.views(list(w))
        v = Vector(layout.lanes)
        vectors = range(layout.vectors)

        def weight_scales(g: Any) -> list[Any]:
            found = [layout.scale(w_scales, [*lead, p, g, j, 0], v) for j in vectors]
            return [T.bind(s * v.const(0.5)) for s in found] if self.format.table else found

        def micro(size: int, first: Any) -> None:
            row = [T.bind(base + first + r) for r in range(size)]
            at = [T.bind(r * self.stride) for r in row]
            result = [[v.register(v.const(0.0)) for _ in vectors] for _ in range(size)] if self.sums else None

            def segment(s: Any, size_of_segment: int) -> list[list[Any]]:
                """The sums of a segment [row][vector], int32."""
                chains = 2 if size * len(terms) == 1 else 1  # of a single sum: it would wait for its own last dot
                sums = [[[v.register(dtype="int32") for _ in vectors] for _ in range(size)] for _ in terms]
                others = [[v.register(v.iconst(0), "int32") for _ in vectors] for _ in range(chains - 1)]
                zero = None
                if zeros is not None:
                    g = T.floordiv(s * self.segment, T.int64(self.format.group or self.depth))
                    zero = [T.bind(T.Cast(v.i32, zeros.vload([*lead, p, g, j, 0], v.dtype("uint8")))) for j in vectors]
                for r in range(size):
                    total = T.bind(x_sums[row[r] * self.segments + s])
                    for j in vectors:
                        for term in sums[:-1]:
                            term[r][j].set(v.iconst(0))
                        if zero is not None:
                            sums[-1][r][j].set(zero[j] * v.broadcast(total))
                        else:
                            sums[-1][r][j].set(v.broadcast(total))
                count = -(-size_of_segment // STEP)
                base_step = T.bind(s * (self.segment // STEP)) if self.sums else T.int64(0)
                aligned = not self.sums or self.segment // STEP % layout.together == 0

                def steps(begin: Any, many: int, aligned: bool) -> None:
                    for i in range(many):
                        codes = [self._codes(layout.step(words, lead, p, begin, i, j, aligned)) for j in vectors]
                        for term, term_sums in zip(terms, sums, strict=True):
                            for r in range(size):
                                a = T.bind(v.broadcast(term[at[r] + begin + i]))
                                to = others[0] if i % chains else term_sums[r]
                                for j in vectors:
                                    to[j].set(self._dot(codes[j], a, to[j].get()))

                if count <= UNROLLED:
                    steps(base_step, count, aligned)
                else:
                    unroll = max(4, layout.together)
                    with loop(0, count // unroll) as i:
                        steps(T.bind(base_step + i * unroll), unroll, aligned)
                    if count % unroll:
                        steps(T.bind(base_step + count // unroll * unroll), count % unroll, aligned)
                for other in others:
                    for j in vectors:
                        sums[0][0][j].set(sums[0][0][j].get() + other[j].get())
                return [
                    [
                        T.bind(T.shift_left(sums[0][r][j].get(), v.iconst(8)) + sums[1][r][j].get())
                        if len(terms) == 2
                        else sums[0][r][j].get()
                        for j in vectors
                    ]
                    for r in range(size)
                ]

            def row_scale(r: int, g: Any) -> Any:
                return v.broadcast(T.bind(x_scales[row[r] * self.groups + g]))

            def add(s: Any, size_of_segment: int) -> None:
                assert result is not None
                found = segment(s, size_of_segment)
                scales = None
                if self.weight_varies:
                    scales = weight_scales(T.floordiv(s * self.segment, T.int64(self.format.group)))
                for r in range(size):
                    g = T.floordiv(s * self.segment, T.int64(self.group))
                    factor = row_scale(r, g) if self.groups > 1 else None
                    for j in vectors:
                        both = factor if scales is None else scales[j] if factor is None else T.bind(scales[j] * factor)
                        value = T.Cast(v.f32, found[r][j])
                        old = result[r][j].get()
                        result[r][j].set(old + value if both is None else v.fma(value, both, old))

            if result is not None:
                full, rest = divmod(self.depth, self.segment)
                with loop(0, full) as s:
                    add(s, self.segment)
                if rest:
                    add(T.int64(full), rest)
                values = [[result[r][j].get() for j in vectors] for r in range(size)]
            else:
                values = [[T.Cast(v.f32, x) for x in row] for row in segment(T.int64(0), self.depth)]
            scales = None if self.weight_varies else weight_scales(T.int64(0))
            for r in range(size):
                factor = row_scale(r, T.int64(0)) if self.groups == 1 else None
                for j in vectors:
                    both = factor if scales is None else scales[j] if factor is None else T.bind(scales[j] * factor)
                    value = values[r][j]
                    v.store(tile, value if both is None else value * both, [first + r, T.int64(j * v.lanes)])

        self.by_block(rows, micro)

    def _codes(self, bytes: Any) -> Any:
        """Unsigned bytes whose numbers are those of the codes in `bytes`, but for an offset."""
        if not self.format.table:
            return bytes
        return T.bind(T.call_extern(f"int32x{self.target.lanes}", "llmc_e2m1", bytes))

    def _dot(self, codes: Any, a: Any, sums: Any) -> Any:
        """sums + the products of four unsigned codes and four signed activations in every lane."""
        lanes = self.target.lanes
        eights = f"int8x{4 * lanes}"
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        arguments = (sums, T.reinterpret(eights, codes), T.reinterpret(eights, a))
        return T.bind(T.call_llvm_pure_intrin(f"int32x{lanes}", name, *arguments))


def e2m1_text(lanes: int) -> str:
    """LLVM text of llmc_e2m1(codes): bytes below 16, each replaced by its entry of a table."""
    bytes, words = f"<{4 * lanes} x i8>", f"<{lanes} x i32>"
    shuffle = {16: "llvm.x86.avx512.pshuf.b.512", 8: "llvm.x86.avx2.pshuf.b"}[lanes]
    table = ", ".join(f"i8 {_E2M1_CODES[i % 16]}" for i in range(4 * lanes))
    return f"""
declare {bytes} @{shuffle}({bytes}, {bytes})
define linkonce_odr {words} @llmc_e2m1({words} %codes) alwaysinline {{
  %at = bitcast {words} %codes to {bytes}
  %found = call {bytes} @{shuffle}({bytes} <{table}>, {bytes} %at)
  %r = bitcast {bytes} %found to {words}
  ret {words} %r
}}
"""
