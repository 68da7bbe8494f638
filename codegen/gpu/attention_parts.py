"""What every attention kernel of a GPU shares: what is asked for, its operands, which positions a token sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import CODES
from llmc.targets import GpuTarget

from .cache_codes import KIND_OF, decode
from .machine import BYTES, LOG2E, Machine, Registers, flat, i64, loop, when, widen

__all__ = ["Asked", "Columns", "Finish", "Memory", "Operands", "Parts", "Tile"]

# store(column, values): neighbouring columns of a query vector, the first of them int32, values not yet divided.
Columns = Callable[[Any, list[Any]], None]
# finish(row of q, head, peak, total) -> store, for a query vector: values / total is what attention gives, but for a
# sink; both are relative to 2**peak. A total of 0 says that no token was seen, and values mean nothing.
Finish = Callable[[Any, Any, Any, Any], Columns]


@dataclass(frozen=True)
class Asked:
    """The attention that a kernel computes: the parameters of `llmc.ir.paging.paged_attention`, and the target.

    latent: there are no pages of values, which are the first v_dim columns of the keys. cache: "int8" or "fp8" where
    pages hold codes.
    """

    target: GpuTarget
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str
    page_size: int
    scale: float
    softcap: float
    window: int
    chunk: int
    latent: bool
    cache: str = ""

    @property
    def stored(self) -> str:
        """The dtype of pages: of codes, where the cache is quantized."""
        return CODES[self.cache] if self.cache else self.dtype

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def first_seen(self, position: Any) -> Any:
        """The first position that a position sees, int32."""
        first = T.max(position - (self.window - 1), T.int32(0)) if self.window else T.int32(0)
        return T.max(first, T.floordiv(position, T.int32(self.chunk)) * self.chunk) if self.chunk else first

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that scores need little more: they are exponents of 2."""
        return self.scale / self.softcap if self.softcap else self.scale * LOG2E

    def capped(self, m: Machine, score: Any) -> Any:
        """A product of a key with a multiplied query as a score, base 2."""
        return m.tanh(score) * T.float32(self.softcap * LOG2E) if self.softcap else score


class Memory:
    """A tensor as flat memory, read in pieces of `count` elements: one access each, of up to 16 bytes.

    Codes of a quantized cache are read as the numbers that they say; their scale is another's business.
    """

    def __init__(self, m: Machine, buffer: Any, dtype: str, count: int):
        self.m, self.dtype, self.count = m, dtype, count
        self.wide = count * BYTES[dtype] >= 4
        self.view = flat(buffer, "uint32" if self.wide else None)
        self.words = max(1, count * BYTES[dtype] // 4)  # registers of a piece

    def registers(self, pieces: int) -> Registers:
        return self.m.registers(pieces * self.words, "uint32" if self.wide else str(self.view.dtype))

    def fetch(self, element: Any, to: Registers, piece: int) -> None:
        """The piece that begins with an element, a multiple of `count`."""
        if self.wide:
            self.m.fetch(self.view, element, self.dtype, to, piece * self.words, self.count)
        else:
            to[piece] = self.view[element]

    def floats(self, of: Registers, piece: int) -> list[Any]:
        """The elements of a piece, float32."""
        if kind := KIND_OF.get(self.dtype):
            if not self.wide:
                return [decode(self.m, kind, T.Cast("uint32", of[piece]))]
            words = [of[piece * self.words + i // 4] for i in range(self.count)]
            return [decode(self.m, kind, word, i % 4) for i, word in enumerate(words)]
        if self.wide:
            return self.m.unpack(of, piece * self.words, self.dtype, self.count)
        return [T.bind(widen(of[piece]))]


@dataclass
class Operands:
    """The buffers of a call, and how many rows and sequences there are. v: None where it is in the keys; scales: of a
    quantized cache, else None; of values that are in the keys those of the keys."""

    n: Any
    b: Any
    q: Any
    k: Any
    v: Any
    sinks: Any
    qo_indptr: Any
    kv_indptr: Any
    kv_indices: Any
    kv_last_page_len: Any
    out: Any
    k_scales: Any = None
    v_scales: Any = None


class Tile:
    """Some neighbouring new tokens of a sequence: rows row … row + rows - 1 of q, the first of them at `position`.

    begin, end: the positions that any of them sees; of a part of the cache, those in it.
    """

    def __init__(self, m: Machine, asked: Asked, o: Operands, s: Any, row: Any, rows: Any):
        self.asked, self.o, self.row, self.rows = asked, o, row, rows
        self.pages = T.bind(o.kv_indptr[s])
        length = T.bind((o.kv_indptr[s + 1] - self.pages - 1) * asked.page_size + o.kv_last_page_len[s])
        self.position = m.keep(length - (o.qo_indptr[s + 1] - row))
        self.begin = m.keep(asked.first_seen(self.position))
        self.end = m.keep(self.position + rows)
        self.lowest: Any = None  # the first position that may be read, where pieces begin before it

    def align(self, m: Machine, multiple: int) -> None:
        """Begin at a multiple of so many positions, at hidden ones if need be: they are read as the first seen one."""
        if self.asked.window or self.asked.chunk:
            self.lowest = self.begin
            self.begin = m.keep(T.floordiv(self.begin, T.int32(multiple)) * multiple)

    def share(self, m: Machine, parts: Any, least: int, multiple: int) -> Any:
        """How many positions each of so many parts has: at least so many, and a multiple of so many."""
        each = T.max(T.truncdiv(self.end - self.begin + (parts - 1), parts), T.int32(least))
        return m.keep(T.floordiv(each + (multiple - 1), T.int32(multiple)) * multiple)

    def only(self, m: Machine, part: Any, each: Any) -> None:
        """Keep the positions of one part; there may be none."""
        begin = m.keep(self.begin + part * each)
        self.end = m.keep(T.min(begin + each, self.end))
        self.begin = begin

    def token(self, m: Machine, position: Any, kv_head: Any) -> Any:
        """The number of the token at a position among all heads and slots of the pool, int64."""
        size = T.int32(self.asked.page_size)
        if self.lowest is not None:
            position = T.bind(T.max(position, self.lowest))
        number = i64(self.o.kv_indices[i64(self.pages + T.floordiv(position, size))])
        return (number * self.asked.kv_heads + kv_head) * self.asked.page_size + T.floormod(position, size)


@dataclass(frozen=True)
class Parts:
    """What the warps of a block found over tokens of their own, in shared memory.

    peaks, totals [warps, vectors]; sums [warps, vectors, width]; written, and no barrier passed yet.
    """

    warps: int
    vectors: int
    width: int
    peaks: Any
    totals: Any
    sums: Any

    def join(self, m: Machine, rows: int, heads: int, v_dim: int, tile: Tile, head0: Any, heads_here: Any,
             finish: Finish) -> None:  # fmt: skip
        """The parts become one: every thread finishes some columns. Vector number row * heads + head is a query."""
        m.barrier()
        with loop(rows * heads * v_dim - m.thread, step=m.threads) as offset:
            at = T.bind(offset + m.thread)
            vector, column = T.bind(T.floordiv(at, T.int32(v_dim))), T.bind(T.floormod(at, T.int32(v_dim)))
            row, head = T.floordiv(vector, T.int32(heads)), T.floormod(vector, T.int32(heads))
            with when(T.And(row < tile.rows, head < heads_here)):
                places = [T.bind(w * self.vectors + vector) for w in range(self.warps)]
                top: Any = self.peaks[places[0]]
                for place in places[1:]:
                    top = T.max(top, self.peaks[place])
                top = m.keep(top, "float32")
                total, value = m.registers(1), m.registers(1)
                total.fill(0)
                value.fill(0)
                for place in places:
                    shrink = m.exp2(self.peaks[place] - top)
                    total[0] = total[0] + self.totals[place] * shrink
                    value[0] = value[0] + self.sums[place * self.width + column] * shrink
                finish(T.bind(tile.row + row), T.bind(head0 + head), top, total[0])(column, [value[0]])
        m.barrier()
