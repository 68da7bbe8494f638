"""Writing to the pages of the cache: new keys and values, and whole pages copied."""

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from .vector import Params, bits, choose, i64, kernel, loop

FEW = 8  # rows that one thread writes sooner than others wake


def append_pages(
    target: CpuTarget,
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
      pages [p, kv_heads, width, page_size] dtype if token_last, else [p, kv_heads, page_size, width];
      x [n, kv_heads, width] dtype; qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32.
    """
    page = (width, page_size) if token_last else (page_size, width)
    params = [("pages", ("p", kv_heads, *page), dtype), ("x", ("n", kv_heads, width), dtype),
              ("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"), ("kv_indices", ("r",), "int32"),
              ("kv_last_page_len", ("b",), "int32")]  # fmt: skip

    def body(symbols: dict, pages: Any, x: Any, qo: Any, kv: Any, indices: Any, last: Any) -> None:
        pages, x = bits(pages), bits(x)

        def head(h: Any) -> None:
            with loop(0, symbols["b"]) as s:
                row, pages_of = T.bind(qo[s]), T.bind(kv[s])
                count = T.bind(qo[s + 1] - row)
                start = T.bind((kv[s + 1] - pages_of - 1) * page_size + last[s] - count)
                with loop(0, count) as i:
                    position = T.bind(start + T.Cast("int32", i))
                    number = T.bind(i64(indices[pages_of + T.floordiv(position, T.int32(page_size))]))
                    slot = T.bind(i64(T.floormod(position, T.int32(page_size))))
                    with loop(0, width) as c:
                        to = [number, h, c, slot] if token_last else [number, h, slot, c]
                        T.buffer_store(pages, x[i64(row) + i, h, c], to)

        def serial() -> None:
            with loop(0, kv_heads) as h:
                head(h)

        def parallel() -> None:
            with T.parallel(T.int64(0), T.int64(kv_heads)) as h:
                head(h)

        choose([(symbols["n"] <= FEW, serial)] if kv_heads > 1 else [], parallel if kv_heads > 1 else serial)

    return kernel(name, params, body, target)


def copy_pages(target: CpuTarget, page: tuple[int, ...], dtype: str, *, name: str = "copy_pages") -> tvm.tirx.PrimFunc:
    """Page to[i] becomes a copy of page from[i], one after the other; in place.

    Arguments of the PrimFunc, in this order: pages [p, *page] dtype; source [k] int32; destination [k] int32.
    """
    size = 1
    for extent in page:
        size *= extent
    params: Params = [("pages", ("p", *page), dtype), ("source", ("k",), "int32"), ("destination", ("k",), "int32")]

    def body(symbols: dict, pages: Any, source: Any, destination: Any) -> None:
        pages = bits(pages)
        flat = T.decl_buffer((pages.shape[0], T.int64(size)), pages.dtype, data=pages.data)
        with loop(0, symbols["k"]) as i:
            old, new = T.bind(i64(source[i])), T.bind(i64(destination[i]))
            with loop(0, size) as e:
                T.buffer_store(flat, flat[old, e], [new, e])

    return kernel(name, params, body, target)
