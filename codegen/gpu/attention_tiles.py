"""Attention on matrix units: tiles of query vectors against tiles of tokens in shared memory.

A warp has sixteen query vectors, or twice as many, whose weighted sums of values stay in its registers. A query vector
is one head of one row: the heads that share a key head are rows of one tile. In prefill warps have vectors of their own
and read the same tokens; in decoding all have the same vectors, and each takes sixteen tokens of a tile.

Keys of the next tile are on their way while values are weighed, values while scores are computed: each has one place in
shared memory, which is free when the other's barrier is passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_parts import Asked, Finish, Memory, Operands, Parts, Tile
from .attention_units import SIDE, Unit, unit_of
from .machine import Machine, flat, i64, loop, when
from .memory import Halves

__all__ = ["Tiling", "attend"]

WARPS = 4
HIDDEN = -1e30  # a product of a token that is not seen
NOTHING = -1e25  # a peak before the first product
FEW_HEADS = 4  # of a key head: fewer need less arithmetic a byte than lanes have
PIECE = 8  # elements of an access of 16 bytes


@dataclass(frozen=True)
class Tiling:
    """How the work of a block is cut.

    rows × heads: its query vectors, `sides` times sixteen a warp at most; tokens: of a tile.
    apart: warps share out the tokens, not the vectors.
    """

    rows: int
    heads: int
    sides: int
    tokens: int
    warps: int
    apart: bool

    @staticmethod
    def of(asked: Asked, *, decode: bool) -> Tiling | None:
        """None where the target has no unit for it, a vector's sums don't fit in registers, or lanes do it as fast."""
        target = asked.target
        widest = max(asked.head_dim, asked.v_dim)
        if target.matrix_unit not in ("mma", "mfma", "wmma", "wmma12") or asked.dtype not in target.dtypes:
            return None
        if asked.latent or asked.head_dim % PIECE or asked.v_dim % PIECE or widest > 256:
            return None
        if decode and asked.group < FEW_HEADS:
            return None
        # A third of a multiprocessor's shared memory, so that a block computes while others wait.
        room = min(target.shared_bytes, target.shared_per_multiprocessor // 3) - 1024
        each = (row_stride(asked.head_dim) + row_stride(asked.v_dim)) * 2
        if asked.cache and decode:  # codes pass through registers, and sums of decoding have a place of their own
            each += sides_of(asked.v_dim) * SIDE * 4
        tokens = 64
        while tokens > SIDE and tokens * each > room:
            tokens //= 2
        warps = tokens // SIDE if decode else WARPS
        sides = 2 if widest <= 64 and not decode else 1
        vectors = SIDE if decode else warps * sides * SIDE
        heads = -(-asked.group // -(-asked.group // vectors))
        return Tiling(vectors // heads, heads, sides, tokens, warps, decode)

    def step(self, warp: int) -> int:
        """Tokens that a block takes at once."""
        return self.tokens

    def parts(self, asked: Asked) -> int:
        """Blocks that share the query heads of one key head."""
        return -(-asked.group // self.heads)


def sides_of(width: int) -> int:
    """How many sixteens cover a width."""
    return -(-width // SIDE)


def row_stride(width: int) -> int:
    """Elements from one row in shared memory to the next: 16 bytes more than whole sixteens of columns.

    So rows begin 4 banks apart, an odd number of times: eight rows of 16 bytes lie in all 32 banks.
    """
    return sides_of(width) * SIDE + PIECE


def attend(m: Machine, asked: Asked, cut: Tiling, o: Operands, tile: Tile, kv_head: Any, part: Any,
           finish: Finish) -> None:  # fmt: skip
    """Emit one block's work on a tile for one part of the heads of a key head; finish says where columns go."""
    _Attend(m, asked, cut, o, tile, kv_head, part).emit(finish)


class _Copy:
    """A tile of keys or of values on its way from the pool to shared memory.

    Codes of a quantized cache become numbers on the way. Every code is a number of 16 bits, and keys stay what their
    codes say: `factors` [tokens] in shared memory are for their scores. Values are multiplied by their scale, and
    rounded as values of a cache in their own dtype are: weights times scales could be too small for 16 bits.
    """

    def __init__(
        self, attend: _Attend, pool: Any, scales: Any, width: int, place: Any, base: int, *, scaled: bool = False
    ):
        self.attend, self.m, self.width, self.stride = attend, attend.m, width, row_stride(width)
        self.tokens, self.threads = attend.cut.tokens, attend.cut.warps * attend.m.warp
        self.across = width // PIECE
        self.rounds = -(-self.tokens * self.across // self.threads)
        size = self.tokens * self.stride
        self.shared, self.base = (place, base) if place is not None else (self.m.shared(size, "uint16"), 0)
        self.async_copy = attend.async_copy
        self.pool = flat(pool, "uint16") if self.async_copy else flat(pool, "uint32")
        if not self.async_copy:
            self.halves = Halves(self.m, self.shared)
        self.memory: Any = None  # of codes
        self.factors: Any = None
        self.scales = scales
        if scales is not None:
            self.memory = Memory(self.m, pool, attend.asked.stored, PIECE)
            self.coming, self.scale = self.memory.registers(self.rounds), self.m.registers(self.rounds)
            self.factors = None if scaled else self.m.shared(self.tokens)
        elif not self.async_copy:
            self.coming = self.m.registers(self.rounds * 4, "uint32")
        self.clear()

    def clear(self) -> None:
        """Zeros between the width and whole sixteens: they are multiplied too."""
        missing = sides_of(self.width) * SIDE - self.width
        if missing:
            with loop(self.tokens * missing - self.m.thread, step=self.threads) as offset:
                i = T.bind(offset + self.m.thread)
                row, column = T.floordiv(i, T.int32(missing)), T.floormod(i, T.int32(missing))
                T.buffer_store(self.shared, T.uint16(0), [self.base + row * self.stride + self.width + column])

    def pieces(self, emit: Callable[[int, Any, Any], None]) -> None:
        """emit(i, row of the tile, column) for this thread's pieces."""
        for i in range(self.rounds):
            piece = T.bind(self.m.thread + i * self.threads)
            row = T.bind(T.floordiv(piece, T.int32(self.across)))
            column = T.bind(T.floormod(piece, T.int32(self.across)) * PIECE)
            if (i + 1) * self.threads <= self.tokens * self.across:
                emit(i, row, column)
            else:
                with when(piece < self.tokens * self.across):
                    emit(i, row, column)

    def start(self, first: Any) -> None:
        """Ask for the tokens at positions first, …; beyond the end, the last one again."""
        tile, kv_head = self.attend.tile, self.attend.kv_head

        def ask(i: int, row: Any, column: Any) -> None:
            token = tile.token(self.m, T.bind(T.min(first + row, tile.end - 1)), kv_head)
            at = T.bind(token * self.width + column)
            if self.memory is not None:
                self.memory.fetch(at, self.coming, i)
                self.scale[i] = self.scales[token]
            elif self.async_copy:
                to = self.shared.ptr_to([self.base + row * self.stride + column])
                T.evaluate(T.ptx["cp.async.cg.shared.global"](to, self.pool.ptr_to([at]), 16))
            else:
                self.m.fetch(self.pool, at, "uint16", self.coming, i * 4, PIECE)

        self.pieces(ask)
        if self.async_copy:
            T.evaluate(T.ptx.cp.async_.commit_group())

    def finish(self) -> None:
        """The tokens are there, for all warps: a barrier."""
        if self.async_copy:
            T.evaluate(T.ptx.cp.async_.wait_group(0))
        else:

            def land(i: int, row: Any, column: Any) -> None:
                words, at = (self.coming, i * 4) if self.memory is None else (self.numbers(i), 0)
                self.halves.put(self.base + row * self.stride + column, words, at, PIECE)
                if self.factors is not None:
                    with when(column == 0):
                        T.buffer_store(self.factors, self.scale[i], [row])

            self.pieces(land)
        self.m.barrier()

    def numbers(self, i: int) -> Any:
        """The i-th piece of codes as words of numbers in the dtype of queries."""
        words = self.m.registers(PIECE // 2, "uint32")
        values = self.memory.floats(self.coming, i)
        if self.factors is None:
            values = [value * self.scale[i] for value in values]
        self.m.pack(values, self.attend.asked.dtype, words, 0)
        return words


class _Attend:
    def __init__(self, m: Machine, asked: Asked, cut: Tiling, o: Operands, tile: Tile, kv_head: Any, part: Any):
        self.m, self.asked, self.cut, self.o, self.tile, self.kv_head = m, asked, cut, o, tile, kv_head
        unit = unit_of(m, asked.dtype)
        if unit is None:
            raise ValueError(f"{asked.target.name} has no matrix unit for {asked.dtype}")
        self.unit: Unit = unit
        self.depths, self.columns = sides_of(asked.head_dim), sides_of(asked.v_dim)
        self.head0 = T.bind(kv_head * asked.group + part * cut.heads)
        self.heads_here = T.bind(T.min(T.int32(cut.heads), asked.group - part * cut.heads))
        keys, values = (cut.tokens * row_stride(width) for width in (asked.head_dim, asked.v_dim))
        # One place for both, that the sums of decoding take in the end; but where tokens pass through registers, TVM's
        # check of shared memory sees each store and takes one buffer for one place: there are two.
        self.async_copy = m.target.async_copy and not asked.cache
        self.room = keys + values if self.async_copy else 0
        place = m.shared(self.room, "uint16") if self.room else None
        self.keys = _Copy(self, o.k, o.k_scales, asked.head_dim, place, 0)
        self.values = _Copy(self, o.v, o.v_scales, asked.v_dim, place, keys, scaled=True)
        # Sixteens of tokens that a warp takes, and the first of them.
        self.pieces = 1 if cut.apart else cut.tokens // SIDE
        self.shift = T.bind(m.warp_number * SIDE) if cut.apart else 0
        count = cut.sides * unit.queries
        self.peaks, self.totals = m.registers(count), m.registers(count)
        self.sums = m.registers(cut.sides * self.columns * unit.sums)
        self.scores = m.registers(cut.sides * self.pieces * unit.sums)
        self.queries = m.registers(cut.sides * self.depths * unit.words, "uint32")
        self.own = [self.vector(side, i) for side in range(cut.sides) for i in range(unit.queries)]

    def vector(self, side: int, i: int) -> tuple[Any, Any, Any, Any]:
        """A query vector of this lane: row of the tile and head, whether they are there, position.

        Those that are not there are the last row or head again: what they compute is not stored.
        """
        first = side * SIDE if self.cut.apart else (self.m.warp_number * self.cut.sides + side) * SIDE
        number = first + self.unit.query(i)
        row = self.m.keep(T.floordiv(number, T.int32(self.cut.heads)))
        head = self.m.keep(T.floormod(number, T.int32(self.cut.heads)))
        there = T.bind(T.And(row < self.tile.rows, head < self.heads_here))
        row = self.m.keep(T.min(row, self.tile.rows - 1))
        head = self.m.keep(self.head0 + T.min(head, self.heads_here - 1))
        return row, head, there, T.bind(self.tile.position + row)

    def emit(self, finish: Finish) -> None:
        m, tile, tokens = self.m, self.tile, self.cut.tokens
        self.keys.start(tile.begin)
        self.load_queries()
        self.sums.fill(0)
        self.peaks.fill(NOTHING)
        self.totals.fill(0)
        with loop(T.floordiv(tile.end - tile.begin + (tokens - 1), T.int32(tokens))) as i:
            first = m.keep(tile.begin + i * tokens)
            self.keys.finish()
            self.values.start(first)
            self.multiply_keys()
            self.softmax(first)
            self.values.finish()
            with when(first + tokens < tile.end):
                self.keys.start(first + tokens)
            self.multiply_values()
        self.finish(finish)

    def load_queries(self) -> None:
        """Queries as operands, straight from memory: each word once."""
        unit, d = self.unit, self.asked.head_dim
        words = flat(self.o.q, "uint32")
        for side in range(self.cut.sides):
            starts = []
            for i in range(unit.queries):
                row, head, _, _ = self.own[side * unit.queries + i]
                starts.append(self.m.keep((i64(self.tile.row + row) * self.asked.heads + head) * (d // 2), "int64"))
            for depth in range(self.depths):
                for w in range(unit.words):
                    i, at = unit.query_word(w)
                    place = at + depth * SIDE
                    inside = (depth + 1) * SIDE <= d
                    word = words[starts[i] + T.floordiv(place if inside else T.min(place, T.int32(d - 2)), T.int32(2))]
                    if not inside:
                        word = T.Select(place < d, word, T.uint32(0))
                    self.queries[(side * self.depths + depth) * unit.words + w] = word

    def multiply_keys(self) -> None:
        """scores = products of all queries with the tile's keys."""
        unit = self.unit
        self.scores.fill(0)
        operand = self.m.registers(unit.words, "uint32")
        for j in range(self.pieces):
            for depth in range(self.depths):
                at = self.keys.base + (j * SIDE + self.shift) * self.keys.stride + depth * SIDE
                unit.load_keys(self.keys.shared, at, self.keys.stride, operand)
                for side in range(self.cut.sides):
                    queries = (side * self.depths + depth) * unit.words
                    unit.multiply(operand, self.queries, queries, self.scores, self.score_at(side, j))

    def score_at(self, side: int, j: int) -> int:
        """Where the sums of a side's queries with the j-th sixteen tokens begin."""
        return (side * self.pieces + j) * self.unit.sums

    def scores_of(self, side: int, i: int) -> list[tuple[int, Any]]:
        """(register, token of the tile) of one of the lane's queries."""
        unit = self.unit
        return [
            (self.score_at(side, j) + e, unit.place(e) + (j * SIDE + self.shift))
            for j in range(self.pieces)
            for e in range(unit.sums)
            if unit.query_of(e) == i
        ]

    def hide(self, first: Any) -> None:
        """Products of tokens that their query does not see, where there can be any."""
        tile, asked = self.tile, self.asked
        hidden = first + self.cut.tokens - 1 > tile.position
        if asked.window or asked.chunk:
            hidden = T.Or(hidden, first < asked.first_seen(tile.end - 1))
        with when(hidden):
            for number, (_, _, _, own) in enumerate(self.own):
                side, i = divmod(number, self.unit.queries)
                last = T.bind(own - first)
                begin = T.bind(asked.first_seen(own) - first)
                for register, token in self.scores_of(side, i):
                    seen = token <= last
                    if asked.window or asked.chunk:
                        seen = T.And(seen, token >= begin)
                    self.scores[register] = T.Select(seen, self.scores[register], T.float32(HIDDEN))

    def softmax(self, first: Any) -> None:
        """Products to weights relative to the new peaks; totals and sums moved to them."""
        m, asked, unit = self.m, self.asked, self.unit
        factor = T.float32(1.0 if asked.softcap else asked.query_factor)
        if asked.cache:
            for side, i in itertools.product(range(self.cut.sides), range(unit.queries)):
                for register, token in self.scores_of(side, i):
                    self.scores[register] = self.scores[register] * self.keys.factors[token]
        if asked.softcap:
            for e in range(len(self.scores)):
                self.scores[e] = asked.capped(m, self.scores[e] * T.float32(asked.query_factor))
        self.hide(first)
        for number in range(len(self.own)):
            side, i = divmod(number, unit.queries)
            registers = [register for register, _ in self.scores_of(side, i)]
            top = m.registers(1)
            top[0] = self.peaks[number]
            for register in registers:
                top[0] = T.max(top[0], self.scores[register])
            for mask in unit.masks:
                top[0] = T.max(top[0], m.shuffle_xor(top[0], mask))
            shrink = m.exp2((self.peaks[number] - top[0]) * factor)
            self.peaks[number] = top[0]
            self.totals[number] = self.totals[number] * shrink
            for register in registers:
                self.scores[register] = T.exp2((self.scores[register] - top[0]) * factor)
                self.totals[number] = self.totals[number] + self.scores[register]
            for c in range(self.columns):
                for e in range(unit.sums):
                    if unit.query_of(e) == i:
                        at = (side * self.columns + c) * unit.sums + e
                        self.sums[at] = self.sums[at] * shrink

    def multiply_values(self) -> None:
        """sums += weights times the tile's values."""
        unit, cut = self.unit, self.cut
        operand = self.m.registers(unit.words, "uint32")
        weights = [self.m.registers(unit.words, "uint32") for _ in range(cut.sides)]
        for j in range(self.pieces):
            for side in range(cut.sides):
                unit.weights(self.scores, self.score_at(side, j), weights[side])
            for c in range(self.columns):
                at = self.values.base + (j * SIDE + self.shift) * self.values.stride + c * SIDE
                unit.load_values(self.values.shared, at, self.values.stride, operand)
                for side in range(cut.sides):
                    unit.multiply(operand, weights[side], 0, self.sums, (side * self.columns + c) * unit.sums)

    def finish(self, finish: Finish) -> None:
        """Totals over the lanes that share a query, then the answers."""
        m, unit = self.m, self.unit
        for number in range(len(self.own)):
            for mask in unit.masks:
                self.totals[number] = self.totals[number] + m.shuffle_xor(self.totals[number], mask)
            # From here on peaks are exponents of 2.
            factor = 1.0 if self.asked.softcap else self.asked.query_factor
            self.peaks[number] = self.peaks[number] * T.float32(factor)
        if self.cut.apart:
            self.join(finish)
            return
        for number, (row, head, there, _) in enumerate(self.own):
            side, i = divmod(number, unit.queries)
            mine = [e for e in range(unit.sums) if unit.query_of(e) == i]
            with when(there):
                store = finish(T.bind(self.tile.row + row), head, self.peaks[number], self.totals[number])
                for c in range(self.columns):
                    for k in range(0, len(mine), unit.run):
                        run = mine[k : k + unit.run]
                        column = T.bind(unit.place(run[0]) + c * SIDE)
                        sums = [self.sums[(side * self.columns + c) * unit.sums + e] for e in run]
                        if (c + 1) * SIDE <= self.asked.v_dim:
                            store(column, sums)
                        else:
                            with when(column < self.asked.v_dim):
                                store(column, sums)

    def join(self, finish: Finish) -> None:
        """The warps' sums over their tokens become one."""
        m, unit, cut, width = self.m, self.unit, self.cut, self.columns * SIDE
        peaks, totals = m.shared(cut.warps * SIDE), m.shared(cut.warps * SIDE)
        m.barrier()  # all warps have done with the tokens: their place takes the sums
        needed = cut.warps * SIDE * width
        if self.room // 2 >= needed:
            sums = T.decl_buffer((self.room // 2,), "float32", data=self.keys.shared.data, scope="shared")
        else:
            sums = m.shared(needed)
        for i in range(unit.queries):
            vector = T.bind(m.warp_number * SIDE + unit.query(i))
            with when(T.bitwise_and(m.lane, T.int32(sum(unit.masks))) == 0):  # one of the lanes that share a query
                T.buffer_store(peaks, self.peaks[i], [vector])
                T.buffer_store(totals, self.totals[i], [vector])
            for c in range(self.columns):
                for e in range(unit.sums):
                    if unit.query_of(e) == i:
                        at = vector * width + (unit.place(e) + c * SIDE)
                        T.buffer_store(sums, self.sums[c * unit.sums + e], [at])
        parts = Parts(cut.warps, SIDE, width, peaks, totals, sums)
        parts.join(m, cut.rows, cut.heads, self.asked.v_dim, self.tile, self.head0, self.heads_here, finish)
