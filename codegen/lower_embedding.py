"""Rows of an embedding: cast after they are taken, and taken from the packed head where both are one weight."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.quantized import format_of
from llmc.ir.rewrite import Rewriter, bindings, op_name

from .backend import activation_dtype, backend, label
from .weight_only import FLOATS, Rows, WeightOnly, rows_of

__all__ = ["LowerEmbedding"]


@dataclass(frozen=True)
class LowerEmbedding:
    """take(astype(w, d), ids) becomes astype(take(w, ids), d); a w that a product packs is taken from what it packs.

        x = take(astype(w, "float32"), ids); ... y = matmul(h, permute_dims(astype(w, "float32")))
        -> x = call_tir(take, (packed, ids)), packed as LowerMatmul packs it: stored once

    A quantized table is taken from what is packed of it, whether a product shares it or not:

        x = take(dequantize(codes, scales), ids)   ->   x = call_tir(take_int8, (*packed, ids))

    Keeps: the values, bit for bit. Leaves alone: tables made of anything else than a weight and casts.
    """

    name: str = "lower_embedding"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        packed = set().union(*(_multiplied(module, module[f]) for f in ("embed", "step")))
        for function in ("embed", "step"):
            module = _Lower(module, function, backend(goal.target), packed).run()
        return module


def _multiplied(module: tvm.IRModule, function: relax.Function) -> set[str]:
    """Names of the weights [rows, depth] that a product of the function multiplies with, as they are."""
    known, found = WeightOnly(module, function), set()
    for b in bindings(function):
        if op_name(b.value) == "matmul" and b.value.args[1] in known and b.value.args[0] not in known:
            x, moves = b.value.args[1], []
            while op_name(known.definition(x)) in ("astype", "permute_dims"):
                value = known.definition(x)
                moves.append(op_name(value))
                x = value.args[0]
            if known.definition(x) in known.sources and moves.count("permute_dims") == 1 and len(x.ty.shape) == 2:
                found.add(known.sources[known.definition(x)])
    return found


class _Lower(Rewriter):
    def __init__(self, module, function, machine, packed):
        super().__init__(module, function)
        self.known, self.machine, self.packed = WeightOnly(module, self.old), machine, packed

    def rewrite(self, var, value):
        if op_name(value) != "take" or value.args[0] not in self.known or value.args[1] in self.known:
            return self.again(value)
        table, ids = self.known.definition(value.args[0]), value.args[1]
        while op_name(table) == "astype":
            table = self.known.definition(table.args[0])
        if format_of(self.module, table) is not None and self._by_row(value):
            return self._take(rows_of(self, self.known, value.args[0], transposed=False), ids, var)
        if table not in self.known.sources:
            return self.again(value)
        wanted, dtype = str(var.ty.dtype), str(table.ty.dtype)
        if self.known.sources[table] in self.packed and self._by_row(value) and dtype in FLOATS:
            return self._take(Rows(dtype, [self.get(table)]), ids, var)
        taken = relax.Call(value.op, [self.get(table), self.get(ids)], value.attrs, value.ty_args)
        return taken if dtype == wanted else R.astype(self.emit(taken), wanted)

    def _take(self, table: Rows, ids: relax.Expr, var: relax.Var) -> relax.Expr:
        """Rows by number of what a product's kernel reads."""
        rows, depth = table.shape
        wanted = str(var.ty.dtype)
        out = activation_dtype(self.machine, wanted)
        kernel = self.machine.take(rows, depth, weight=table.weight, out=out, ids=str(ids.ty.dtype))
        name = "take_packed" if isinstance(table.weight, str) else f"take_{label(table.weight)}"
        kernel = self.builder.add_func(kernel.without_attr("global_symbol"), name)
        packed = self.machine.pack(self.emit, table.parts, rows, depth, table.weight)
        taken = R.call_tir(kernel, [*packed, self.get(ids)], relax.TensorType(var.ty.shape, out))
        return taken if out == wanted else R.astype(self.emit(taken), wanted)

    def _by_row(self, value) -> bool:
        """Does the take pick whole rows of a table, one for each of a row of numbers?"""
        ranks = [len(a.ty.shape) for a in value.args]
        return value.attrs.axis is not None and int(value.attrs.axis) == 0 and ranks == [2, 1]
