"""Writing to the pages of the cache: new keys and values, and whole pages copied."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import CODES, LARGEST, SCALE
from llmc.targets import GpuTarget

from ..cpu.vector import Params
from .attention_parts import Memory
from .cache_codes import LEAST_BITS, encode, magnitude
from .machine import BYTES, Machine, flat, i32, i64, kernel, loop, when, whole
from .ragged import sequence_of

__all__ = ["append_pages", "copy_pages"]

THREADS = 128  # of a block; a row of 8 heads of 128 float16 numbers is 128 accesses of 16 bytes


def append_pages(
    target: GpuTarget,
    kv_heads: int,
    width: int,
    dtype: str,
    page_size: int,
    token_last: bool,
    cache: str = "",
    *,
    name: str = "append_pages",
) -> tvm.tirx.PrimFunc:
    """The kernel of `llmc.ir.paging.append_pages`: same parameters, same arguments, same meaning; in place.

    Arguments of the PrimFunc, in this order:
      pages [p, kv_heads, page_size, width] dtype, or [p, kv_heads, width, page_size] if token_last; of a quantized
      cache its codes, and scales [p, kv_heads, page_size] float32;
      x [n, kv_heads, width] dtype; qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32.
    One block a row; rows of no sequence are left out. Of a quantized cache a warp has a head at a time.
    """
    page = (width, page_size) if token_last else (page_size, width)
    params: list = [("pages", ("p", kv_heads, *page), CODES[cache] if cache else dtype)]
    if cache:
        params.append(("scales", ("p2", kv_heads, page_size), SCALE))
    params += [("x", ("n", kv_heads, width), dtype), ("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"),
               ("kv_indices", ("r",), "int32"), ("kv_last_page_len", ("b",), "int32")]  # fmt: skip
    at_once = 1 if token_last else whole(width, dtype)
    unit = "uint32" if at_once * BYTES[dtype] >= 4 else None

    def body(symbols: dict, pages: Any, *rest: Any) -> None:
        m = Machine(target)
        x, qo, kv, indices, last = rest[-5:]
        codes = _Codes(m, cache, pages, rest[0], x, dtype, kv_heads, width, page_size, token_last) if cache else None
        if codes is None:
            pages, x = flat(pages, unit), flat(x, unit)
        with when(symbols["n"] > 0), m.launch([symbols["n"]], THREADS) as [row]:
            s = sequence_of(m, symbols["b"], lambda s: qo[s], row)
            with when(s >= 0):
                s = i64(s)
                pages_of = T.bind(kv[s])
                length = T.bind((kv[s + 1] - pages_of - 1) * page_size + last[s])
                position = T.bind(length - (qo[s + 1] - row))
                number = m.keep(i64(indices[i64(pages_of + T.floordiv(position, T.int32(page_size)))]), "int64")
                slot = m.keep(T.floormod(position, T.int32(page_size)))
                if codes is not None:
                    codes.write(row, number, slot)
                    return
                copied = m.registers(4, "uint32") if unit else None
                with loop(kv_heads * width // at_once - m.thread, step=THREADS) as offset:
                    element = T.bind((offset + m.thread) * at_once)
                    head = T.bind(T.floordiv(element, T.int32(width)))
                    column = T.bind(T.floormod(element, T.int32(width)))
                    source = T.bind(i64(row) * (kv_heads * width) + element)
                    plane = T.bind((number * kv_heads + head) * (page_size * width))
                    if token_last:
                        T.buffer_store(pages, x[source], [plane + column * page_size + slot])
                    elif copied is None:
                        T.buffer_store(pages, x[source], [plane + slot * width + column])
                    else:
                        m.fetch(x, source, dtype, copied, 0, at_once)
                        m.put(pages, plane + slot * width + column, dtype, copied, 0, at_once)

    return kernel(name, params, body)


class _Codes:
    """Rows of x that become codes and scales."""

    def __init__(self, m: Machine, cache: str, pages: Any, scales: Any, x: Any, dtype: str, kv_heads: int, width: int,
                 page_size: int, token_last: bool):  # fmt: skip
        self.m, self.cache, self.kv_heads, self.width, self.page_size = m, cache, kv_heads, width, page_size
        self.count = 4 if width % 4 == 0 else 1  # numbers of a lane at once
        self.packed = self.count == 4 and not token_last
        self.pages, self.scales = flat(pages, "uint32" if self.packed else None), flat(scales)
        self.x, self.token_last = Memory(m, x, dtype, self.count), token_last

    def write(self, row: Any, number: Any, slot: Any) -> None:
        """One row, head by head, to a slot of a page."""
        m, warps = self.m, THREADS // self.m.warp
        with loop(self.kv_heads - m.warp_number, step=warps) as offset:
            head = T.bind(m.warp_number + offset)
            source = T.bind((i64(row) * self.kv_heads + head) * self.width)
            plane = T.bind((number * self.kv_heads + head) * self.page_size)
            self.head(source, plane, slot)

    def head(self, source: Any, plane: Any, slot: Any) -> None:
        m, pieces = self.m, -(-self.width // (self.count * self.m.warp))
        words = self.x.registers(pieces)
        most = m.registers(1, "int32")
        most[0] = T.int32(LEAST_BITS)
        columns = [T.bind((m.lane + piece * m.warp) * self.count) for piece in range(pieces)]
        for piece, column in enumerate(columns):
            with when(column < self.width):
                self.x.fetch(source + column, words, piece)
                for value in self.x.floats(words, piece):
                    most[0] = T.max(most[0], magnitude(value))
        size = m.keep(T.reinterpret("float32", m.warp_reduce(T.max, most[0])), "float32")
        with when(m.lane == 0):
            T.buffer_store(self.scales, size * m.number(1 / LARGEST[self.cache]), [plane + slot])
        factor = m.keep(m.number(LARGEST[self.cache]) / size, "float32")
        for piece, column in enumerate(columns):
            with when(column < self.width):
                codes = [encode(m, self.cache, value * factor) for value in self.x.floats(words, piece)]
                self.store(codes, plane, slot, column)

    def store(self, codes: list[Any], plane: Any, slot: Any, column: Any) -> None:
        if self.packed:
            word = codes[0]
            for i in range(1, 4):
                word = T.bitwise_or(word, T.shift_left(codes[i], T.int32(8 * i)))
            at = T.floordiv((plane + slot) * self.width + column, T.int64(4))
            T.buffer_store(self.pages, T.reinterpret("uint32", word), [at])
            return
        for i, code in enumerate(codes):
            to = plane * self.width + (column + i) * self.page_size + slot if self.token_last else None
            to = (plane + slot) * self.width + column + i if to is None else to
            T.buffer_store(self.pages, T.Cast(CODES[self.cache], code), [to])


def copy_pages(target: GpuTarget, page: tuple[int, ...], dtype: str, *, name: str = "copy_pages") -> tvm.tirx.PrimFunc:
    """Page to[i] becomes a copy of page from[i], one after the other; in place.

    Arguments of the PrimFunc, in this order: pages [p, *page] dtype; source [k] int32; destination [k] int32.
    A thread copies the same few bytes of every page, so that a page copied from one just written is right too.
    """
    size = math.prod(page)
    params: Params = [("pages", ("p", *page), dtype), ("source", ("k",), "int32"), ("destination", ("k",), "int32")]
    at_once = whole(size, dtype)
    unit = "uint32" if at_once * BYTES[dtype] >= 4 else None

    def body(symbols: dict, pages: Any, source: Any, destination: Any) -> None:
        m = Machine(target)
        pages = flat(pages, unit)
        pieces = size // at_once
        with when(symbols["k"] > 0), m.launch([-(-pieces // THREADS)], THREADS) as [block]:
            piece = T.bind(block * THREADS + m.thread)
            copied = m.registers(4, "uint32") if unit else None
            with when(piece < pieces), loop(i32(symbols["k"])) as i:
                old, new = (T.bind(i64(b[i64(i)]) * size + piece * at_once) for b in (source, destination))
                if copied is None:
                    T.buffer_store(pages, pages[old], [new])
                else:
                    m.fetch(pages, old, dtype, copied, 0, at_once)
                    m.put(pages, new, dtype, copied, 0, at_once)

    return kernel(name, params, body)
