"""Attention on Apple's simdgroup matrices: squares of eight, which lane has what of them is not told.

A warp has sixteen query vectors. Their products with a tile of tokens pass through shared memory, where two lanes share
a vector: they take the softmax, and the weights go back as squares. What the sums shrink by, when a peak rises, stands
on the diagonal of a square that they are multiplied with. Operands are float16, or float32 for all else, which holds
them exactly; keys and values take turns in one place of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_parts import Asked, Finish, Memory, Operands, Tile
from .machine import Machine, i64, loop, when

__all__ = ["Squares", "attend"]

WARPS = 4
SIDE = 8
VECTORS = 16  # of a warp
HIDDEN = -1e30  # a product of a token that is not seen
NOTHING = -1e25  # a peak before the first product


@dataclass(frozen=True)
class Squares:
    """How the work of a block is cut. rows × heads: its query vectors; tokens: of a tile."""

    rows: int
    heads: int
    tokens: int

    @staticmethod
    def of(asked: Asked, *, decode: bool) -> Squares | None:
        """None where the target has no such unit, a vector's sums don't fit in registers, or in decoding."""
        target, widest = asked.target, max(asked.head_dim, asked.v_dim)
        if target.matrix_unit != "simdgroup" or decode or asked.latent or widest > 128:
            return None
        if asked.head_dim % SIDE or asked.v_dim % SIDE:
            return None
        vectors = WARPS * VECTORS
        heads = -(-asked.group // -(-asked.group // vectors))
        # Keys or values, scores, weights, and the squares that sums are multiplied with.
        element = 2 if asked.dtype == "float16" else 4
        token = widest * element + vectors * (4 + element)
        room = target.shared_bytes - WARPS * 2 * SIDE * SIDE * 4 - 1024
        return Squares(vectors // heads, heads, 32 if 32 * token <= room else 16)

    @property
    def warps(self) -> int:
        return WARPS

    def step(self, warp: int) -> int:
        """Tokens that a block takes at once."""
        return self.tokens

    def parts(self, asked: Asked) -> int:
        """Blocks that share the query heads of one key head."""
        return -(-asked.group // self.heads)


def attend(m: Machine, asked: Asked, cut: Squares, o: Operands, tile: Tile, kv_head: Any, part: Any,
           finish: Finish) -> None:  # fmt: skip
    """Emit one block's work on a tile for one part of the heads of a key head; finish says where columns go."""
    _Attend(m, asked, cut, o, tile, kv_head, part).emit(finish)


def matrices(count: int, dtype: str) -> Any:
    """So many squares of a warp."""
    return T.alloc_buffer((64 * count,), dtype, scope="metal.simdgroup")


def load(to: Any, i: int, shared: Any, at: Any, *, turned: bool = False) -> None:
    T.evaluate(T.metal.simdgroup_load(to.data, i, shared.access_ptr("r", offset=at), SIDE, SIDE, SIDE, turned))


def save(of: Any, i: int, shared: Any, at: Any) -> None:
    T.evaluate(T.metal.simdgroup_store(of.data, i, shared.access_ptr("w", offset=at), SIDE, SIDE, SIDE, False))


def fill(to: Any, i: int) -> None:
    T.evaluate(T.metal.make_filled_simdgroup_matrix(to.data, i, T.float32(0), SIDE, SIDE))


def multiply(d: Any, i: int, a: Any, j: int, b: Any, k: int, c: Any, n: int) -> None:
    """d[i] = a[j] · b[k] + c[n]"""
    T.evaluate(T.metal.simdgroup_multiply_accumulate(d.data, i, a.data, j, b.data, k, c.data, n))


class _Attend:
    def __init__(self, m: Machine, asked: Asked, cut: Squares, o: Operands, tile: Tile, kv_head: Any, part: Any):
        self.m, self.asked, self.cut, self.o, self.tile, self.kv_head = m, asked, cut, o, tile, kv_head
        self.head0 = T.bind(kv_head * asked.group + part * cut.heads)
        self.heads_here = T.bind(T.min(T.int32(cut.heads), asked.group - part * cut.heads))
        self.dtype = "float16" if asked.dtype == "float16" else "float32"
        self.depths, self.columns = asked.head_dim // SIDE, asked.v_dim // SIDE
        self.down = cut.tokens // SIDE  # squares of tokens in a tile
        self.place = m.shared(cut.tokens * max(asked.head_dim, asked.v_dim), self.dtype)
        self.scores = m.shared(WARPS * VECTORS * cut.tokens)
        # Not the place of scores, of which a lane overwrites its own: TVM's check of shared memory can't tell.
        self.weights = m.shared(WARPS * VECTORS * cut.tokens, self.dtype)
        self.shrink = m.shared(WARPS * 2 * SIDE * SIDE)
        # A lane's own query vector, of which it has every second square of tokens.
        self.own = T.bind(T.floordiv(m.lane, T.int32(2)))
        self.half = T.bind(T.floormod(m.lane, T.int32(2)))
        self.row, self.head, self.there = self.vector(m.warp_number * VECTORS + self.own)
        self.position = T.bind(tile.position + self.row)
        self.peak, self.total = m.registers(1), m.registers(1)

    def vector(self, number: Any) -> tuple[Any, Any, Any]:
        """Row of the tile, head, and whether they are there; if not, they are the last row or head again."""
        m, heads = self.m, T.int32(self.cut.heads)
        row, head = m.keep(T.floordiv(number, heads)), m.keep(T.floormod(number, heads))
        there = T.bind(T.And(row < self.tile.rows, head < self.heads_here))
        row, head = T.min(row, self.tile.rows - 1), self.head0 + T.min(head, self.heads_here - 1)
        return m.keep(row), m.keep(head), there

    def square(self, row: Any) -> Any:
        """Where a warp's row of scores begins: a square holds eight tokens of eight rows."""
        down, inside = T.floordiv(row, T.int32(SIDE)), T.floormod(row, T.int32(SIDE))
        return (self.m.warp_number * 2 + down) * (self.down * SIDE * SIDE) + inside * SIDE

    def emit(self, finish: Finish) -> None:
        m, tile, tokens = self.m, self.tile, self.cut.tokens
        self.queries = matrices(2 * self.depths, self.dtype)
        self.sums = matrices(2 * self.columns, "float32")
        self.nothing = matrices(1, "float32")
        fill(self.nothing, 0)
        for i in range(2 * self.columns):
            fill(self.sums, i)
        with loop(2 * SIDE * SIDE - m.lane, step=m.warp) as i:
            T.buffer_store(self.shrink, T.float32(0), [m.warp_number * 2 * SIDE * SIDE + m.lane + i])
        self.load_queries()
        self.peak[0], self.total[0] = T.float32(NOTHING), T.float32(0)
        with loop(T.floordiv(tile.end - tile.begin + (tokens - 1), T.int32(tokens))) as i:
            first = m.keep(tile.begin + i * tokens)
            self.copy(self.o.k, self.o.k_scales, self.asked.head_dim, first)
            m.barrier()
            self.multiply_keys()
            m.barrier()
            self.copy(self.o.v, self.o.v_scales, self.asked.v_dim, first)
            self.softmax(first)
            m.barrier()
            self.multiply_values()
            m.barrier()
        self.finish(finish)

    def put(self, memory: Memory, element: Any, row: Any, chunk: Any, chunks: int, scale: Any = None) -> None:
        """Eight elements from memory, times a scale where there is one, to a row of a square."""
        m = self.m
        held = m.registers(SIDE, self.dtype)
        words = memory.registers(SIDE // memory.count)
        for piece in range(SIDE // memory.count):
            memory.fetch(element + piece * memory.count, words, piece)
        for piece in range(SIDE // memory.count):
            for i, value in enumerate(memory.floats(words, piece)):
                value = value if scale is None else value * scale
                held[piece * memory.count + i] = value if self.dtype == "float32" else T.Cast("float16", value)
        at = T.bind(
            (T.floordiv(row, T.int32(SIDE)) * chunks + chunk) * (SIDE * SIDE) + T.floormod(row, T.int32(SIDE)) * SIDE
        )
        for i in range(0, SIDE, 4):
            T.buffer_store(self.place, held.buffer.vload([i], f"{self.dtype}x4"), [T.ramp(at + i, 1, 4)])

    def copy(self, pool: Any, scales: Any, width: int, first: Any) -> None:
        """A tile of keys or values to shared memory; beyond the end, the last token again."""
        m, tile, chunks = self.m, self.tile, width // SIDE
        memory = Memory(m, pool, self.asked.stored, 8 if self.asked.stored != "float32" else 4)
        with loop(self.cut.tokens * chunks - m.thread, step=m.threads) as offset:
            piece = T.bind(offset + m.thread)
            row, chunk = T.bind(T.floordiv(piece, T.int32(chunks))), T.bind(T.floormod(piece, T.int32(chunks)))
            token = tile.token(m, T.bind(T.min(first + row, tile.end - 1)), self.kv_head)
            scale = None if scales is None else m.keep(scales[token], "float32")
            self.put(memory, T.bind(token * width + chunk * SIDE), row, chunk, chunks, scale)

    def load_queries(self) -> None:
        """Queries as squares, by way of the place of keys and values: two warps' at a time."""
        m, asked, chunks = self.m, self.asked, self.depths
        memory = Memory(m, self.o.q, asked.dtype, 8 if asked.dtype != "float32" else 4)
        at_once = self.cut.tokens // VECTORS  # warps whose queries fit
        for turn in range(WARPS // at_once):
            with loop(self.cut.tokens * chunks - m.thread, step=m.threads) as offset:
                piece = T.bind(offset + m.thread)
                row, chunk = T.bind(T.floordiv(piece, T.int32(chunks))), T.bind(T.floormod(piece, T.int32(chunks)))
                own, head, _ = self.vector(row + turn * self.cut.tokens)
                element = (i64(self.tile.row + own) * asked.heads + head) * asked.head_dim + chunk * SIDE
                self.put(memory, T.bind(element), row, chunk, chunks)
            m.barrier()
            with when(T.floordiv(m.warp_number, T.int32(at_once)) == turn):
                inside = T.floormod(m.warp_number, T.int32(at_once)) * 2
                for down in range(2):
                    for depth in range(chunks):
                        at = ((inside + down) * chunks + depth) * (SIDE * SIDE)
                        load(self.queries, down * chunks + depth, self.place, at)
            m.barrier()

    def multiply_keys(self) -> None:
        """scores = products of the warp's queries with the tile's keys."""
        found, key = matrices(2, "float32"), matrices(1, self.dtype)
        for j in range(self.down):
            for down in range(2):
                fill(found, down)
            for depth in range(self.depths):
                load(key, 0, self.place, (j * self.depths + depth) * SIDE * SIDE, turned=True)
                for down in range(2):
                    multiply(found, down, self.queries, down * self.depths + depth, key, 0, found, down)
            for down in range(2):
                save(found, down, self.scores, ((self.m.warp_number * 2 + down) * self.down + j) * (SIDE * SIDE))

    def softmax(self, first: Any) -> None:
        """Scores to weights relative to the new peak; the total moved to it, what sums shrink by on the diagonal."""
        m, asked = self.m, self.asked
        row = T.bind(self.square(self.own))
        scores = m.registers(self.cut.tokens // 2)
        places = [(self.half + 2 * (i // SIDE)) * SIDE + i % SIDE for i in range(len(scores))]  # tokens of the tile
        at = [row + (self.half + 2 * (i // SIDE)) * (SIDE * SIDE) + i % SIDE for i in range(len(scores))]
        last = T.bind(self.position - first)
        begin = T.bind(asked.first_seen(self.position) - first)
        factor = T.float32(1.0 if asked.softcap else asked.query_factor)
        top: Any = self.peak[0]
        for i, place in enumerate(places):
            value = self.scores[at[i]]
            if asked.softcap:
                value = asked.capped(m, value * T.float32(asked.query_factor))
            seen = place <= last
            if asked.window or asked.chunk:
                seen = T.And(seen, place >= begin)
            scores[i] = T.Select(seen, value, T.float32(HIDDEN))
            top = T.max(top, scores[i])
        top = m.keep(top, "float32")
        top = m.keep(T.max(top, m.shuffle_xor(top, 1)), "float32")
        shrink = m.exp2((self.peak[0] - top) * factor)
        self.peak[0] = top
        self.total[0] = self.total[0] * shrink
        for i, place in enumerate(at):
            weight = m.exp2((scores[i] - top) * factor)
            self.total[0] = self.total[0] + weight
            T.buffer_store(self.weights, weight if self.dtype == "float32" else T.Cast("float16", weight), [place])
        with when(self.half == 0):
            diagonal = T.floormod(self.own, T.int32(SIDE)) * (SIDE + 1)
            down = m.warp_number * 2 + T.floordiv(self.own, T.int32(SIDE))
            T.buffer_store(self.shrink, shrink, [down * (SIDE * SIDE) + diagonal])

    def multiply_values(self) -> None:
        """sums = what they shrink to + weights times the tile's values."""
        shrink, weight, value = matrices(2, "float32"), matrices(2, self.dtype), matrices(1, self.dtype)
        for down in range(2):
            load(shrink, down, self.shrink, (self.m.warp_number * 2 + down) * (SIDE * SIDE))
            for c in range(self.columns):
                i = down * self.columns + c
                multiply(self.sums, i, shrink, down, self.sums, i, self.nothing, 0)
        for j in range(self.down):
            for down in range(2):
                load(weight, down, self.weights, ((self.m.warp_number * 2 + down) * self.down + j) * (SIDE * SIDE))
            for c in range(self.columns):
                load(value, 0, self.place, (j * self.columns + c) * SIDE * SIDE)
                for down in range(2):
                    i = down * self.columns + c
                    multiply(self.sums, i, weight, down, value, 0, self.sums, i)

    def finish(self, finish: Finish) -> None:
        """Sums to the place of scores, as many columns at a time as there are tokens; then the answers."""
        m, asked = self.m, self.asked
        total = m.keep(self.total[0] + m.shuffle_xor(self.total[0], 1), "float32")
        factor = 1.0 if asked.softcap else asked.query_factor
        peak = m.keep(self.peak[0] * T.float32(factor), "float32")
        row = T.bind(self.square(self.own))
        for c in range(0, self.columns, self.down):
            here = range(c, min(self.columns, c + self.down))
            for down in range(2):
                for column in here:
                    at = ((m.warp_number * 2 + down) * self.down + column - c) * (SIDE * SIDE)
                    save(self.sums, down * self.columns + column, self.scores, at)
            m.barrier()
            with when(self.there):
                store = finish(T.bind(self.tile.row + self.row), self.head, peak, total)
                for column in here:
                    at = row + (column - c) * (SIDE * SIDE) + self.half * 4
                    store(T.bind(self.half * 4 + column * SIDE), [self.scores[at + i] for i in range(4)])
            m.barrier()
