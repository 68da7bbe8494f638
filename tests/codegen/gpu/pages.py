"""Sequences in a paged cache, as numpy arrays, and what attention over them is; imported by tests."""

import ml_dtypes
import numpy as np

from tests import quantized_cache

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def normal(seed, shape, dtype="float32", scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype])


def tables(batch, page_size):
    """Page tables of sequences (length, new tokens), their pages in random order; page 0 is no one's."""
    counts = [-(-length // page_size) for length, _ in batch]
    return {
        "qo_indptr": np.cumsum([0, *(new for _, new in batch)]).astype(np.int32),
        "kv_indptr": np.cumsum([0, *counts]).astype(np.int32),
        "kv_indices": np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1,
        "kv_last_page_len": np.array([(length - 1) % page_size + 1 for length, _ in batch], np.int32),
    }


def paged(values, table, page_size):
    """values: of each sequence [length, heads, width] -> pages [p, heads, page_size, width]; NaN in slots of no one."""
    heads, width = values[0].shape[1:]
    pages = np.full((len(table["kv_indices"]) + 1, heads, page_size, width), np.nan, values[0].dtype)
    for s, value in enumerate(values):
        for position, row in enumerate(value):
            number = table["kv_indices"][table["kv_indptr"][s] + position // page_size]
            pages[number, :, position % page_size] = row
    return pages


def pools(values, table, page_size, kind=None):
    """The tensors of pages that hold values: of a cache in 8 bits (`kind`) codes and scales, NaN in slots of no one."""
    if kind is None:
        return [paged(values, table, page_size)]
    codes, scales = zip(*(quantized_cache.quantize(value, kind) for value in values), strict=True)
    beside = paged([scale[..., None] for scale in scales], table, page_size)[..., 0]
    pages = paged([code.astype(np.float32) for code in codes], table, page_size)
    return [np.nan_to_num(pages, nan=85).astype(codes[0].dtype), beside]


def attention(q, k, v, sinks, scale, softcap=0.0, window=0, chunk=0):
    """Float64 attention of one sequence: q [new, h, d] at the end of k [length, g, d], v [length, g, e]."""
    new, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    k, v = (np.repeat(a.astype(np.float64), heads // kv_heads, 1) for a in (k, v))
    scores = np.einsum("nhd,thd->hnt", q.astype(np.float64), k) * scale
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    p, j = np.arange(length - new, length)[:, None], np.arange(length)
    seen = j <= p
    if window:
        seen &= p - j < window
    if chunk:
        seen &= j // chunk == p // chunk
    scores = np.where(seen, scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    e = np.exp(scores - peak)
    total = e.sum(-1, keepdims=True) + (np.exp(sinks[:, None, None] - peak) if sinks is not None else 0)
    return np.einsum("hnt,the->nhe", e / total, v)
