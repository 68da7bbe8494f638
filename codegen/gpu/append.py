"""Writing to the pages of the cache: new keys and values, and whole pages copied."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import GpuTarget

from ..cpu.vector import Params
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
    *,
    name: str = "append_pages",
) -> tvm.tirx.PrimFunc:
    """The kernel of `llmc.ir.paging.append_pages`: same parameters, same arguments, same meaning; in place.

    Arguments of the PrimFunc, in this order:
      pages [p, kv_heads, page_size, width] dtype, or [p, kv_heads, width, page_size] if token_last;
      x [n, kv_heads, width] dtype; qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32.
    One block a row; rows of no sequence are left out.
    """
    page = (width, page_size) if token_last else (page_size, width)
    params: Params = [
        ("pages", ("p", kv_heads, *page), dtype), ("x", ("n", kv_heads, width), dtype),
        ("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"), ("kv_indices", ("r",), "int32"),
        ("kv_last_page_len", ("b",), "int32")]  # fmt: skip
    at_once = 1 if token_last else whole(width, dtype)
    unit = "uint32" if at_once * BYTES[dtype] >= 4 else None

    def body(symbols: dict, pages: Any, x: Any, qo: Any, kv: Any, indices: Any, last: Any) -> None:
        m = Machine(target)
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
