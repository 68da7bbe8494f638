"""Writing to the pages of the cache: new keys and values, and whole pages copied."""

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized_cache import CODES, LARGEST, SCALE, TINY
from llmc.targets import CpuTarget

from .cache_codes import encode, magnitude
from .vector import Params, Vector, bits, choose, chunks, i64, kernel, loop, scratch, variable

FEW = 8  # rows that one thread writes sooner than others wake


def append_pages(
    target: CpuTarget,
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
      pages [p, kv_heads, width, page_size] dtype if token_last, else [p, kv_heads, page_size, width]; of a quantized
      cache its codes, and scales [p, kv_heads, page_size] float32;
      x [n, kv_heads, width] dtype; qo_indptr [b+1], kv_indptr [b+1], kv_indices [r], kv_last_page_len [b], all int32.
    """
    page = (width, page_size) if token_last else (page_size, width)
    params: list = [("pages", ("p", kv_heads, *page), CODES[cache] if cache else dtype)]
    if cache:
        params.append(("scales", ("p2", kv_heads, page_size), SCALE))
    params += [("x", ("n", kv_heads, width), dtype), ("qo_indptr", ("b1",), "int32"), ("kv_indptr", ("b2",), "int32"),
               ("kv_indices", ("r",), "int32"), ("kv_last_page_len", ("b",), "int32")]  # fmt: skip

    def body(symbols: dict, pages: Any, *rest: Any) -> None:
        scales = rest[0] if cache else None
        x, qo, kv, indices, last = rest[-5:]
        pages, x = bits(pages), bits(x)

        def put(row: Any, number: Any, h: Any, slot: Any) -> None:
            with loop(0, width) as c:
                to = [number, h, c, slot] if token_last else [number, h, slot, c]
                T.buffer_store(pages, x[row, h, c], to)

        def put_codes(row: Any, number: Any, h: Any, slot: Any) -> None:
            codes = scratch([width], CODES[cache]) if token_last else None
            factor = _scale(target, cache, x, [row, h], width, lambda s: T.buffer_store(scales, s, [number, h, slot]))
            for offset, lanes in chunks(width, target.lanes):
                v = Vector(lanes)
                found = encode(v, cache, v.load(x, [row, h, T.int64(offset)]) * v.broadcast(factor))
                if codes is None:
                    v.write(pages, found, [number, h, slot, T.int64(offset)])
                else:
                    v.write(codes, found, [T.int64(offset)])
            if codes is not None:
                with loop(0, width) as c:
                    T.buffer_store(pages, codes[c], [number, h, c, slot])

        def head(h: Any) -> None:
            with loop(0, symbols["b"]) as s:
                row, pages_of = T.bind(qo[s]), T.bind(kv[s])
                count = T.bind(qo[s + 1] - row)
                start = T.bind((kv[s + 1] - pages_of - 1) * page_size + last[s] - count)
                with loop(0, count) as i:
                    position = T.bind(start + T.Cast("int32", i))
                    number = T.bind(i64(indices[pages_of + T.floordiv(position, T.int32(page_size))]))
                    slot = T.bind(i64(T.floormod(position, T.int32(page_size))))
                    (put_codes if cache else put)(i64(row) + i, number, h, slot)

        def serial() -> None:
            with loop(0, kv_heads) as h:
                head(h)

        def parallel() -> None:
            with T.parallel(T.int64(0), T.int64(kv_heads)) as h:
                head(h)

        choose([(symbols["n"] <= FEW, serial)] if kv_heads > 1 else [], parallel if kv_heads > 1 else serial)

    return kernel(name, params, body, target)


def _scale(target: CpuTarget, cache: str, x: Any, at: list, width: int, store: Callable[[Any], None]) -> Any:
    """Stores the scale of the vector x[*at]; -> what it is multiplied by to be in the range of codes."""
    most = variable("int32", T.reinterpret("int32", T.float32(TINY)))
    for offset, lanes in chunks(width, target.lanes):
        v = Vector(lanes)
        T.buffer_store(most, T.max(most[0], v.largest_lane(magnitude(v, v.load(x, [*at, T.int64(offset)])))), [0])
    size = T.bind(T.reinterpret("float32", most[0]))
    store(size * T.float32(1 / LARGEST[cache]))
    return T.bind(T.float32(LARGEST[cache]) / size)


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
