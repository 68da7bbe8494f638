"""Attention without matrix units: the lanes of a warp share a token, the warps of a block share out the tokens.

Each lane holds some columns of a few query vectors, and reads those columns of keys and values straight into registers,
16 bytes at a time, several tokens at once: nothing waits for another warp before the end. A query vector is one head
of one row; all heads of a key head, as far as registers go, read a token once.

Every group of lanes has its own peak, sum of exponentials and weighted sum of values (online softmax); they are merged
at the end, lanes by shuffles, warps through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .attention_parts import Asked, Finish, Memory, Operands, Parts, Tile
from .machine import LEAST, NOTHING, Machine, i64, loop, when, whole

__all__ = ["Cut", "attend"]

WARPS = 4
IN_FLIGHT = 4  # accesses to keys that a lane has under way, and as many to values
NUMBERS = 128  # registers of a lane for queries and sums


@dataclass(frozen=True)
class Cut:
    """How the work of a block is cut.

    rows × heads: its query vectors. lanes: of a warp, on one token; count: elements of an access;
    key_pieces, value_pieces: accesses of a lane to a token; tokens: of a group of lanes at once.
    """

    rows: int
    heads: int
    lanes: int
    count: int
    key_pieces: int
    value_pieces: int
    tokens: int

    @staticmethod
    def of(asked: Asked, *, decode: bool) -> Cut:
        """One row in decoding; as many as registers allow, else."""
        target = asked.target
        count = min(whole(asked.head_dim, asked.dtype), whole(asked.v_dim, asked.dtype))
        if asked.cache and count < 4:  # codes are read in words of four, or one by one
            count = 1
        wanted = -(-max(asked.head_dim, asked.v_dim) // count)
        lanes = min(target.warp, 1 << (wanted - 1).bit_length())
        keys, values = (-(-width // (count * lanes)) for width in (asked.head_dim, asked.v_dim))
        # Half the shared memory, so that two blocks are at home on a multiprocessor.
        shared = target.shared_bytes // 2 // (WARPS * (asked.v_dim + 2) * 4)
        most = max(1, min(8, NUMBERS // ((keys + values) * count), shared))
        parts = -(-asked.group // most)
        heads = -(-asked.group // parts)
        # An access to codes is a half or a quarter of one to numbers: there are more of them under way.
        in_flight = IN_FLIGHT * 2 if asked.cache and decode else IN_FLIGHT
        rows = 1 if decode else max(1, most // heads)
        return Cut(rows, heads, lanes, count, keys, values, max(1, in_flight // keys))

    @property
    def vectors(self) -> int:
        return self.rows * self.heads

    def parts(self, asked: Asked) -> int:
        """Blocks that share the query heads of one key head."""
        return -(-asked.group // self.heads)

    @property
    def warps(self) -> int:
        return WARPS

    def step(self, warp: int) -> int:
        """Tokens that a block takes at once."""
        return WARPS * self.tokens * (warp // self.lanes)


def attend(m: Machine, asked: Asked, cut: Cut, o: Operands, tile: Tile, kv_head: Any, part: Any,
           finish: Finish) -> None:  # fmt: skip
    """Emit one block's work on a tile for one part of the heads of a key head; calls finish once, in a loop."""
    _Attend(m, asked, cut, o, tile, kv_head, part).emit(finish)


class _Attend:
    def __init__(self, m: Machine, asked: Asked, cut: Cut, o: Operands, tile: Tile, kv_head: Any, part: Any):
        self.m, self.asked, self.cut, self.o, self.tile, self.kv_head = m, asked, cut, o, tile, kv_head
        self.head0 = T.bind(kv_head * asked.group + part * cut.heads)
        self.heads_here = T.bind(T.min(T.int32(cut.heads), asked.group - part * cut.heads))
        self.groups = m.warp // cut.lanes
        self.own = T.bind(T.floormod(m.lane, T.int32(cut.lanes)))  # which columns of a token
        self.group = T.bind(T.floordiv(m.lane, T.int32(cut.lanes)))  # which token
        self.q = Memory(m, o.q, asked.dtype, cut.count)
        self.k = Memory(m, o.k, asked.stored, cut.count)
        self.v = self.k if asked.latent else Memory(m, o.v, asked.stored, cut.count)
        self.queries = m.registers(cut.vectors * cut.key_pieces * cut.count)
        self.sums = m.registers(cut.vectors * cut.value_pieces * cut.count)
        self.peaks, self.totals = m.registers(cut.vectors), m.registers(cut.vectors)
        # Rows that don't exist are the last one again: what they compute is not stored.
        self.offsets = [T.bind(T.min(T.int32(r), tile.rows - 1)) if r else T.int32(0) for r in range(cut.rows)]

    def emit(self, finish: Finish) -> None:
        self.load_queries()
        self.sums.fill(0)
        self.peaks.fill(NOTHING)
        self.totals.fill(0)
        step = self.cut.tokens * self.groups
        begin = self.m.keep(self.tile.begin + self.m.warp_number * step)
        rounds = T.floordiv(self.tile.end - begin + (WARPS * step - 1), T.int32(WARPS * step))
        with loop(rounds) as i:
            self.tokens(T.bind(begin + i * (WARPS * step) + self.group))
        self.merge_lanes()
        self.merge_warps(finish)

    def column(self, piece: int) -> Any:
        """The first column of a lane's piece."""
        return (self.own + piece * self.cut.lanes) * self.cut.count

    def inside(self, piece: int, width: int) -> bool:
        """Do all lanes' pieces lie in the width?"""
        return (piece + 1) * self.cut.lanes * self.cut.count <= width

    def address(self, token: Any, piece: int, width: int) -> Any:
        """The element of a token's row where a lane's piece begins; lanes beyond the width read its last piece."""
        column = self.column(piece)
        if not self.inside(piece, width):
            column = T.min(column, T.int32(width - self.cut.count))
        return token * width + column

    def load_queries(self) -> None:
        cut, asked = self.cut, self.asked
        words = self.q.registers(cut.key_pieces)
        for vector in range(cut.vectors):
            r, h = divmod(vector, cut.heads)
            head = T.bind(self.head0 + T.min(T.int32(h), self.heads_here - 1)) if h else self.head0
            row = T.bind(i64(self.tile.row + self.offsets[r]) * asked.heads + head)
            for piece in range(cut.key_pieces):
                self.q.fetch(self.address(row, piece, asked.head_dim), words, piece)
            for piece in range(cut.key_pieces):
                for i, value in enumerate(self.q.floats(words, piece)):
                    value = value * T.float32(asked.query_factor)
                    if not self.inside(piece, asked.head_dim):
                        value = T.Select(self.column(piece) < asked.head_dim, value, T.float32(0))
                    self.queries[(vector * cut.key_pieces + piece) * cut.count + i] = value

    def tokens(self, first: Any) -> None:
        """A few tokens of this lane's group: first, first + groups, …"""
        m, cut, tile = self.m, self.cut, self.tile
        places = m.registers(cut.tokens, "int64")
        for u in range(cut.tokens):
            # Beyond the end the last token is read again: slots that no token has hold anything, even NaN.
            position = T.bind(T.min(first + u * self.groups, tile.end - 1))
            places[u] = tile.token(m, position, self.kv_head)
        keys = self.fetch(self.k, places, cut.key_pieces, self.asked.head_dim)
        values = keys if self.asked.latent else self.fetch(self.v, places, cut.value_pieces, self.asked.v_dim)
        scales = [self.scales(of, places) for of in (self.o.k_scales, self.o.v_scales)]
        scores = self.scores(keys)
        self.scale(scores, scales[0])
        self.softmax(scores, first)
        self.scale(scores, scales[1])
        self.weigh(scores, values)

    def fetch(self, memory: Memory, places: Any, pieces: int, width: int) -> Any:
        words = memory.registers(self.cut.tokens * pieces)
        for u in range(self.cut.tokens):
            for piece in range(pieces):
                memory.fetch(self.address(places[u], piece, width), words, u * pieces + piece)
        return words

    def scales(self, of: Any, places: Any) -> Any:
        """The scales of the tokens, of a quantized cache."""
        if of is None:
            return None
        found = self.m.registers(self.cut.tokens)
        for u in range(self.cut.tokens):
            found[u] = of[places[u]]
        return found

    def scale(self, scores: Any, scales: Any) -> None:
        """Numbers of tokens times the tokens' scales, of a quantized cache."""
        if scales is not None:
            for i in range(len(scores)):
                scores[i] = scores[i] * scales[i // self.cut.vectors]

    def scores(self, keys: Any) -> Any:
        """scores[token, vector]: products of keys and queries, in all lanes of the group."""
        m, cut = self.m, self.cut
        scores = m.registers(cut.tokens * cut.vectors)
        for u in range(cut.tokens):
            for piece in range(cut.key_pieces):
                key = self.k.floats(keys, u * cut.key_pieces + piece)
                for vector in range(cut.vectors):
                    at = (vector * cut.key_pieces + piece) * cut.count
                    total: Any = scores[u * cut.vectors + vector] if piece else T.float32(0)
                    for i, x in enumerate(key):
                        total = total + x * self.queries[at + i]
                    scores[u * cut.vectors + vector] = total
        mask = 1
        while mask < cut.lanes:
            for i in range(len(scores)):
                scores[i] = scores[i] + m.shuffle_xor(scores[i], mask)
            mask *= 2
        return scores

    def seen(self, position: Any, r: int) -> Any:
        """Is a position seen by a row of the tile?"""
        tile, own = self.tile, self.tile.position + self.offsets[r]
        there = position < tile.end
        if self.cut.rows > 1:
            there = T.And(there, position <= own)
        if (r or tile.lowest is not None) and (self.asked.window or self.asked.chunk):
            there = T.And(there, position >= self.asked.first_seen(own))
        return T.bind(there)

    def softmax(self, scores: Any, first: Any) -> None:
        """Scores to exponentials relative to the new peak, 0 where not seen; totals and sums moved to it."""
        m, cut = self.m, self.cut
        width = cut.value_pieces * cut.count
        for r in range(cut.rows):
            seen = [self.seen(first + u * self.groups, r) for u in range(cut.tokens)]
            for vector in range(r * cut.heads, (r + 1) * cut.heads):
                top = self.peaks[vector]
                for u in range(cut.tokens):
                    at = u * cut.vectors + vector
                    scores[at] = T.Select(seen[u], self.asked.capped(m, scores[at]), T.float32(LEAST))
                    top = T.max(top, scores[at])
                top = m.keep(top, "float32")
                shrink = m.exp2(self.peaks[vector] - top)
                self.peaks[vector] = top
                total = self.totals[vector] * shrink
                for u in range(cut.tokens):
                    at = u * cut.vectors + vector
                    scores[at] = T.exp2(scores[at] - top)
                    total = total + scores[at]
                self.totals[vector] = total
                for i in range(width):
                    self.sums[vector * width + i] = self.sums[vector * width + i] * shrink

    def weigh(self, scores: Any, values: Any) -> None:
        """Sums of values, each times its exponential."""
        cut = self.cut
        pieces = cut.key_pieces if self.asked.latent else cut.value_pieces
        for u in range(cut.tokens):
            for piece in range(cut.value_pieces):
                value = self.v.floats(values, u * pieces + piece)
                for vector in range(cut.vectors):
                    for i, x in enumerate(value):
                        at = (vector * cut.value_pieces + piece) * cut.count + i
                        self.sums[at] = self.sums[at] + x * scores[u * cut.vectors + vector]

    def merge_lanes(self) -> None:
        """The groups of a warp become one."""
        m, cut = self.m, self.cut
        width = cut.value_pieces * cut.count
        if self.groups == 1:
            return
        for vector in range(cut.vectors):
            top = m.warp_reduce(T.max, self.peaks[vector], stride=cut.lanes)
            shrink = m.exp2(self.peaks[vector] - top)
            self.peaks[vector] = top
            for numbers, at in [(self.totals, vector), *((self.sums, vector * width + i) for i in range(width))]:
                numbers[at] = m.warp_reduce(lambda a, b: a + b, numbers[at] * shrink, stride=cut.lanes)

    def merge_warps(self, finish: Finish) -> None:
        """The warps of the block become one; every thread finishes some columns."""
        m, cut, v_dim = self.m, self.cut, self.asked.v_dim
        peaks, totals = m.shared(WARPS * cut.vectors), m.shared(WARPS * cut.vectors)
        sums = m.shared(WARPS * cut.vectors * v_dim)
        with when(self.group == 0):
            for vector in range(cut.vectors):
                to = T.bind(m.warp_number * cut.vectors + vector)
                with when(self.own == 0):
                    T.buffer_store(peaks, self.peaks[vector], [to])
                    T.buffer_store(totals, self.totals[vector], [to])
                for piece in range(cut.value_pieces):
                    for i in range(cut.count):
                        column = T.bind(self.column(piece) + i)
                        value = self.sums[(vector * cut.value_pieces + piece) * cut.count + i]
                        if self.inside(piece, v_dim):
                            T.buffer_store(sums, value, [to * v_dim + column])
                        else:
                            with when(column < v_dim):
                                T.buffer_store(sums, value, [to * v_dim + column])
        parts = Parts(WARPS, cut.vectors, v_dim, peaks, totals, sums)
        parts.join(m, cut.rows, cut.heads, v_dim, self.tile, self.head0, self.heads_here, finish)
