"""The kernels of products and lookups as plain loops, over weights as they lie on GPUs; any machine can run them."""

from __future__ import annotations

import functools

import tvm
from tvm.script import tirx as T

__all__ = ["copy_pages", "expert_linear", "matmul", "take"]

OPAQUE = 8  # relax's OpPatternKind: never fused with a neighbour


def _finished(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    return function.with_attr("op_pattern", OPAQUE).with_attr("tirx.noalias", True)


@functools.cache  # TVMScript parses in 0.1 s: once a shape, not once a layer
def matmul(columns: int, depth: int, stride: int, weight: str, activation: str, out: str) -> tvm.tirx.PrimFunc:
    """y [n, columns] = x [n, depth] @ w [columns, stride]^T, of which `depth` columns count; float32 sums."""

    @T.prim_func(private=True, s_tir=True)
    def product(x_h: T.handle, w_h: T.handle, y_h: T.handle):
        n = T.int64()
        x = T.match_buffer(x_h, (n, depth), activation)
        w = T.match_buffer(w_h, (columns, stride), weight)
        y = T.match_buffer(y_h, (n, columns), out)
        with T.sblock("product"):
            T.reads()
            T.writes()
            total = T.sblock_alloc_buffer((1,), "float32")
            for i, j in T.grid(n, columns):
                total[0] = T.float32(0)
                for k in T.serial(depth):
                    total[0] = total[0] + T.Cast("float32", x[i, k]) * T.Cast("float32", w[j, k])
                y[i, j] = T.Cast(out, total[0])

    return _finished(product)


@functools.cache
def expert_linear(
    experts: int, columns: int, depth: int, stride: int, weight: str, activation: str, ids: str, bias: str | None
) -> tvm.tirx.PrimFunc:
    """y[s] = x[s] @ w[ids[s]]^T + bias[ids[s]], w [experts, columns, stride]."""
    biased = bias is not None

    @T.prim_func(private=True, s_tir=True)
    def product(x_h: T.handle, w_h: T.handle, ids_h: T.handle, bias_h: T.handle, y_h: T.handle):
        s = T.int64()
        x = T.match_buffer(x_h, (s, depth), activation)
        w = T.match_buffer(w_h, (experts, columns, stride), weight)
        chosen = T.match_buffer(ids_h, (s,), ids)
        added = T.match_buffer(bias_h, (experts, columns), bias or "float32")
        y = T.match_buffer(y_h, (s, columns), activation)
        with T.sblock("product"):
            T.reads()
            T.writes()
            total = T.sblock_alloc_buffer((1,), "float32")
            for i, j in T.grid(s, columns):
                total[0] = T.Cast("float32", added[chosen[i], j]) if biased else T.float32(0)
                for k in T.serial(depth):
                    total[0] = total[0] + T.Cast("float32", x[i, k]) * T.Cast("float32", w[chosen[i], j, k])
                y[i, j] = T.Cast(activation, total[0])

    params = [p for i, p in enumerate(product.params) if biased or i != 3]
    return _finished(tvm.tirx.PrimFunc(params, product.body, product.ret_type, product.attrs))


@functools.cache
def take(rows: int, depth: int, stride: int, weight: str, out: str, ids: str) -> tvm.tirx.PrimFunc:
    """y[i] = w[ids[i]], w [rows, stride]."""

    @T.prim_func(private=True, s_tir=True)
    def lookup(w_h: T.handle, ids_h: T.handle, y_h: T.handle):
        n = T.int64()
        w = T.match_buffer(w_h, (rows, stride), weight)
        chosen = T.match_buffer(ids_h, (n,), ids)
        y = T.match_buffer(y_h, (n, depth), out)
        with T.sblock("lookup"):
            T.reads()
            T.writes()
            for i, k in T.grid(n, depth):
                y[i, k] = T.Cast(out, w[chosen[i], k])

    return _finished(lookup)


@functools.cache
def copy_pages(page: tuple[int, ...], dtype: str) -> tvm.tirx.PrimFunc:
    """Page destination[i] becomes a copy of page source[i], one after the other; in place."""
    size = 1
    for extent in page:
        size *= extent

    @T.prim_func(private=True, s_tir=True)
    def copy(pages_h: T.handle, source_h: T.handle, destination_h: T.handle):
        p, k = T.int64(), T.int64()
        pages = T.match_buffer(pages_h, (p, *page), dtype)
        source = T.match_buffer(source_h, (k,), "int32")
        destination = T.match_buffer(destination_h, (k,), "int32")
        with T.sblock("copy"):
            T.reads()
            T.writes()
            flat = T.decl_buffer((p, T.int64(size)), dtype, data=pages.data)
            for i, e in T.grid(k, size):
                flat[destination[i], e] = flat[source[i], e]

    return _finished(copy)
