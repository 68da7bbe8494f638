"""Copy pages of a pool onto others, in place."""

from __future__ import annotations

import functools

from tvm.script import tirx as T

__all__ = ["copy_pages"]


@functools.cache
def copy_pages(shape: tuple[int, ...], dtype: str):
    """copy_pages(pool [p, *shape], from [k] int32, to [k] int32): pool[to[i]] = pool[from[i]], for i in order."""
    size = 1
    for s in shape:
        size *= s

    @T.prim_func(private=True, s_tir=True)
    def copy(pool_h: T.handle, source_h: T.handle, target_h: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        p, k = T.int64(), T.int64()
        pool = T.match_buffer(pool_h, (p, *shape), dtype)
        source = T.match_buffer(source_h, (k,), "int32")
        target = T.match_buffer(target_h, (k,), "int32")
        with T.sblock("copy"):
            T.reads()
            T.writes()
            flat = T.decl_buffer((p, size), dtype, data=pool.data)
            for i, j in T.grid(k, size):
                flat[target[i], j] = flat[source[i], j]

    return copy
