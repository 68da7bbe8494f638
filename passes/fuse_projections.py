"""Matrix products of the same activation become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.ops import op_of
from llmc.ir.quantized import Format, dequantize, format_of
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, op_name, variables
from llmc.passes.goal import Goal

__all__ = ["FuseProjections"]


@dataclass(frozen=True)
class FuseProjections:
    """Projections of one activation -> one projection by their weights, one below the other, and a split.

        q = add(matmul(x, permute_dims(wq)), bq)              wq [h·d, i]
        k = add(matmul(x, permute_dims(wk)), bk)
        v = add(matmul(x, permute_dims(wv)), bv)

    becomes

        y = add(matmul(x, permute_dims(concat(wq, wk, wv))), concat(bq, bk, bv))
        q, k, v = split(y)

    and likewise gate and up, a router and what stands beside it. What all of them do next (a bias, a cast) is done
    once. The concat is of weights alone, so that code generation lifts it out of the step. Where attention and MLP
    read the same activation, each keeps a product of its own: they serve different attentions, and the last MLP need
    not work on all rows.

    Quantized weights of one format are joined part by part, dequantize(concat(codes), concat(scales)).

    Keeps: every value; each output is summed as before. Leaves alone: weights of different dtypes or formats, products
    that differ in the dtype of their result, weights that are not stored [outputs, inputs].
    """

    name: str = "fuse_projections"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        fuser = _Fuser(module)
        return fuser.run() if fuser.groups else module


@dataclass(eq=False)
class _Group:
    """Products to be fused: `matmuls`, their weights [o, i], and the steps that all take next."""

    matmuls: list[relax.Var]
    weights: list[relax.Var]
    steps: list[list[relax.Call]]
    ends: list[relax.Var]  # where each chain of matmul and steps ends


class _Fuser(Rewriter):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self.bound = {b.var: b.value for b in bindings(self.old)}
        self.uniform = self.find_uniform()
        self.users = self.find_users()
        self.groups = self.find_groups()
        self.group_of = {var: group for group in self.groups for var in group.matmuls}
        self.inside = {v for g in self.groups for v in g.matmuls} | {
            v for g in self.groups for chain in self.chains(g) for v in chain
        }

    def find_uniform(self) -> set[relax.Var]:
        """What depends on weights alone."""
        uniform = set(list(self.old.params)[int(self.old.attrs["num_input"]) :])
        for var, value in self.bound.items():
            if op_of(self.module, value) in (None, "dequantize") and variables(value) <= uniform:
                uniform.add(var)
        return uniform

    def find_users(self) -> dict[relax.Var, list[relax.Var]]:
        users: dict[relax.Var, list[relax.Var]] = {}
        for var, value in self.bound.items():
            for used in variables(value):
                users.setdefault(used, []).append(var)
        return users

    def find_reach(self) -> dict[relax.Var, int]:
        """For each variable the first attention that it leads to, as a number; absent if it leads to none."""
        calls = [v for v, e in self.bound.items() if op_of(self.module, e) == "attention"]
        order = {v: i for i, v in enumerate(calls)}
        reach: dict[relax.Var, int] = {}
        for var, value in reversed(self.bound.items()):
            first = order.get(var, reach.get(var))
            if first is not None:
                for used in variables(value):
                    reach[used] = min(first, reach.get(used, first))
        return reach

    def find_groups(self) -> list[_Group]:
        found: dict[tuple, list[tuple[relax.Var, relax.Var]]] = {}
        reach = self.find_reach()
        for var, value in self.bound.items():
            weight = self.weight_of(value)
            if weight is not None:
                key = (value.args[0], reach.get(var), dtype_of(weight), dtype_of(var), self.quantized(weight)[0])
                found.setdefault(key, []).append((var, weight))
        return [self.group(members) for members in found.values() if len(members) > 1]

    def weight_of(self, value: Any) -> relax.Var | None:
        """The weight [o, i] that an activation [n, i] is multiplied with; None if `value` is no such product."""
        if op_name(value) != "matmul" or len(value.args[0].ty.shape) != 2 or value.args[0] in self.uniform:
            return None
        turned: Any = self.bound.get(value.args[1])
        if op_name(turned) != "permute_dims" or len(turned.ty.shape) != 2 or turned.args[0] not in self.uniform:
            return None
        axes = turned.attrs.axes
        return turned.args[0] if axes is None or [int(a) % 2 for a in axes] == [1, 0] else None

    def group(self, members: list[tuple[relax.Var, relax.Var]]) -> _Group:
        group = _Group([m for m, _ in members], [w for _, w in members], [], [m for m, _ in members])
        while (step := self.common_step(group.ends)) is not None:
            group.steps.append([self.bound[v] for v in step])
            group.ends = step
        return group

    def common_step(self, ends: list[relax.Var]) -> list[relax.Var] | None:
        """What each of `ends` is used for next, if that is for each the same and its only use: a bias, or a cast."""
        users = [self.users.get(v, []) for v in ends]
        if any(len(u) != 1 for u in users) or any(v.same_as(self.old.body.body) for v in ends):
            return None
        steps = [u[0] for u in users]
        values = [self.bound[s] for s in steps]
        if {op_name(v) for v in values} == {"astype"} and len({dtype_of(s) for s in steps}) == 1:
            return steps
        if {op_name(v) for v in values} != {"add"}:
            return None
        biases = [self.bias_of(v, end) for v, end in zip(values, ends, strict=True)]
        return steps if None not in biases and len({dtype_of(b) for b in biases}) == 1 else None

    def bias_of(self, value: relax.Call, end: relax.Var) -> relax.Var | None:
        left, right = value.args
        bias = right if left.same_as(end) else left
        return bias if bias in self.uniform and len(bias.ty.shape) == 1 else None

    def chains(self, group: _Group) -> list[list[relax.Var]]:
        """For each matmul of a group the variables after it, to its end."""
        chains = []
        for var, end in zip(group.matmuls, group.ends, strict=True):
            chain = []
            while not var.same_as(end):
                var = self.users[var][0]
                chain.append(var)
            chains.append(chain)
        return chains

    def binding(self, var, value):
        group = self.group_of.get(var)
        if group is not None and var.same_as(group.matmuls[0]):
            self.fuse(group)
        elif var not in self.inside and var not in self.new:
            super().binding(var, value)

    def fuse(self, group: _Group) -> None:
        first = self.bound[group.matmuls[0]]
        weight = self.emit(R.permute_dims(self.joined(group.weights), [1, 0]))
        y = self.emit(relax.Call(first.op, [self.get(first.args[0]), weight], first.attrs, first.ty_args))
        ends = group.matmuls
        for step in group.steps:
            if op_name(step[0]) == "astype":
                y = self.emit(R.astype(y, step[0].attrs.dtype))
            else:
                biases = [self.bias_of(s, e) for s, e in zip(step, ends, strict=True)]
                y = self.emit(R.add(y, self.joined(biases)))
            ends = [self.users[e][0] for e in ends]
        sizes = [int(w.ty.shape[0]) for w in group.weights]
        parts = self.emit(R.split(y, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=-1))
        for i, end in enumerate(group.ends):
            self.new[end] = self.emit(relax.TupleGetItem(parts, i), end.name)

    def quantized(self, weight: relax.Var) -> tuple[Format | None, list[relax.Var]]:
        """Format and parts of a dequantized weight, cast or not; (None, []) of any other."""
        value: Any = self.bound.get(weight)
        while op_name(value) == "astype":
            value = self.bound.get(value.args[0])
        format = format_of(self.module, value)
        return (None, []) if format is None else (format, list(value.args))

    def joined(self, values: list[relax.Var]) -> relax.Var:
        """Weights one below the other; if all are cast alike, they are joined as they are stored."""
        format, _ = self.quantized(values[0])
        if format is not None:
            columns = zip(*(self.quantized(v)[1] for v in values), strict=True)
            parts = [self.emit(R.concat([self.early(p) for p in part], axis=0)) for part in columns]
            weight = dequantize(self.builder, format, *parts)
            dtype = dtype_of(values[0])
            return weight if dtype == "float32" else self.emit(R.astype(weight, dtype))
        casts: list[Any] = [self.bound.get(v) for v in values]
        if all(op_name(c) == "astype" for c in casts) and len({dtype_of(c.args[0]) for c in casts}) == 1:
            stored = self.emit(R.concat([self.early(c.args[0]) for c in casts], axis=0))
            return self.emit(R.astype(stored, dtype_of(values[0])))
        return self.emit(R.concat([self.early(v) for v in values], axis=0))

    def early(self, weight: relax.Var) -> relax.Expr:
        """The new of a weight expression, which may be bound later in the old function than it is needed in the new."""
        if weight not in self.new and weight in self.bound:
            for used in variables(self.bound[weight]):
                self.early(used)
            super().binding(weight, self.bound[weight])
        return self.get(weight)
