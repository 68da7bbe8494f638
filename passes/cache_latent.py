"""Latent attention: the cache holds what keys and values are computed from, not the heads that they expand to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.ops import attention, attributes_of, op_of
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, op_name
from llmc.passes.goal import Goal
from llmc.passes.movement import Movement

__all__ = ["CacheLatent"]


@dataclass(frozen=True)
class CacheLatent:
    """Heads expanded from one latent vector a token -> attention over the latent itself.

    Where the key of head i is [c·Wᵏᵢᵀ | t] and its value c·Wᵛᵢᵀ, with a latent c [n, r] and a part t [n, p] (rotary)
    that all heads share,

        o = attention(q [n, h, d+p], k [n, h, d+p], v [n, h, e])

    becomes, as q·(W c) = (Wᵀ q)·c and a weighted sum of expanded values is the expansion of the weighted sum,

        q' = concat(q[:, :, :d]·Wᵏ, q[:, :, d:])                [n, h, r+p]
        k' = concat(c, t)                                       [n, 1, r+p]
        o  = attention(q', k', k'[:, :, :r])·Wᵛᵀ                [n, h, e]

    so that a token costs r+p numbers of cache instead of h·(d+p+e). Recognised by following every element of k and v
    back through reshapes, transposes, splits and joins to where it was computed: any spelling of the expansion will
    do.

    Keeps: the values, up to the rounding of another order of sums. Leaves alone: attention whose keys and values
    don't come from one latent, or where the latent is no smaller than the heads.
    """

    name: str = "cache_latent"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        rewriter = _Absorber(module)
        return rewriter.run() if rewriter.latents else module


@dataclass(frozen=True)
class _Expansion:
    """The columns [begin, end) of every head are products of `latent` with rows of `weight` [o, r].

    Those of head i begin at row i · stride + offset.
    """

    latent: relax.Var
    weight: relax.Var
    stride: int
    offset: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Latent:
    """An attention that reads a latent: its keys, its values, and the part that all heads share (None: none is)."""

    key: _Expansion
    value: _Expansion
    shared: relax.Var | None
    columns: tuple[int, int]  # of the key: where the shared part stands


class _Absorber(Rewriter):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self.bound = {b.var: b.value for b in bindings(self.old)}
        self.weights = set(list(self.old.params)[int(self.old.attrs["num_input"]) :])
        self.n = self.old.params[0].ty.shape[0]
        found = {v: self.recognise(e) for v, e in self.bound.items() if op_of(module, e) == "attention"}
        self.latents = {v: latent for v, latent in found.items() if latent is not None}

    def recognise(self, call: relax.Call) -> _Latent | None:
        q, k, v = call.args[:3]
        heads, width = (int(d) for d in list(k.ty.shape)[1:])
        if heads < 2 or int(q.ty.shape[1]) != heads:
            return None
        movement = Movement(self.bound, self.n)
        keys, values = movement.elements(k)[0], movement.elements(v)[0]
        own = np.flatnonzero((keys != keys[0]).any(axis=0))
        if not own.size or not contiguous(own):
            return None
        begin, end = int(own[0]), int(own[-1]) + 1
        key, value = self.expansion(movement, keys, begin, end), self.expansion(movement, values, 0, values.shape[1])
        if key is None or value is None or not key.latent.same_as(value.latent):
            return None
        if begin and end < width:
            return None  # shared columns on both sides
        columns = (end, width) if begin == 0 else (0, begin)
        shared = movement.value_of(keys[0, slice(*columns)]) if columns[1] > columns[0] else None
        if shared is None and columns[1] > columns[0]:
            return None
        rank = int(key.weight.ty.shape[1])
        smaller = rank + columns[1] - columns[0] < heads * (width + values.shape[1])
        return _Latent(key, value, shared, columns) if smaller else None

    def expansion(self, movement: Movement, elements: np.ndarray, begin: int, end: int) -> _Expansion | None:
        """How the columns [begin, end) of `elements` [heads, width] come from a latent; None if they don't."""
        source, rows = movement.source(elements[:, begin:end])
        if source is None:
            return None
        product: Any = self.bound.get(source)
        while op_name(product) == "astype":
            product = self.bound.get(product.args[0])
        if op_name(product) != "matmul" or not self.is_one_row(product.args[0]):
            return None
        turned: Any = self.bound.get(product.args[1])
        if op_name(turned) != "permute_dims" or not self.is_weight(turned.args[0]):
            return None
        heads, stride = len(rows), int(turned.args[0].ty.shape[0]) // len(rows)
        expected = np.arange(heads)[:, None] * stride + rows[0, 0] + np.arange(end - begin)
        if stride * heads != int(turned.args[0].ty.shape[0]) or (rows != expected).any():
            return None
        return _Expansion(product.args[0], turned.args[0], stride, int(rows[0, 0]), begin, end)

    def is_one_row(self, x: relax.Var) -> bool:
        """Is x one row a token: [n, r], whatever axes of length 1 stand beside?"""
        rows = [d for d in list(x.ty.shape)[:-1] if not (isinstance(d, tirx.IntImm) and d.value == 1)]
        return len(rows) == 1 and rows[0].same_as(self.n)

    def is_weight(self, x: relax.Var) -> bool:
        """Is x a weight [o, r], or the cast of one?"""
        while op_name(self.bound.get(x)) == "astype":
            x = self.bound[x].args[0]
        return x in self.weights and len(x.ty.shape) == 2

    def rewrite(self, var, value):
        latent = self.latents.get(var)
        if latent is None:
            return self.again(value)
        q, n, dtype = self.get(value.args[0]), self.n, dtype_of(var)
        sinks = self.get(value.args[3]) if len(value.args) > 3 else None
        heads, rank = int(q.ty.shape[1]), int(latent.key.weight.ty.shape[1])
        own = self.columns(q, latent.key.begin, latent.key.end)
        queries = [self.times(own, self.rows_of(latent.key, heads), dtype)]
        keys = [self.emit(R.reshape(self.token_first(latent.key.latent), [n, 1, rank]))]
        if latent.shared is not None:
            begin, end = latent.columns
            queries.append(self.columns(q, begin, end))
            keys.append(self.emit(R.reshape(self.token_first(latent.shared), [n, 1, end - begin])))
        q = self.emit(R.concat(queries, axis=-1)) if queries[1:] else queries[0]
        k = self.emit(R.concat(keys, axis=-1)) if keys[1:] else keys[0]
        attrs = attributes_of(self.module, value)
        how = {name: attrs[name] for name in ("scale", "softcap", "window", "chunk")}
        out = attention(self.builder, q, k, self.columns(k, 0, rank), sinks, **how)
        return self.times(out, self.emit(R.permute_dims(self.rows_of(latent.value, heads), [0, 2, 1])), dtype)

    def columns(self, x: relax.Var, begin: int, end: int) -> relax.Var:
        return self.emit(R.strided_slice(x, [2], [begin], [end]))

    def times(self, x: relax.Var, weight: relax.Var, dtype: str) -> relax.Var:
        """x [n, h, i] by a matrix a head: weight [h, i, o] -> [n, h, o]; summed in float32, rounded once."""
        x = self.emit(R.permute_dims(x, [1, 0, 2]))
        y = self.emit(R.matmul(x, weight, out_dtype="float32"))
        y = y if dtype == "float32" else self.emit(R.astype(y, dtype))
        return self.emit(R.permute_dims(y, [1, 0, 2]))

    def rows_of(self, expansion: _Expansion, heads: int) -> relax.Var:
        """The weight of an expansion, [heads, width, r]."""
        rank = int(expansion.weight.ty.shape[1])
        weight = self.emit(R.reshape(self.get(expansion.weight), [heads, expansion.stride, rank]))
        width = expansion.end - expansion.begin
        if width == expansion.stride:
            return weight
        return self.emit(R.strided_slice(weight, [1], [expansion.offset], [expansion.offset + width]))

    def token_first(self, x: relax.Var) -> relax.Var:
        axis = next(i for i, d in enumerate(x.ty.shape) if d.same_as(self.n))
        order = [axis, *(i for i in range(len(x.ty.shape)) if i != axis)]
        return self.get(x) if axis == 0 else self.emit(R.permute_dims(self.get(x), order))


def contiguous(indices: np.ndarray) -> bool:
    return bool((np.diff(indices) == 1).all())
