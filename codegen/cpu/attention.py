"""Attention over a paged cache, ragged: prefill and decode of many sequences in one call.

Keys lie with their tokens last, so that one vector holds a few tokens of one column and scores need no horizontal sum.
A task is a few new tokens of one sequence and a few of the query heads that share a key head: they read each page
together. Online softmax over blocks of four pages, aligned to the sequence's beginning: what a row computes depends on
its own position alone. A row that shares a task with others meets pages that it can't see: there its peak stays,
its sums are multiplied by exactly 1 and added exactly 0. So its bits are the same alone, in a batch and in any chunk.

Of a quantized cache the numbers that codes say are multiplied and summed; a token's scale multiplies its score, which
is one number, and the weight of its values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import CODES, SCALE
from llmc.targets import CpuTarget

from .cache_codes import decode
from .vector import (
    Vector,
    bits,
    choose,
    chunks,
    i64,
    kernel,
    loop,
    opaque,
    prefetch,
    scratch,
    share_out,
    transpose_text,
    variable,
    when,
)

BLOCK_PAGES = 4  # pages between two updates of the peak
NOTHING = -1e30  # peak before the first key: exp(NOTHING - score) is 0
MASKED = -3e38  # a masked score: exp(MASKED - NOTHING) is 0 too


@dataclass(frozen=True)
class Tasks:
    """How work is cut: `rows` new tokens times `heads` query heads of one key head, of which there are `parts`."""

    rows: int
    heads: int
    parts: int

    @staticmethod
    def of(target: CpuTarget, kv_heads: int, group: int) -> "Tasks":
        """As many (row, head) pairs as have their scores in registers; enough tasks for all cores in decoding."""
        most = target.vector_registers * 3 // 8 if target.lanes > 8 else 6
        heads = min(group, most)
        while heads > 1 and kv_heads * -(-group // heads) < target.cores:
            heads = -(-heads // 2)
        parts = -(-group // heads)
        heads = -(-group // parts)
        return Tasks(max(1, most // heads), heads, parts)


def paged_attention(
    target: CpuTarget,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
    dtype: str,
    page_size: int,
    keys_token_last: bool,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
    sinks: bool = False,
    v_width: int = 0,
    cache: str = "",
    *,
    name: str = "paged_attention",
) -> tvm.tirx.PrimFunc:
    """The kernel of `llmc.ir.paging.paged_attention`: same parameters, same arguments, same meaning.

    Arguments of the PrimFunc, in this order:
      q [n, heads, head_dim] dtype; k_pages [p, kv_heads, head_dim, page_size] dtype;
      v_pages [p, kv_heads, page_size, v_dim] dtype, unless v_width > 0; sinks [heads] float32, if `sinks`;
      qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32; out [n, heads, v_dim] dtype.
    Of a quantized cache k_pages and v_pages are codes, each followed by its scales [p, kv_heads, page_size] float32.
    dtype: "float32" or "bfloat16"; scores, softmax and sums are float32, rounded once at the end. n and b may be 0.
    """
    if not keys_token_last or page_size % target.lanes or heads % kv_heads:
        raise ValueError(
            f"paged_attention on {target.name}: expected keys with tokens last, pages of a multiple of {target.lanes} "
            f"tokens and heads in equal groups, found keys_token_last={keys_token_last}, page_size={page_size}, "
            f"{heads} heads over {kv_heads}"
        )
    attend = _Attend(target, heads, kv_heads, head_dim, v_dim, page_size, scale, softcap, window, chunk, bool(v_width))
    stored = CODES[cache] if cache else dtype
    params: list = [("q", ("n", heads, head_dim), dtype), ("k_pages", ("p", kv_heads, head_dim, page_size), stored)]
    if cache:
        params.append(("k_scales", ("p3", kv_heads, page_size), SCALE))
    if not v_width:
        params.append(("v_pages", ("p2", kv_heads, page_size, v_dim), stored))
    if cache and not v_width:
        params.append(("v_scales", ("p4", kv_heads, page_size), SCALE))
    if sinks:
        params.append(("sinks", (heads,), "float32"))
    params += [("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"), ("kv_indices", ("r",), "int32"),
               ("kv_last_page_len", ("b",), "int32"), ("out", ("n", heads, v_dim), dtype)]  # fmt: skip

    def body(symbols: dict, q: Any, *rest: Any) -> None:
        arguments = list(rest)

        def pool() -> _Pool:
            return _Pool(bits(arguments.pop(0)), cache, arguments.pop(0) if cache else None)

        k = pool()
        v = None if v_width else pool()
        sink = arguments.pop(0) if sinks else None
        attend.emit(symbols["n"], symbols["b"], bits(q), k, v, sink, arguments[:4], bits(arguments[4]))

    return kernel(name, params, body, target, transpose_text(target.lanes) if v_width else "")


@dataclass(frozen=True)
class _Pool:
    """Pages of keys or of values; codes of a quantized cache, and their scales."""

    pages: Any
    cache: str
    scales: Any

    @property
    def bytes(self) -> int:
        """Of a number."""
        return {"uint16": 2, "int8": 1, "uint8": 1}.get(str(self.pages.dtype), 4)

    def load(self, v: Vector, indices: list) -> Any:
        """Neighbouring numbers, float32; those that codes say are not yet multiplied by a scale."""
        if not self.cache:
            return v.load(self.pages, indices)
        return decode(v, self.cache, self.pages.vload(indices, v.dtype(str(self.pages.dtype))))


@dataclass(frozen=True)
class _Attend:
    target: CpuTarget
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    page_size: int
    scale: float
    softcap: float
    window: int
    chunk: int
    latent: bool

    @property
    def tasks(self) -> Tasks:
        return Tasks.of(self.target, self.kv_heads, self.heads // self.kv_heads)

    @property
    def vector(self) -> Vector:
        return Vector(self.target.lanes)

    @property
    def block(self) -> int:
        """Tokens between two updates of the peak."""
        return BLOCK_PAGES * self.page_size

    def emit(self, n: Any, b: Any, q: Any, k: _Pool, v: _Pool | None, sink: Any, tables: list, out: Any) -> None:
        qo_indptr, kv_indptr, kv_indices, kv_last_page_len = tables
        cut, group = self.tasks, self.heads // self.kv_heads
        # The row blocks of all sequences: the sequence and the first row of each.
        sequences, firsts = scratch([n + 1], "int32"), scratch([n + 1], "int32")
        count = variable("int32", T.int32(0))
        with loop(0, b) as s:
            rows = T.bind(qo_indptr[s + 1] - qo_indptr[s])
            with loop(0, T.floordiv(rows + (cut.rows - 1), T.int32(cut.rows))) as i:
                T.buffer_store(sequences, T.Cast("int32", s), [count[0]])
                T.buffer_store(firsts, qo_indptr[s] + T.Cast("int32", i * cut.rows), [count[0]])
                T.buffer_store(count, count[0] + 1, [0])
        blocks = T.bind(count[0])
        each = self.kv_heads * cut.parts

        def work(item: Any, state: "_State") -> None:
            # The last rows of a sequence see the most keys: they go first.
            at = opaque(i64(blocks) - 1 - T.floordiv(item, T.int64(each)))
            head = opaque(T.floormod(item, T.int64(each)))
            kv_head = opaque(T.floordiv(head, T.int64(cut.parts)))
            part = opaque(T.floormod(head, T.int64(cut.parts)))
            s, row = T.bind(sequences[at]), T.bind(firsts[at])
            rows = opaque(T.min(qo_indptr[s + 1] - row, T.int32(cut.rows)), "int32")
            pages = T.bind(kv_indptr[s])
            length = T.bind((kv_indptr[s + 1] - pages - 1) * self.page_size + kv_last_page_len[s])
            position = opaque(length - (qo_indptr[s + 1] - row), "int32")
            head0 = opaque(kv_head * group + part * cut.heads)
            heads_here = opaque(T.min(T.int64(cut.heads), group - part * cut.heads))

            self.begin(state, q, sink, row, rows, position, head0, heads_here)
            first = opaque(T.floordiv(self.first_seen(position), T.int32(self.page_size)), "int32")
            last = T.bind(position + rows)  # one after the last position that is seen
            end = opaque(T.floordiv(last + (self.page_size - 1), T.int32(self.page_size)), "int32")
            last_block = T.floordiv(end + (BLOCK_PAGES - 1), T.int32(BLOCK_PAGES))
            with loop(T.floordiv(first, T.int32(BLOCK_PAGES)), last_block) as kb:
                start = T.bind(kb * BLOCK_PAGES)
                lo, hi = opaque(T.max(start, i64(first))), opaque(T.min(start + BLOCK_PAGES, i64(end)))

                def page_of(page: Any) -> Any:
                    return T.bind(i64(kv_indices[i64(pages) + page]))

                def scores(pairs: int, lo: Any = lo, hi: Any = hi, start: Any = start) -> Callable[[], None]:
                    return lambda: self.scores(state, k, v, kv_head, page_of, lo, hi, start, pairs)

                def values(pairs: int, lo: Any = lo, hi: Any = hi, start: Any = start) -> Callable[[], None]:
                    return lambda: self.values(state, k, v, kv_head, page_of, lo, hi, start, i64(last), i64(end), pairs)

                # One row alone, as in decoding, or a full set: the rows that lack are masked.
                few, all_ = cut.heads, cut.rows * cut.heads
                choose([(rows == 1, scores(few))] if few < all_ else [], scores(all_))
                self.softmax(state, start * self.page_size, i64(rows) * cut.heads)
                choose([(rows == 1, values(few))] if few < all_ else [], values(all_))
            self.finish(state, out, row, rows, head0, heads_here)

        share_out(blocks * each, work, lambda: _State(self, scaled=k.scales is not None))

    def first_seen(self, position: Any) -> Any:
        """The first position that a position sees."""
        first = T.max(position - (self.window - 1), T.int32(0)) if self.window else T.int32(0)
        return T.max(first, T.floordiv(position, T.int32(self.chunk)) * self.chunk) if self.chunk else first

    def begin(self, state: "_State", q: Any, sink: Any, row: Any, rows: Any, position: Any, head0: Any,
              heads_here: Any) -> None:  # fmt: skip
        """Queries as float32, ranges of positions, empty sums."""
        cut, v = self.tasks, self.vector
        with loop(0, cut.rows) as r, loop(0, cut.heads) as h:
            m = opaque(r * cut.heads + h)
            there = T.bind(T.And(r < i64(rows), h < heads_here))
            own = T.bind(position + T.Cast("int32", r))
            T.buffer_store(state.first, T.Select(there, self.first_seen(own), T.int32(0)), [m])
            T.buffer_store(state.last, T.Select(there, own, T.int32(-1)), [m])
            for offset, width in chunks(self.head_dim, v.lanes):
                if width == v.lanes and offset:
                    continue
                part = Vector(width)

                def put(at: Any, part: Vector = part, m: Any = m, r: Any = r, h: Any = h, there: Any = there) -> None:
                    def copy() -> None:
                        part.store(state.queries, part.load(q, [i64(row) + r, head0 + h, at]), [m, at])

                    choose([(there, copy)], lambda: part.store(state.queries, part.const(0.0), [m, at]))

                if width == v.lanes:
                    with loop(0, self.head_dim // v.lanes) as i:
                        put(i * v.lanes)
                else:
                    put(T.int64(offset))
            if sink is None:
                T.buffer_store(state.peak, T.float32(NOTHING), [m])
                v.store(state.total, v.const(0.0), [m, T.int64(0)])
            else:
                score = T.if_then_else(there, sink[head0 + h], T.float32(0))
                T.buffer_store(state.peak, score, [m])
                v.store(state.total, v.const(0.0), [m, T.int64(0)])
                T.buffer_store(state.total, T.float32(1), [m, T.int64(0)])
            with loop(0, state.width // v.lanes) as i:
                v.store(state.sums, v.const(0.0), [m, i * v.lanes])

    def ahead(self, pool: _Pool, number: Any, kv_head: Any, part: Any, parts: int) -> None:
        """Prefetch one of so many parts of a page of one head, which the hardware can't guess: pages lie anywhere.

        Keys ask for the values of the same page, values for the keys of the next block.
        """
        buffer, size = pool.pages, 1
        for extent in buffer.shape[2:]:
            size *= int(extent)
        line = 64 // pool.bytes
        lines = -(-size // line)
        flat = T.decl_buffer((*buffer.shape[:2], T.int64(size)), buffer.dtype, data=buffer.data)
        each = -(-lines // parts)
        for i in range(each):
            prefetch(flat, [number, kv_head, T.min(part * each + i, T.int64(lines - 1)) * line])

    def scores(self, state: "_State", k: _Pool, values: _Pool | None, kv_head: Any, page_of: Callable, lo: Any, hi: Any,
               start: Any, pairs: int) -> None:  # fmt: skip
        """state.scores[m, token of the block] = q . k for the pages lo … hi; m < pairs."""
        v = self.vector
        across = self.page_size // v.lanes
        with loop(lo, hi) as page:
            number = page_of(page)
            sums = [[v.register(v.const(0.0)) for _ in range(across)] for _ in range(pairs)]

            def column(c: Any, number: Any = number, sums: list = sums) -> None:
                keys = [k.load(v, [number, kv_head, c, T.int64(j * v.lanes)]) for j in range(across)]
                if values is not None and pairs == self.tasks.heads:
                    self.ahead(values, number, kv_head, c, self.head_dim)
                for m in range(pairs):
                    x = T.bind(v.broadcast(state.queries[m, c]))
                    for j in range(across):
                        sums[m][j].set(v.fma(keys[j], x, sums[m][j].get()))

            with loop(0, self.head_dim // 4) as four:
                for c in range(4):
                    column(four * 4 + c)
            for c in range(self.head_dim // 4 * 4, self.head_dim):
                column(T.int64(c))
            at = T.bind((page - start) * self.page_size)
            for j in range(across):
                if k.scales is not None:
                    scales = [v.load(p.scales, [number, kv_head, T.int64(j * v.lanes)]) for p in (k, values or k)]
                    v.store(state.scales, scales[1], [at + j * v.lanes])
                for m in range(pairs):
                    score = sums[m][j].get()
                    if k.scales is not None:
                        score = score * scales[0]
                    v.store(state.scores, score, [T.int64(m), at + j * v.lanes])

    def softmax(self, state: "_State", token0: Any, pairs: Any) -> None:
        """Scores to exp(score - peak), 0 where masked; peak, totals and sums moved to the new peak.

        Of a quantized cache each is multiplied by the scale of its token's values, once it is in the total.
        """
        v = self.vector
        with loop(0, pairs) as m:
            first, last = T.bind(v.broadcast(state.first[m])), T.bind(v.broadcast(state.last[m]))
            offsets = range(0, self.block, v.lanes)
            found, all_seen = [], []
            for at in offsets:
                token = T.bind(v.ramp(token0 + at))
                score = T.bind(v.load(state.scores, [m, T.int64(at)]) * v.const(self.scale))
                if self.softcap:
                    score = T.bind(v.tanh(score * v.const(1 / self.softcap)) * v.const(self.softcap))
                seen = T.bind(T.bitwise_and(token >= first, token <= last))
                found.append(T.bind(T.Select(seen, score, v.const(MASKED))))
                all_seen.append(seen)
            top = found[0]
            for score in found[1:]:
                top = T.bind(T.max(top, score))
            old = T.bind(state.peak[m])
            peak = T.bind(T.max(old, v.maximum_of_lanes(top)))
            total = v.const(0.0)
            for at, score, seen in zip(offsets, found, all_seen, strict=True):
                p = v.exp(score - v.broadcast(peak))
                weight = p
                if state.scales is not None:  # a slot that nothing was written to has any scale, even NaN
                    weight = T.bind(T.Select(seen, p * v.load(state.scales, [T.int64(at)]), v.const(0.0)))
                v.store(state.scores, weight, [m, T.int64(at)])
                total = T.bind(total + p)
            with when(peak > old):
                shrink = v.exp(v.broadcast(old - peak))
                T.buffer_store(state.peak, peak, [m])
                v.store(state.total, v.load(state.total, [m, T.int64(0)]) * shrink, [m, T.int64(0)])
                with loop(0, state.width // v.lanes) as i:
                    v.store(state.sums, v.load(state.sums, [m, i * v.lanes]) * shrink, [m, i * v.lanes])
            v.store(state.total, v.load(state.total, [m, T.int64(0)]) + total, [m, T.int64(0)])

    def values(self, state: "_State", k: _Pool, values: _Pool | None, kv_head: Any, page_of: Callable, lo: Any, hi: Any,
               start: Any, last: Any, end: Any, pairs: int) -> None:  # fmt: skip
        """state.sums[m] += p . v for the tokens of the pages lo … hi before `last`; m < pairs."""
        lanes = self.target.lanes

        def accumulate(offset: Any, widths: list[int], pages: tuple[Any, Any], load: Callable) -> None:
            offsets = [sum(widths[:i]) for i in range(len(widths))]
            parts = [Vector(w) for w in widths]
            sums = [
                [p.register(p.load(state.sums, [T.int64(m), offset + o])) for p, o in zip(parts, offsets, strict=True)]
                for m in range(pairs)
            ]
            with loop(*pages) as page:
                number = page_of(page)
                at = T.bind((page - start) * self.page_size)
                soon = page_of(T.min(page + BLOCK_PAGES, end - 1))
                with loop(0, T.min(T.int64(self.page_size), last - page * self.page_size)) as t:
                    if pairs == self.tasks.heads:
                        self.ahead(k, soon, kv_head, t, self.page_size)
                    columns = [load(p, number, t, offset + o) for p, o in zip(parts, offsets, strict=True)]
                    for m in range(pairs):
                        weight = T.bind(state.scores[m, at + t])
                        for part, register, column in zip(parts, sums[m], columns, strict=True):
                            register.set(part.fma(column, part.broadcast(weight), register.get()))
            for m in range(pairs):
                for part, register, o in zip(parts, sums[m], offsets, strict=True):
                    part.store(state.sums, register.get(), [T.int64(m), offset + o])

        def all_columns(pages: tuple[Any, Any], load: Callable) -> None:
            full = self.v_dim // lanes
            most = max(1, self.target.vector_registers * 3 // 4 // pairs)
            at_once = -(-full // -(-full // most)) if full else 1
            if full // at_once:
                with loop(0, full // at_once) as i:
                    accumulate(i * (at_once * lanes), [lanes] * at_once, pages, load)
            if full % at_once:
                accumulate(T.int64(full // at_once * at_once * lanes), [lanes] * (full % at_once), pages, load)
            for offset, width in chunks(self.v_dim, lanes):
                if width < lanes:
                    accumulate(T.int64(offset), [width], pages, load)

        if values is not None:
            all_columns((lo, hi), lambda part, number, t, c: values.load(part, [number, kv_head, t, c]))
            return
        with loop(lo, hi) as page:
            self.transpose(state, k, kv_head, page_of(page))
            all_columns((page, page + 1), lambda part, number, t, c: part.load(state.turned, [t, c]))

    def transpose(self, state: "_State", k: _Pool, kv_head: Any, number: Any) -> None:
        """state.turned[token, column] = the page's columns that are values."""
        v = self.vector
        square = v.lanes

        def turn(column: Any) -> None:
            for j in range(0, self.page_size, square):
                for c in range(square):
                    v.store(
                        state.square, k.load(v, [number, kv_head, column + c, T.int64(j)]), [T.int64(c), T.int64(0)]
                    )
                T.evaluate(
                    T.call_extern("void", f"llmc_transpose_{square}", T.address_of(state.square[0, 0]),
                                  T.address_of(state.turned[j, column]), T.int64(state.width * 4))
                )  # fmt: skip

        if self.v_dim >= square:
            with loop(0, self.v_dim // square) as i:
                turn(i * square)
        for c in range(self.v_dim // square * square, self.v_dim):
            for j in range(self.page_size):
                one = Vector(1)
                one.store(
                    state.turned, k.load(one, [number, kv_head, T.int64(c), T.int64(j)]), [T.int64(j), T.int64(c)]
                )

    def finish(self, state: "_State", out: Any, row: Any, rows: Any, head0: Any, heads_here: Any) -> None:
        """Sums over totals, to out."""
        cut, v = self.tasks, self.vector
        with loop(0, rows) as r, loop(0, heads_here) as h:
            m = T.bind(r * cut.heads + h)
            total = v.sum_of_lanes(v.load(state.total, [m, T.int64(0)]))

            def put(part: Vector, at: Any, m: Any = m, r: Any = r, h: Any = h, total: Any = total) -> None:
                value = part.load(state.sums, [m, at]) / part.broadcast(total)
                part.store(out, T.bind(value), [i64(row) + r, head0 + h, at])

            with loop(0, self.v_dim // v.lanes) as i:
                put(v, i * v.lanes)
            for offset, width in chunks(self.v_dim, v.lanes):
                if width < v.lanes:
                    put(Vector(width), T.int64(offset))


class _State:
    """Scratch of one thread, for the pairs (row, head) of a task."""

    def __init__(self, attend: _Attend, *, scaled: bool):
        v, pairs = attend.vector, attend.tasks.rows * attend.tasks.heads
        self.width = math.ceil(attend.v_dim / v.lanes) * v.lanes
        self.queries = scratch([pairs, math.ceil(attend.head_dim / v.lanes) * v.lanes])
        self.scores = scratch([pairs, attend.block])  # then their exponentials
        self.sums = scratch([pairs, self.width])  # of weighted values
        self.total = scratch([pairs, v.lanes])  # of exponentials, lane by lane
        self.peak = scratch([pairs])
        self.first, self.last = scratch([pairs], "int32"), scratch([pairs], "int32")  # positions that a pair sees
        self.scales = scratch([attend.block]) if scaled else None  # of the values of a block
        if attend.latent:
            self.turned = scratch([attend.page_size, self.width])
            self.square = scratch([v.lanes, v.lanes])
