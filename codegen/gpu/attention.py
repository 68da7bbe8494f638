"""Attention over a paged cache, ragged: prefill and decode of many sequences in one call.

Two kernels share the sequences of a step. Sequences with few new tokens go to the one that splits the cache: several
blocks read parts of it, and a merge joins what they found. The others go to the one that cuts rows into tiles. Which is
which stands in device memory: a block looks, and has nothing to do where a sequence is not its own. Grids depend on the
numbers of rows and sequences alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import SCALE
from llmc.targets import GpuTarget

from . import attention_lanes as lanes
from . import attention_latent as latent
from . import attention_squares as squares
from . import attention_tiles as tiles
from .attention_parts import Asked, Columns, Finish, Operands, Tile
from .machine import BYTES, INVARIANT, LOG2E, Machine, flat, i32, i64, kernel, loop, when
from .ragged import sequence_of

__all__ = ["paged_attention"]

SPLITS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a sequence's cache, if its blocks alone don't fill the machine
LEAST_TOKENS = 64  # of a split: one tile, or two rounds of lanes
BLOCKS = 4  # a multiprocessor's, that keep enough loads under way


def paged_attention(
    target: GpuTarget,
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
    batch_invariant: bool | None = False,
    name: str = "paged_attention",
) -> tvm.tirx.PrimFunc:
    """The kernel of `llmc.ir.paging.paged_attention`: same parameters, same arguments, same meaning.

    Arguments of the PrimFunc, in this order:
      q [n, heads, head_dim] dtype; k_pages [p, kv_heads, page_size, head_dim] dtype;
      v_pages [p, kv_heads, page_size, v_dim] dtype, unless v_width > 0; sinks [heads] float32, if `sinks`;
      qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32; out [n, heads, v_dim] dtype.
    Of a quantized cache k_pages and v_pages are codes, each followed by its scales [p, kv_heads, page_size] float32.
    dtype: "float32", "float16" or "bfloat16"; scores, softmax and sums are float32, rounded once at the end. n and b
    may be 0. batch_invariant: a token's numbers are the same bits whatever else is in the step, other tokens of its
    own sequence too: all sequences go to the kernel that cuts rows into tiles, which leaves most of the machine idle
    where sequences are few. None: every call says, by the argument `invariant` (int64, 0 or 1), right before out.
    """
    if keys_token_last or heads % kv_heads:
        raise ValueError(
            f"paged_attention on {target.name}: expected keys with tokens before columns and heads in equal groups, "
            f"found keys_token_last={keys_token_last}, {heads} heads over {kv_heads}"
        )
    asked = Asked(
        target, heads, kv_heads, head_dim, v_dim, dtype, page_size, scale, softcap, window, chunk, v_width > 0, cache
    )  # fmt: skip
    stored = asked.stored
    params: list = [("q", ("n", heads, head_dim), dtype), ("k_pages", ("p", kv_heads, page_size, head_dim), stored)]
    if cache:
        params.append(("k_scales", ("p3", kv_heads, page_size), SCALE))
    if not v_width:
        params.append(("v_pages", ("p2", kv_heads, page_size, v_dim), stored))
    if cache and not v_width:
        params.append(("v_scales", ("p4", kv_heads, page_size), SCALE))
    if sinks:
        params.append(("sinks", (heads,), "float32"))
    params += [("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"), ("kv_indices", ("r",), "int32"),
               ("kv_last_page_len", ("b",), "int32"), *([INVARIANT] if batch_invariant is None else []),
               ("out", ("n", heads, v_dim), dtype)]  # fmt: skip

    def body(symbols: dict, q: Any, *rest: Any) -> None:
        arguments = list(rest)
        k, k_scales = arguments.pop(0), flat(arguments.pop(0)) if cache else None
        v, v_scales = None, k_scales
        if not v_width:
            v, v_scales = arguments.pop(0), flat(arguments.pop(0)) if cache else None
        sink = arguments.pop(0) if sinks else None
        invariant = arguments.pop(-2) if batch_invariant is None else batch_invariant
        qo, kv, indices, last, out = arguments
        o = Operands(symbols["n"], symbols["b"], q, k, v, sink, qo, kv, indices, last, out, k_scales, v_scales)
        with when(T.And(o.n > 0, o.b > 0)):
            _Launches(asked, o).emit(invariant)

    return kernel(name, params, body)


Cut = lanes.Cut | tiles.Tiling | squares.Squares | latent.Latent


def cut_of(asked: Asked, *, decode: bool) -> Cut:
    """How work is cut for the best that the target has: a matrix unit, or lanes alone."""
    for kind in (tiles.Tiling, latent.Latent, squares.Squares):
        if cut := kind.of(asked, decode=decode):
            return cut
    return lanes.Cut.of(asked, decode=decode)


class _Launches:
    """The launches of one call."""

    def __init__(self, asked: Asked, o: Operands):
        self.m, self.asked, self.o = Machine(asked.target), asked, o
        self.few, self.many = cut_of(asked, decode=True), cut_of(asked, decode=False)

    def emit(self, invariant: Any) -> None:
        """invariant: whether only what sums in one order may run, known now (a bool) or at the call (int64)."""
        if invariant is True:
            self.prefill(T.int32(0))
        elif invariant is False:
            self.shared(None)
        else:
            self.shared(invariant == 0)

    def shared(self, may: Any) -> None:
        """Both kernels, each with its sequences; may: whether the splitting one may have any, None: always."""
        asked, o, few = self.asked, self.o, self.few
        # Where every sequence could have one row, the splitting kernel takes them all, also those that have more.
        alike = o.n <= o.b
        everything = T.bind(T.Cast("int32", alike if may is None else T.And(may, alike)))
        # By comparison: common subexpressions move out of the guard against no sequences, a division with them.
        blocks = o.b * (asked.kv_heads * few.parts(asked))
        fill = max(1, asked.target.multiprocessors) * BLOCKS
        count: Any = T.int32(1)
        for splits in SPLITS:
            count = T.Select(blocks * splits <= fill, T.int32(splits), count)
        splits = T.bind(count)
        found = T.bind(i64(splits) * (o.b * (few.rows * asked.heads)))  # query vectors, split by split
        sums = T.alloc_buffer((found * asked.v_dim,), "float32", scope="global")
        marks = T.alloc_buffer((found * 2,), "float32", scope="global")  # peak and total
        few_rows = T.int32(few.rows) if may is None else T.bind(T.Select(may, T.int32(few.rows), T.int32(0)))
        with nullcontext() if may is None else when(may):
            self.decode(splits, everything, sums, marks)
            with when(splits > 1):
                self.merge(splits, everything, sums, marks)
        with when(everything == 0):
            self.prefill(few_rows)

    def head(self, cut: Cut, block: Any) -> tuple[Any, Any]:
        """The key head of a block and which part of its query heads."""
        parts = cut.parts(self.asked)
        return T.bind(T.floordiv(block, T.int32(parts))), T.bind(T.floormod(block, T.int32(parts)))

    def rows_of(self, s: Any, everything: Any) -> tuple[Any, Any]:
        """The first row of a sequence and how many of its rows the splitting kernel takes."""
        row = self.m.keep(self.o.qo_indptr[s])
        rows = T.bind(self.o.qo_indptr[s + 1] - row)
        mine = T.Or(everything == 1, rows <= self.few.rows)
        return row, self.m.keep(T.Select(mine, rows, T.int32(0)))

    def decode(self, splits: Any, everything: Any, sums: Any, marks: Any) -> None:
        """A block reads a part of the cache of one sequence, for heads that share a key head."""
        m, asked, o, cut = self.m, self.asked, self.o, self.few
        grid = [o.b, asked.kv_heads * cut.parts(asked), splits]
        with m.launch(grid, cut.warps * m.warp) as [block, head, split]:
            s = T.bind(i64(block))
            first, count = self.rows_of(s, everything)
            kv_head, part = self.head(cut, head)
            with loop(T.floordiv(count + (cut.rows - 1), T.int32(cut.rows))) as i:
                done = T.bind(i * cut.rows)
                tile = Tile(m, asked, o, s, T.bind(first + done), m.keep(T.min(count - done, T.int32(cut.rows))))
                tile.only(m, split, tile.share(m, splits, LEAST_TOKENS, cut.step(m.warp)))
                # Vectors have their row's place if all rows are here, else one of their sequence's.
                place = m.keep(T.Select(everything == 1, first + done, block * cut.rows))

                def found(row: Any, head: Any, peak: Any, total: Any, tile: Tile = tile, place: Any = place) -> Columns:
                    """What a split found, or the answer where there is but one."""

                    def store(column: Any, values: list[Any]) -> None:
                        with T.If(splits == 1):
                            with T.Then():
                                self.answer(row, head, peak, total)(column, values)
                            with T.Else():
                                vector = T.bind(place + (row - tile.row))
                                to = T.bind((i64(split) * (o.b * cut.rows) + vector) * asked.heads + head)
                                for i, value in enumerate(values):
                                    T.buffer_store(sums, value, [to * asked.v_dim + column + i])
                                with when(column == 0):
                                    T.buffer_store(marks, peak, [to * 2])
                                    T.buffer_store(marks, total, [to * 2 + 1])

                    return store

                with when(tile.begin < tile.end):
                    self.attend(cut, tile, kv_head, part, found)

    def merge(self, splits: Any, everything: Any, sums: Any, marks: Any) -> None:
        """A block joins what the splits found for one head of one sequence."""
        m, asked, o, cut = self.m, self.asked, self.o, self.few
        with m.launch([o.b, asked.heads], -(-min(asked.v_dim, 256) // m.warp) * m.warp) as [block, head]:
            s = T.bind(i64(block))
            first, count = self.rows_of(s, everything)
            peaks, totals = m.shared(max(SPLITS)), m.shared(max(SPLITS))
            with loop(count) as i:
                done = T.bind(T.floordiv(i, T.int32(cut.rows)) * cut.rows)
                tile = Tile(m, asked, o, s, T.bind(first + done), m.keep(T.min(count - done, T.int32(cut.rows))))
                each = tile.share(m, splits, LEAST_TOKENS, cut.step(m.warp))
                used = m.keep(T.truncdiv(tile.end - tile.begin + (each - 1), each))  # the others had no tokens
                place = m.keep(T.Select(everything == 1, first, block * cut.rows) + i)

                def at(split: Any, place: Any = place) -> Any:
                    return T.bind((i64(split) * (o.b * cut.rows) + place) * asked.heads + head)

                with loop(used - m.thread, step=m.threads) as offset:
                    found = at(offset + m.thread)
                    T.buffer_store(peaks, marks[found * 2], [offset + m.thread])
                    T.buffer_store(totals, marks[found * 2 + 1], [offset + m.thread])
                m.barrier()
                peak, total, value = m.registers(1), m.registers(1), m.registers(1)
                peak[0] = peaks[0]
                with loop(used) as split:
                    peak[0] = T.max(peak[0], peaks[split])
                with loop(asked.v_dim - m.thread, step=m.threads) as offset:
                    column = T.bind(offset + m.thread)
                    total.fill(0)
                    value.fill(0)
                    with loop(used) as split:
                        shrink = m.exp2(peaks[split] - peak[0])
                        total[0] = total[0] + totals[split] * shrink
                        value[0] = value[0] + sums[at(split) * asked.v_dim + column] * shrink
                    self.answer(T.bind(first + i), head, peak[0], total[0])(column, [value[0]])
                m.barrier()

    def prefill(self, few: Any) -> None:
        """A block computes a tile of rows of one sequence with more than `few`, for heads that share a key head.

        Keys are taken in pieces that begin at multiples of a piece: a row's sums are in one order, whatever its tile.
        The tiles of sequence s have the numbers from ⌊qo_indptr[s] / rows⌋ + s on: more than it needs, by one at most,
        and found without counting what comes before.
        """
        m, asked, o, cut = self.m, self.asked, self.o, self.many
        numbers = T.bind(T.floordiv(o.n, T.int64(cut.rows)) + o.b)
        with m.launch([numbers, asked.kv_heads * cut.parts(asked)], cut.warps * m.warp) as [block, head]:

            def begin(s: Any) -> Any:
                return T.floordiv(o.qo_indptr[s], T.int32(cut.rows)) + T.Cast("int32", s)

            number = T.bind(i32(numbers) - 1 - block)  # the last rows of a sequence see the most keys: they go first
            found = sequence_of(m, o.b, begin, number)
            with when(found >= 0):
                s = T.bind(i64(found))
                row = m.keep(o.qo_indptr[s] + (number - begin(s)) * cut.rows)
                rows = m.keep(T.min(o.qo_indptr[s + 1] - row, T.int32(cut.rows)))
                with when(T.And(rows > 0, o.qo_indptr[s + 1] - o.qo_indptr[s] > few)):
                    tile = Tile(m, asked, o, s, row, rows)
                    tile.align(m, cut.step(m.warp))
                    kv_head, part = self.head(cut, head)
                    self.attend(cut, tile, kv_head, part, self.answer)

    def attend(self, cut: Cut, tile: Tile, kv_head: Any, part: Any, finish: Finish) -> None:
        """One block's work on a tile."""
        m, asked, o = self.m, self.asked, self.o
        if isinstance(cut, tiles.Tiling):
            tiles.attend(m, asked, cut, o, tile, kv_head, part, finish)
        elif isinstance(cut, latent.Latent):
            latent.attend(m, asked, cut, o, tile, kv_head, part, finish)
        elif isinstance(cut, squares.Squares):
            squares.attend(m, asked, cut, o, tile, kv_head, part, finish)
        else:
            lanes.attend(m, asked, cut, o, tile, kv_head, part, finish)

    def answer(self, row: Any, head: Any, peak: Any, total: Any) -> Columns:
        """Stores columns of the answer of one query vector. A sink joins its head's softmax as one more score."""
        m, asked, o = self.m, self.asked, self.o
        share = T.float32(1) / total
        if o.sinks is not None:
            sink = m.keep(o.sinks[head] * T.float32(LOG2E), "float32")
            top = m.keep(T.max(peak, sink), "float32")
            shrink = m.exp2(peak - top)
            share = shrink / (total * shrink + m.exp2(sink - top))
        share = m.keep(share, "float32")
        first = m.keep((i64(row) * asked.heads + head) * asked.v_dim, "int64")

        def store(column: Any, values: list[Any]) -> None:
            values = [v * share for v in values]
            if len(values) == 1:
                m.store(flat(o.out), [first + column], values[0])
            else:
                packed = m.registers(len(values) * BYTES[asked.dtype] // 4, "uint32")
                m.pack(values, asked.dtype, packed, 0)
                m.put(flat(o.out, "uint32"), first + column, asked.dtype, packed, 0, len(values))

        return store
