"""The two ops of the paged cache: append new keys and values to the pages, attend over the pages.

Both are reference PrimFuncs: plain serial loops that say what the op means and that any target can run; code generation
recognises them by their attributes and puts a fast kernel in their place.

The tables are those of FlashInfer's append API, all int32. A step serves b sequences whose new tokens lie one after the
other on the rows of x and q:

    qo_indptr [b+1]          the new tokens of sequence s are the rows qo_indptr[s] .. qo_indptr[s+1] (none is allowed)
    kv_indptr [b+1]          the pages of sequence s are kv_indices[kv_indptr[s]] .. kv_indices[kv_indptr[s+1]]
    kv_indices [r]           page numbers
    kv_last_page_len [b]     how many slots of the last page are taken, 1 .. page_size

The lengths count the new tokens: sequence s has (kv_indptr[s+1] - kv_indptr[s] - 1) * page_size + kv_last_page_len[s]
tokens, the new ones at its end; the token at position p lies in slot p % page_size of its page p // page_size.
Pages below the first position that a window or a chunk still sees are never read: their entries may name any page.

A page holds, for each head, its tokens one after the other, [heads, page_size, width], or with the token axis last,
[heads, width, page_size], as the target asks for keys. A quantized cache (`cache` "int8" or "fp8", "" for none) has
codes in its pages and, beside them, scales [p, heads, page_size]: see `quantized_cache`.
"""

import functools

import tvm
from tvm.script import tirx as T

from llmc.ir import quantized_cache as codes
from llmc.ir.ops import OP

APPEND_PAGES = "append_pages"
PAGED_ATTENTION = "paged_attention"
OPAQUE = 8  # relax's OpPatternKind: never fused with a neighbour


def page_shape(heads: int, width: int, page_size: int, token_last: bool) -> tuple[int, int, int]:
    """The shape of one page: [heads, width, page_size] with the token axis last, else [heads, page_size, width]."""
    return (heads, width, page_size) if token_last else (heads, page_size, width)


def page_tensors(
    name: str, heads: int, width: int, page_size: int, token_last: bool, dtype: str, cache: str = ""
) -> list[dict]:
    """The tensors of a layer's keys (`name` "k", say) as the state describes a page: {"name", "shape", "dtype"}.

    Codes of a quantized cache are {name}_pages, their scales {name}_scales.
    """
    shape = list(page_shape(heads, width, page_size, token_last))
    pages = {"name": f"{name}_pages", "shape": shape, "dtype": codes.CODES[cache] if cache else dtype}
    scales = {"name": f"{name}_scales", "shape": [heads, page_size], "dtype": codes.SCALE}
    return [pages, scales] if cache else [pages]


def parameters(func: tvm.tirx.PrimFunc) -> dict:
    """What an op of this file was made with, as plain Python values: `paged_attention(**parameters(f))` is f."""
    plain = {k: getattr(v, "value", v) for k, v in dict(func.attrs).items() if k not in _NOT_PARAMETERS}
    return {k: str(v) if isinstance(v, str) else v for k, v in plain.items()}


_NOT_PARAMETERS = {OP, "op_pattern", "tirx.noalias", "tirx.is_entry_func", "s_tir", "global_symbol"}


def _tag(func, op: str, **attrs):
    for key, value in {OP: op, "op_pattern": OPAQUE, "tirx.noalias": True, **attrs}.items():
        func = func.with_attr(key, value)
    return func


@functools.cache  # TVMScript parses in 0.1 s: once a shape, not once a layer
def append_pages(
    kv_heads: int, width: int, dtype: str, page_size: int, token_last: bool, cache: str = ""
) -> tvm.tirx.PrimFunc:
    """Write row t of x to the slot of its token, in place; to a quantized cache as codes and scales.

    append_pages(pages [p, *page], (scales [p, kv_heads, page_size],) x [n, kv_heads, width], qo_indptr, kv_indptr,
    kv_indices, kv_last_page_len); x is of `dtype`, pages too where the cache is not quantized.
    """
    page = page_shape(kv_heads, width, page_size, token_last)

    @T.prim_func(private=True, s_tir=True)
    def append(pages_h: T.handle, x_h: T.handle, qo_h: T.handle, kv_h: T.handle, idx_h: T.handle, last_h: T.handle):
        p, n, b1, b2, r, b = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        pages = T.match_buffer(pages_h, (p, *page), dtype)
        x = T.match_buffer(x_h, (n, kv_heads, width), dtype)
        qo_indptr = T.match_buffer(qo_h, (b1,), "int32")
        kv_indptr = T.match_buffer(kv_h, (b2,), "int32")
        kv_indices = T.match_buffer(idx_h, (r,), "int32")
        kv_last_page_len = T.match_buffer(last_h, (b,), "int32")
        with T.sblock("append"):
            T.reads()
            T.writes()
            for s in T.serial(b):
                length = (kv_indptr[s + 1] - kv_indptr[s] - 1) * page_size + kv_last_page_len[s]
                for i in T.serial(qo_indptr[s + 1] - qo_indptr[s]):
                    position = length - (qo_indptr[s + 1] - qo_indptr[s]) + i
                    to = T.Cast("int64", kv_indices[kv_indptr[s] + position // page_size])
                    slot = position % page_size
                    for h, e in T.grid(kv_heads, width):
                        if token_last:
                            pages[to, h, e, slot] = x[qo_indptr[s] + i, h, e]
                        else:
                            pages[to, h, slot, e] = x[qo_indptr[s] + i, h, e]

    made = {"kv_heads": kv_heads, "width": width, "dtype": dtype, "page_size": page_size, "token_last": token_last}
    if not cache:
        return _tag(append, APPEND_PAGES, **made)

    def float32(x):
        return T.Cast("float32", x)

    @T.prim_func(private=True, s_tir=True)
    def append_codes(
        pages_h: T.handle,
        scales_h: T.handle,
        x_h: T.handle,
        qo_h: T.handle,
        kv_h: T.handle,
        idx_h: T.handle,
        last_h: T.handle,
    ):
        p, p2, n, b1, b2, r, b = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        pages = T.match_buffer(pages_h, (p, *page), codes.CODES[cache])
        scales = T.match_buffer(scales_h, (p2, kv_heads, page_size), codes.SCALE)
        x = T.match_buffer(x_h, (n, kv_heads, width), dtype)
        qo_indptr = T.match_buffer(qo_h, (b1,), "int32")
        kv_indptr = T.match_buffer(kv_h, (b2,), "int32")
        kv_indices = T.match_buffer(idx_h, (r,), "int32")
        kv_last_page_len = T.match_buffer(last_h, (b,), "int32")
        with T.sblock("append"):
            T.reads()
            T.writes()
            bits = T.sblock_alloc_buffer((1,), "uint32")  # of the largest magnitude so far
            most = T.sblock_alloc_buffer((1,), "float32")
            for s in T.serial(b):
                length = (kv_indptr[s + 1] - kv_indptr[s] - 1) * page_size + kv_last_page_len[s]
                for i, h in T.grid(qo_indptr[s + 1] - qo_indptr[s], kv_heads):
                    row = qo_indptr[s] + i
                    position = length - (qo_indptr[s + 1] - qo_indptr[s]) + i
                    to = T.Cast("int64", kv_indices[kv_indptr[s] + position // page_size])
                    slot = position % page_size
                    bits[0] = T.reinterpret("uint32", T.float32(codes.TINY))
                    for e in T.serial(width):
                        bits[0] = codes.largest_bits(bits[0], float32(x[row, h, e]))
                    most[0] = T.reinterpret("float32", bits[0])
                    scales[to, h, slot] = most[0] * T.float32(1 / codes.LARGEST[cache])
                    most[0] = T.float32(codes.LARGEST[cache]) / most[0]
                    for e in T.serial(width):
                        if token_last:
                            pages[to, h, e, slot] = codes.code(cache, float32(x[row, h, e]) * most[0])
                        else:
                            pages[to, h, slot, e] = codes.code(cache, float32(x[row, h, e]) * most[0])

    return _tag(append_codes, APPEND_PAGES, **made, cache=cache)


@functools.cache
def paged_attention(
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
) -> tvm.tirx.PrimFunc:
    """Causal attention of every new token over the pages of its sequence; float32 inside.

    paged_attention(q [n, heads, head_dim], k_pages [p, *page], (k_scales [p, kv_heads, page_size],) v_pages [p, *page],
    (v_scales [p, kv_heads, page_size],) (sinks [heads] float32,) qo_indptr, kv_indptr, kv_indices, kv_last_page_len,
    out [n, heads, v_dim]); q and out are of `dtype`, pages too where the cache is not quantized: only a quantized one
    has scales. Head i reads the key and value head i // (heads / kv_heads). `keys_token_last` says how a page of keys
    lies; a page of values is [kv_heads, page_size, v_dim].

    The token at position p sees the positions j <= p; of these, with a window those with p - j < window, with a chunk
    those with j // chunk == p // chunk. Scores are q.k * scale, with a softcap tanh(score / softcap) * softcap; a sink
    joins its head's softmax as one more score, of no value.

    v_width > 0 (latent attention): there are no v_pages (and v_scales); the value is the first v_width = v_dim columns
    of the key.
    """
    if heads % kv_heads or (v_width and v_width != v_dim):
        raise ValueError(f"paged_attention: {heads} heads over {kv_heads}, v_dim {v_dim}, v_width {v_width}")
    group = heads // kv_heads
    k_page = page_shape(kv_heads, head_dim, page_size, keys_token_last)
    v_page = k_page if v_width else page_shape(kv_heads, v_dim, page_size, False)

    def first(p):
        """The first position that position p sees."""
        start = T.max(p - (window - 1), 0) if window else T.int32(0)
        return T.max(start, p // chunk * chunk) if chunk else start

    def capped(x):
        return T.tanh(x / T.float32(softcap)) * T.float32(softcap) if softcap else x

    stored = codes.CODES[cache] if cache else dtype

    def number(code, scales, page, head, slot):
        return codes.number(cache, code) * scales[page, head, slot] if cache else T.Cast("float32", code)

    def key(k, scales, page, head, slot, e):
        return number(k[page, head, e, slot] if keys_token_last else k[page, head, slot, e], scales, page, head, slot)

    def value(k, k_scales, v, v_scales, page, head, slot, e):
        if v_width:
            return key(k, k_scales, page, head, slot, e)
        return number(v[page, head, slot, e], v_scales, page, head, slot)

    @T.prim_func(private=True, s_tir=True)
    def attend(
        q_h: T.handle,
        k_h: T.handle,
        k_scales_h: T.handle,
        v_h: T.handle,
        v_scales_h: T.handle,
        sink_h: T.handle,
        qo_h: T.handle,
        kv_h: T.handle,
        idx_h: T.handle,
        last_h: T.handle,
        out_h: T.handle,
    ):
        p, p2, p3, p4 = T.int64(), T.int64(), T.int64(), T.int64()
        n, b1, b2, r, b = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_h, (n, heads, head_dim), dtype)
        k = T.match_buffer(k_h, (p, *k_page), stored)
        k_scales = T.match_buffer(k_scales_h, (p3, kv_heads, page_size), codes.SCALE)
        v = T.match_buffer(v_h, (p2, *v_page), stored)
        v_scales = T.match_buffer(v_scales_h, (p4, kv_heads, page_size), codes.SCALE)
        sink = T.match_buffer(sink_h, (heads,), "float32")
        qo_indptr = T.match_buffer(qo_h, (b1,), "int32")
        kv_indptr = T.match_buffer(kv_h, (b2,), "int32")
        kv_indices = T.match_buffer(idx_h, (r,), "int32")
        kv_last_page_len = T.match_buffer(last_h, (b,), "int32")
        out = T.match_buffer(out_h, (n, heads, v_dim), dtype)
        with T.sblock("attend"):
            T.reads()
            T.writes()
            score = T.sblock_alloc_buffer((1,), "float32")
            peak = T.sblock_alloc_buffer((1,), "float32")  # the largest score so far
            total = T.sblock_alloc_buffer((1,), "float32")  # sum of exp(score - peak)
            old = T.sblock_alloc_buffer((1,), "float32")  # what the sums so far shrink by when the peak rises
            acc = T.sblock_alloc_buffer((v_dim,), "float32")
            for s in T.serial(b):
                length = (kv_indptr[s + 1] - kv_indptr[s] - 1) * page_size + kv_last_page_len[s]
                for i, h in T.grid(qo_indptr[s + 1] - qo_indptr[s], heads):
                    row = qo_indptr[s] + i
                    position = length - (qo_indptr[s + 1] - qo_indptr[s]) + i
                    peak[0] = sink[h] if sinks else T.min_value("float32")
                    total[0] = T.float32(1 if sinks else 0)
                    for e in T.serial(v_dim):
                        acc[e] = T.float32(0)
                    for back in T.serial(position + 1 - first(position)):
                        j = first(position) + back
                        page = T.Cast("int64", kv_indices[kv_indptr[s] + j // page_size])
                        slot = j % page_size
                        score[0] = T.float32(0)
                        for e in T.serial(head_dim):
                            score[0] = score[0] + T.Cast("float32", q[row, h, e]) * key(
                                k, k_scales, page, h // group, slot, e
                            )
                        score[0] = capped(score[0] * T.float32(scale))
                        old[0] = T.exp(T.min(peak[0] - score[0], T.float32(0)))
                        peak[0] = T.max(peak[0], score[0])
                        score[0] = T.exp(score[0] - peak[0])
                        total[0] = total[0] * old[0] + score[0]
                        for e in T.serial(v_dim):
                            acc[e] = acc[e] * old[0] + score[0] * value(
                                k, k_scales, v, v_scales, page, h // group, slot, e
                            )
                    for e in T.serial(v_dim):
                        out[row, h, e] = T.Cast(dtype, acc[e] / total[0])

    unused = {3, 4} if v_width else set()
    unused |= set() if cache else {2, 4}
    unused |= set() if sinks else {5}
    return _tag(
        _drop_parameters(attend, unused),
        PAGED_ATTENTION,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_dim=v_dim,
        dtype=dtype,
        page_size=page_size,
        keys_token_last=keys_token_last,
        scale=scale,
        softcap=softcap,
        window=window,
        chunk=chunk,
        sinks=sinks,
        v_width=v_width,
        **({"cache": cache} if cache else {}),
    )


def _drop_parameters(func: tvm.tirx.PrimFunc, unused: set[int]) -> tvm.tirx.PrimFunc:
    params = [p for i, p in enumerate(func.params) if i not in unused]
    return tvm.tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
