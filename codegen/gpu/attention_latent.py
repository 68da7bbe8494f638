"""Latent attention on matrix units: many heads, one long key, whose first columns are the value.

The sums of sixteen queries are wider than a warp's registers: all warps have the same 32 queries, each sums a part of
the columns. Scores are shared out by tokens: a warp has sixteen queries and sixteen tokens of the tile, says how high
they rise, and hands its weights to the others through shared memory, where queries and the tile stand too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_parts import Asked, Finish, Memory, Operands, Tile
from .attention_tiles import FEW_HEADS, HIDDEN, NOTHING, PIECE, row_stride, sides_of
from .attention_units import SIDE, Unit, unit_of
from .machine import Machine, flat, i64, loop, when
from .memory import Halves

__all__ = ["Latent", "attend"]

WARPS = 4
SIDES = 2  # sixteens of queries, and of tokens in a tile: each of the warps has one of both
VECTORS = TOKENS = SIDES * SIDE
WEIGHTS = TOKENS + PIECE  # from one query's weights to the next, as rows of a tile


@dataclass(frozen=True)
class Latent:
    """How the work of a block is cut. rows × heads: its query vectors, 32 at most."""

    rows: int
    heads: int

    @staticmethod
    def of(asked: Asked, *, decode: bool) -> Latent | None:
        """None where keys are not latent, heads are few, or the target has no unit or too little shared memory."""
        target = asked.target
        if not asked.latent or target.matrix_unit != "mma" or asked.dtype not in target.dtypes:
            return None
        if asked.group < FEW_HEADS or asked.head_dim % PIECE or asked.v_dim % PIECE:
            return None
        columns = -(-sides_of(asked.v_dim) // WARPS)  # sixteens of a warp, whose sums are in registers
        if columns > 8 or places(asked) * 2 > target.shared_dynamic_bytes:
            return None
        heads = -(-asked.group // -(-asked.group // VECTORS))
        return Latent(VECTORS // heads, heads)

    @property
    def warps(self) -> int:
        return WARPS

    def step(self, warp: int) -> int:
        """Tokens that a block takes at once."""
        return TOKENS

    def parts(self, asked: Asked) -> int:
        """Blocks that share the query heads of one key head."""
        return -(-asked.group // self.heads)


def places(asked: Asked) -> int:
    """16-bit elements of shared memory: queries, a tile of keys, weights."""
    return (VECTORS + TOKENS) * row_stride(asked.head_dim) + VECTORS * WEIGHTS


def attend(m: Machine, asked: Asked, cut: Latent, o: Operands, tile: Tile, kv_head: Any, part: Any,
           finish: Finish) -> None:  # fmt: skip
    """Emit one block's work on a tile for one part of the heads of a key head; finish says where columns go."""
    _Attend(m, asked, cut, o, tile, kv_head, part).emit(finish)


class _Attend:
    def __init__(self, m: Machine, asked: Asked, cut: Latent, o: Operands, tile: Tile, kv_head: Any, part: Any):
        self.m, self.asked, self.cut, self.o, self.tile, self.kv_head = m, asked, cut, o, tile, kv_head
        unit = unit_of(m, asked.dtype)
        if unit is None:
            raise ValueError(f"{asked.target.name} has no matrix unit for {asked.dtype}")
        self.unit: Unit = unit
        self.head0 = T.bind(kv_head * asked.group + part * cut.heads)
        self.heads_here = T.bind(T.min(T.int32(cut.heads), asked.group - part * cut.heads))
        self.stride, self.depths = row_stride(asked.head_dim), sides_of(asked.head_dim)
        self.place = m.shared(places(asked), "uint16", dynamic=True)  # queries, keys, weights
        self.keys, self.weights = VECTORS * self.stride, (VECTORS + TOKENS) * self.stride
        self.tops, self.shrink = m.shared(WARPS * SIDE), m.shared(VECTORS)
        self.side = T.bind(T.floordiv(m.warp_number, T.int32(SIDES)))  # this warp's queries of the scores
        self.part = T.bind(T.floormod(m.warp_number, T.int32(SIDES)))  # and its tokens
        self.columns = -(-sides_of(asked.v_dim) // WARPS)
        self.peaks, self.totals = m.registers(unit.queries), m.registers(unit.queries)
        self.sums = m.registers(SIDES * self.columns * unit.sums)
        self.scores = m.registers(unit.sums)
        self.factor = 1.0 if asked.softcap else asked.query_factor
        self.alone = T.bitwise_and(m.lane, T.int32(sum(unit.masks))) == 0  # one of the lanes that share a query

    def vector(self, number: Any) -> tuple[Any, Any, Any]:
        """Row of the tile, head, and whether they are there; if not, they are the last row or head again."""
        m, heads = self.m, T.int32(self.cut.heads)
        row, head = m.keep(T.floordiv(number, heads)), m.keep(T.floormod(number, heads))
        there = T.bind(T.And(row < self.tile.rows, head < self.heads_here))
        row, head = T.min(row, self.tile.rows - 1), self.head0 + T.min(head, self.heads_here - 1)
        return m.keep(row), m.keep(head), there

    def emit(self, finish: Finish) -> None:
        m, tile, o = self.m, self.tile, self.o
        self.clear()
        pool = None if self.asked.cache else flat(o.k, "uint16")
        queries = flat(o.q, "uint16")

        def query(i: Any) -> Any:
            row, head, _ = self.vector(i)
            return (i64(tile.row + row) * self.asked.heads + head) * self.asked.head_dim

        self.copy(queries, 0, VECTORS, query)
        self.own = [T.bind(tile.position + self.vector(self.number(i))[0]) for i in range(self.unit.queries)]
        self.sums.fill(0)
        self.peaks.fill(NOTHING)
        self.totals.fill(0)
        with loop(T.floordiv(tile.end - tile.begin + (TOKENS - 1), T.int32(TOKENS))) as i:
            first = m.keep(tile.begin + i * TOKENS)

            def key(i: Any, first: Any = first) -> Any:
                position = T.bind(T.min(first + i, tile.end - 1))  # beyond the end, the last token again
                return tile.token(m, position, self.kv_head) * self.asked.head_dim

            if self.asked.cache:
                self.copy_codes(first)
            else:
                self.copy(pool, self.keys, TOKENS, key)
            T.evaluate(T.ptx.cp.async_.commit_group())
            T.evaluate(T.ptx.cp.async_.wait_group(0))
            m.barrier()
            self.multiply_keys()
            self.hide(first)
            self.rise()
            self.hand_over()
            self.multiply_values()
            m.barrier()
        self.finish(finish)

    def number(self, i: int) -> Any:
        """The number of this lane's i-th query of the scores among the block's."""
        return self.side * SIDE + self.unit.query(i)

    def clear(self) -> None:
        """Zeros between the width and whole sixteens: they are multiplied too."""
        width = self.asked.head_dim
        missing = sides_of(width) * SIDE - width
        if missing:
            with loop((VECTORS + TOKENS) * missing - self.m.thread, step=self.m.threads) as offset:
                i = T.bind(offset + self.m.thread)
                row, column = T.floordiv(i, T.int32(missing)), T.floormod(i, T.int32(missing))
                T.buffer_store(self.place, T.uint16(0), [row * self.stride + width + column])

    def copy(self, source: Any, base: int, rows: int, begin: Callable[[Any], Any]) -> None:
        """Rows of head_dim elements, the i-th from element begin(i) of the source on, to shared memory."""
        across = self.asked.head_dim // PIECE
        with loop(rows * across - self.m.thread, step=self.m.threads) as offset:
            piece = T.bind(offset + self.m.thread)
            row = T.bind(T.floordiv(piece, T.int32(across)))
            column = T.bind(T.floormod(piece, T.int32(across)) * PIECE)
            to = self.place.ptr_to([base + row * self.stride + column])
            T.evaluate(T.ptx["cp.async.cg.shared.global"](to, source.ptr_to([begin(row) + column]), 16))

    def copy_codes(self, first: Any) -> None:
        """The tile's keys, times their scales and rounded to the dtype of queries; as `copy` puts them."""
        m, asked = self.m, self.asked
        across = asked.head_dim // PIECE
        memory = Memory(m, self.o.k, asked.stored, PIECE)
        halves = Halves(m, self.place)
        codes, numbers = memory.registers(1), m.registers(PIECE // 2, "uint32")
        with loop(TOKENS * across - m.thread, step=m.threads) as offset:
            piece = T.bind(offset + m.thread)
            row = T.bind(T.floordiv(piece, T.int32(across)))
            column = T.bind(T.floormod(piece, T.int32(across)) * PIECE)
            token = self.tile.token(m, T.bind(T.min(first + row, self.tile.end - 1)), self.kv_head)
            memory.fetch(T.bind(token * asked.head_dim + column), codes, 0)
            scale = m.keep(self.o.k_scales[token], "float32")
            m.pack([value * scale for value in memory.floats(codes, 0)], asked.dtype, numbers, 0)
            halves.put(self.keys + row * self.stride + column, numbers, 0, PIECE)

    def multiply_keys(self) -> None:
        """scores = products of sixteen queries with sixteen tokens."""
        unit = self.unit
        self.scores.fill(0)
        key, query = self.m.registers(unit.words, "uint32"), self.m.registers(unit.words, "uint32")
        queries = T.bind(self.side * (SIDE * self.stride))
        keys = T.bind(self.keys + self.part * (SIDE * self.stride))
        for depth in range(self.depths):
            unit.load_queries(self.place, queries + depth * SIDE, self.stride, query)
            unit.load_keys(self.place, keys + depth * SIDE, self.stride, key)
            unit.multiply(key, query, 0, self.scores, 0)

    def hide(self, first: Any) -> None:
        """Scores of tokens that their query does not see."""
        m, asked, unit = self.m, self.asked, self.unit
        for e in range(unit.sums):
            own = self.own[unit.query_of(e)]
            token = first + self.part * SIDE + unit.place(e)
            seen = token <= own
            if asked.window or asked.chunk:
                seen = T.And(seen, token >= asked.first_seen(own))
            score = self.scores[e]
            if asked.softcap:
                score = asked.capped(m, score * T.float32(asked.query_factor))
            self.scores[e] = T.Select(seen, score, T.float32(HIDDEN))

    def rise(self) -> None:
        """The new peaks, over the tokens of all warps; scores to weights, totals moved."""
        m, unit, factor = self.m, self.unit, T.float32(self.factor)
        mine = [[e for e in range(unit.sums) if unit.query_of(e) == i] for i in range(unit.queries)]
        for i in range(unit.queries):
            top = m.registers(1)
            top[0] = T.float32(NOTHING)
            for e in mine[i]:
                top[0] = T.max(top[0], self.scores[e])
            for mask in unit.masks:
                top[0] = T.max(top[0], m.shuffle_xor(top[0], mask))
            with when(self.alone):
                T.buffer_store(self.tops, top[0], [m.warp_number * SIDE + unit.query(i)])
        m.barrier()
        for i in range(unit.queries):
            top = m.registers(1)
            top[0] = self.peaks[i]
            for w in range(SIDES):
                top[0] = T.max(top[0], self.tops[(self.side * SIDES + w) * SIDE + unit.query(i)])
            shrink = m.exp2((self.peaks[i] - top[0]) * factor)
            self.peaks[i] = top[0]
            self.totals[i] = self.totals[i] * shrink
            for e in mine[i]:
                self.scores[e] = T.exp2((self.scores[e] - top[0]) * factor)
                self.totals[i] = self.totals[i] + self.scores[e]
            with when(T.And(self.alone, self.part == 0)):
                T.buffer_store(self.shrink, shrink, [self.number(i)])

    def hand_over(self) -> None:
        """Weights to shared memory, for all warps."""
        m, unit = self.m, self.unit
        words = T.decl_buffer((places(self.asked) // 2,), "uint32", data=self.place.data, scope="shared.dyn")
        for e in range(0, unit.sums, 2):
            row = self.number(unit.query_of(e)) * WEIGHTS
            at = T.floordiv(self.weights + row + self.part * SIDE + unit.place(e), T.int32(2))
            T.buffer_store(words, unit.pair(self.scores[e], self.scores[e + 1]), [at])
        m.barrier()

    def column(self, c: int) -> Any:
        """Which sixteen columns the c-th of this warp are; beyond the last, the last again."""
        return T.min(self.m.warp_number * self.columns + c, T.int32(sides_of(self.asked.v_dim) - 1))

    def multiply_values(self) -> None:
        """sums = what they shrink to + weights times the tile's first columns."""
        m, unit = self.m, self.unit
        for side in range(SIDES):
            for i in range(unit.queries):
                shrink = m.keep(self.shrink[side * SIDE + unit.query(i)], "float32")
                for c in range(self.columns):
                    for e in range(unit.sums):
                        if unit.query_of(e) == i:
                            at = (side * self.columns + c) * unit.sums + e
                            self.sums[at] = self.sums[at] * shrink
        value = m.registers(unit.words, "uint32")
        weights = [m.registers(unit.words, "uint32") for _ in range(SIDES)]
        for j in range(SIDES):
            for side in range(SIDES):
                unit.load_queries(self.place, self.weights + side * SIDE * WEIGHTS + j * SIDE, WEIGHTS, weights[side])
            for c in range(self.columns):
                at = self.keys + j * SIDE * self.stride + self.column(c) * SIDE
                unit.load_values(self.place, at, self.stride, value)
                for side in range(SIDES):
                    unit.multiply(value, weights[side], 0, self.sums, (side * self.columns + c) * unit.sums)

    def finish(self, finish: Finish) -> None:
        """Totals over lanes and warps, then the answers: every warp its columns of all queries."""
        m, asked, unit = self.m, self.asked, self.unit
        for i in range(unit.queries):
            for mask in unit.masks:
                self.totals[i] = self.totals[i] + m.shuffle_xor(self.totals[i], mask)
            with when(self.alone):
                T.buffer_store(self.tops, self.totals[i], [m.warp_number * SIDE + unit.query(i)])
                with when(self.part == 0):
                    T.buffer_store(self.shrink, self.peaks[i] * T.float32(self.factor), [self.number(i)])
        m.barrier()
        for side in range(SIDES):
            for i in range(unit.queries):
                query = T.bind(unit.query(i))
                row, head, there = self.vector(side * SIDE + query)
                total = m.registers(1)
                total.fill(0)
                for w in range(SIDES):
                    total[0] = total[0] + self.tops[(side * SIDES + w) * SIDE + query]
                peak = m.keep(self.shrink[side * SIDE + query], "float32")
                mine = [e for e in range(unit.sums) if unit.query_of(e) == i]
                with when(there):
                    store = finish(T.bind(self.tile.row + row), head, peak, total[0])
                    for c in range(self.columns):
                        for k in range(0, len(mine), unit.run):
                            run = mine[k : k + unit.run]
                            column = T.bind(unit.place(run[0]) + (m.warp_number * self.columns + c) * SIDE)
                            with when(column < asked.v_dim):
                                store(column, [self.sums[(side * self.columns + c) * unit.sums + e] for e in run])
        m.barrier()
