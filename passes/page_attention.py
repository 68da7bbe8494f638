"""Attention over the sequence becomes attention over a paged cache: the program serves many sequences at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir import paging
from llmc.ir.ops import attributes_of, op_of
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, op_name
from llmc.passes.goal import Goal

__all__ = ["PageAttention"]


@dataclass(frozen=True)
class PageAttention:
    """attention(q, k, v) -> append k and v to this layer's pages, in place, and attend over the pages.

        main(tokens [n], positions [n], *weights):                    one sequence
            o = attention(q, k, v)

    becomes

        step(tokens [n], positions [1, n], qo_indptr,
             kv_indptr_0, kv_indices_0, kv_last_page_len_0, …,        tables: for each group of layers of one reach
             k_pages_0, v_pages_0, …, *weights):                      many sequences, one after the other
            k_pages = call_tir_inplace(append_pages, k_pages_0, k, tables)
            v_pages = call_tir_inplace(append_pages, v_pages_0, v, tables)
            o = call_tir(paged_attention, q, k_pages, v_pages, tables)

    A reach is a window and a chunk. The attribute llmc.state of `step` lists the groups with the tensors of a page. A
    value that is the first columns of its key (latent attention) is not stored again. Attention reads the appended
    pages, never the parameter: data flow is the order of things, and no pass can part the two.

    With goal.kv_cache a page holds codes, and a tensor of scales stands beside each tensor of pages:

            k_pages, k_scales = call_tir_inplace(append_pages, k_pages_0, k_scales_0, k, tables)

    Keeps: the logits of every sequence are those of main on all its tokens; with goal.kv_cache, of main where keys and
    values are rounded, head by head and token by token, as `ir.quantized_cache` says. Leaves alone: everything but
    attention; for a program of token-local ops nothing else depends on what a sequence is.
    """

    name: str = "page_attention"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        module = _Pager(module, goal).run()
        function = module["main"]
        del module["main"]
        module["step"] = function.with_attr("global_symbol", "step")
        return module


class _Pager(Rewriter):
    def __init__(self, module: tvm.IRModule, goal: Goal):
        super().__init__(module)
        self.goal = goal
        self.bound = {b.var: b.value for b in bindings(self.old)}
        self.calls = [b.value for b in bindings(self.old) if op_of(module, b.value) == "attention"]
        self.layers = [self.layer(i, call) for i, call in enumerate(self.calls)]
        self.groups = list(dict.fromkeys((layer["window"], layer["chunk"]) for layer in self.layers))
        self.functions: dict[tirx.PrimFunc, tvm.ir.GlobalVar] = {}
        self.next_layer = 0

    def layer(self, index: int, call: relax.Call) -> dict:
        """What is cached for a layer: {"window", "chunk", "latent", "dtype", "tensors": for keys and values (unless
        they are latent) the state's entries}."""
        q, k, v = call.args[:3]
        attrs = attributes_of(self.module, call)
        kv_heads, head_dim, v_dim = (int(d) for d in (*list(k.ty.shape)[1:], v.ty.shape[2]))
        latent = self.is_first_columns(v, k)
        dtypes = {dtype_of(x) for x in (q, k, v)}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        page_size, cache = self.goal.page_size, self.goal.kv_cache or ""
        tensors = [
            [
                {**t, "name": f"{t['name']}_{index}"}
                for t in paging.page_tensors(letter, kv_heads, width, page_size, self.token_last(letter), dtype, cache)
            ]
            for letter, width in {"k": head_dim, "v": v_dim}.items()
            if not (latent and letter == "v")
        ]
        limits = {"window": int(attrs["window"]), "chunk": int(attrs["chunk"])}
        return {**limits, "latent": latent, "dtype": dtype, "tensors": tensors}

    def token_last(self, letter: str) -> bool:
        """Does a page of keys (k) or values (v) hold its token axis last?"""
        return letter == "k" and bool(self.goal.fact("keys_token_last", False))

    def is_first_columns(self, v: relax.Expr, k: relax.Expr) -> bool:
        """Is v bound to the first columns of k, all heads?"""
        value: Any = self.bound.get(v)
        if op_name(value) != "strided_slice" or not value.args[0].same_as(k):
            return False
        axes, begin, *_ = ([int(x.value) for x in t.fields] for t in value.args[1:3])
        return [a % 3 for a in axes] == [2] and begin == [0] and len(value.args) == 4

    def params(self, old):
        tokens, positions, *weights = old
        n = positions.ty.shape[0]
        b, b1 = tirx.Var("b", "int64"), tirx.Var("b1", "int64")
        table = lambda name, size: relax.Var(name, relax.TensorType([size], "int32"))  # noqa: E731
        self.positions = relax.Var("positions", relax.TensorType([tirx.IntImm("int64", 1), n], "int32"))
        self.old_positions = positions
        self.qo_indptr = table("qo_indptr", b1)
        self.tables, self.pools = [], {}
        for i, group in enumerate(self.groups):
            refs, pages = tirx.Var(f"r{i}", "int64"), tirx.Var(f"p{i}", "int64")
            sizes = {"kv_indptr": b1, "kv_indices": refs, "kv_last_page_len": b}
            self.tables.append([table(f"{name}_{i}", size) for name, size in sizes.items()])
            for tensor in self.tensors(group):
                shape = [pages, *(tirx.IntImm("int64", d) for d in tensor["shape"])]
                self.pools[tensor["name"]] = relax.Var(tensor["name"], relax.TensorType(shape, tensor["dtype"]))
        inputs = [tokens, self.positions, self.qo_indptr, *(t for ts in self.tables for t in ts), *self.pools.values()]
        self.inputs = len(inputs)
        return [*inputs, *weights]

    def of(self, group: tuple[int, int]) -> list[int]:
        """The layers of a group."""
        return [i for i, layer in enumerate(self.layers) if (layer["window"], layer["chunk"]) == group]

    def tensors(self, group: tuple[int, int]) -> list[dict]:
        """The tensors of a group's pages."""
        return [t for i in self.of(group) for tensors in self.layers[i]["tensors"] for t in tensors]

    def attrs(self, old):
        state = [
            {
                "kind": "paged",
                "page_size": self.goal.page_size,
                "window": group[0],
                "chunk": group[1],
                "layers": self.of(group),
                "tensors": self.tensors(group),
            }
            for group in self.groups
        ]
        return {**old, "num_input": self.inputs, "llmc.state": json.dumps(state)}

    def get(self, x):
        if isinstance(x, relax.Var) and x.same_as(self.old_positions) and x not in self.new:
            self.new[x] = self.emit(R.reshape(self.positions, x.ty.shape))
        return super().get(x)

    def rewrite(self, var, value):
        if op_of(self.module, value) != "attention":
            return self.again(value)
        layer = self.layers[self.next_layer]
        self.next_layer += 1
        attrs = attributes_of(self.module, value)
        q, k, v, *sinks = (self.get(a) for a in value.args)
        q, k, v = (self.cast(x, layer["dtype"]) for x in (q, k, v))
        tables = [self.qo_indptr, *self.tables[self.groups.index((layer["window"], layer["chunk"]))]]
        pools = [p for ts, x in zip(layer["tensors"], (k, v), strict=False) for p in self.append(ts, x, tables)]
        heads, head_dim = (int(d) for d in list(q.ty.shape)[1:])
        kv_heads, v_dim = (int(d) for d in list(v.ty.shape)[1:])
        function = paging.paged_attention(
            heads,
            kv_heads,
            head_dim,
            v_dim,
            layer["dtype"],
            self.goal.page_size,
            self.token_last("k"),
            scale=float(attrs["scale"]),
            softcap=float(attrs["softcap"]),
            window=layer["window"],
            chunk=layer["chunk"],
            sinks=bool(sinks),
            v_width=v_dim if layer["latent"] else 0,
            cache=self.goal.kv_cache or "",
        )
        sinks = [self.cast(s, "float32") for s in sinks]
        out = relax.TensorType([*list(q.ty.shape)[:2], v.ty.shape[2]], layer["dtype"])
        out = R.call_tir(self.function_of(function), [q, *pools, *sinks, *tables], out)
        return out if layer["dtype"] == dtype_of(var) else R.astype(self.emit(out), dtype_of(var))

    def append(self, tensors: list[dict], x: relax.Var, tables: list[relax.Var]) -> list[relax.Var]:
        """The pools of keys or of values, after x is written to them."""
        pools = [self.pools[t["name"]] for t in tensors]
        heads, width = (int(d) for d in list(x.ty.shape)[1:])
        token_last, cache = self.token_last(tensors[0]["name"][0]), self.goal.kv_cache or ""
        function = paging.append_pages(heads, width, dtype_of(x), self.goal.page_size, token_last, cache)
        call = [self.function_of(function), [*pools, x, *tables]]
        if len(pools) == 1:
            return [self.emit(R.call_tir_inplace(*call, 0, pools[0].ty))]
        both = self.emit(R.call_tir_inplace(*call, list(range(len(pools))), [p.ty for p in pools]))
        return [self.emit(relax.TupleGetItem(both, i)) for i in range(len(pools))]

    def function_of(self, function: tirx.PrimFunc) -> tvm.ir.GlobalVar:
        if function not in self.functions:
            name = str(function.attrs[paging.OP])
            self.functions[function] = self.builder.add_func(function, name)
        return self.functions[function]

    def cast(self, x: relax.Var, dtype: str) -> relax.Var:
        return x if dtype_of(x) == dtype else self.emit(R.astype(x, dtype))
