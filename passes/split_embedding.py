"""The lookup of tokens in their tables becomes a function of its own."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import CompileError
from llmc.ir.ops import op_of
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, finish, needed_by, op_name, variables
from llmc.passes.goal import Goal

__all__ = ["SplitEmbedding"]


@dataclass(frozen=True)
class SplitEmbedding:
    """step(tokens, …) -> embed(tokens) -> hidden, and step(hidden, …).

        step(tokens [n], …, table, *weights):
            x = take(astype(table), tokens)
            p = take(per_layer_table, clip(tokens))

    becomes

        embed(tokens [n], table, per_layer_table) -> hidden [n, w]:
            return concat(astype(take(table, tokens)), take(per_layer_table, clip(tokens)))
        step(hidden [n, w], …, *weights):
            x, p = split(hidden)

    so that pictures, adapters and other vectors can enter between the two. Each function keeps the weights that it
    uses; a table that the head shares is a weight of both. The rows of a table are looked up as they are stored and
    then cast.

    Keeps: every value, bit for bit. Leaves alone: all that depends on anything but the tokens. Refuses a program in
    which tokens enter in any other way than through a lookup.
    """

    name: str = "split_embedding"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        lookups = _Lookups(module)
        module = _Embed(module, lookups).run(into="embed")
        module = _Step(module, lookups).run()
        for name in ("embed", "step"):
            module[name] = drop_unused_weights(module[name])
        return finish(module)


class _Lookups:
    """The lookups of `step`, by the variable each is bound to, and the bindings that lead from tokens to them."""

    def __init__(self, module: tvm.IRModule):
        self.module = module
        step = module["step"]
        self.tokens, count = step.params[0], int(step.attrs["num_input"])
        self.indices = {self.tokens}  # what depends on tokens (and weights) alone, before a lookup
        self.leading: set[relax.Var] = set()
        self.uniform = set(list(step.params)[count:])  # what depends on weights alone
        self.bound: dict[relax.Var, relax.Expr] = {}
        self.found: dict[relax.Var, relax.Call] = {}
        for b in bindings(step):
            self.visit(b.var, b.value)
        if not self.found:
            raise CompileError("expected the tokens to be looked up in a table (take), found no lookup")
        dtypes = {dtype_of(v) for v in self.found}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"

    def visit(self, var: relax.Var, value: relax.Expr) -> None:
        used = variables(value)
        self.bound[var] = value
        if used <= self.uniform:
            self.uniform.add(var)
        elif not used & self.indices:
            return
        elif op_name(value) == "take" and variables(value.args[0]) <= self.uniform:
            self.lookup(var, value)
        elif used <= self.indices | self.uniform and dtype_of_or_none(var) in INTEGERS:
            self.indices.add(var)
        else:
            op = op_name(value) or op_of(self.module, value) or type(value).__name__
            raise CompileError(
                f"expected tokens to be looked up in tables only, found {op} ({var.name}) of them: "
                "a program that computes with token numbers can't be split into embed and step",
                op=op,
            )

    def lookup(self, var: relax.Var, value: relax.Call) -> None:
        axis = value.attrs.axis
        if axis is None or int(axis) != 0 or len(value.args[0].ty.shape) != 2 or len(value.args[1].ty.shape) != 1:
            raise CompileError(
                f"expected a lookup of [n] tokens in the rows of a table, found take of {value.args[1].ty.shape} in "
                f"{value.args[0].ty.shape} along axis {axis} ({var.name})",
                op="take",
            )
        self.found[var] = value

    def width(self, var: relax.Var) -> int:
        return int(var.ty.shape[1])


class _Embed(Rewriter):
    def __init__(self, module: tvm.IRModule, lookups: _Lookups):
        super().__init__(module, "step")
        self.lookups = lookups
        self.wanted = needed_by(list(lookups.found), lookups.bound)
        self.parts: list[relax.Var] = []

    def params(self, old):
        count = int(self.old.attrs["num_input"])
        return [self.lookups.tokens, *old[count:]]

    def attrs(self, old):
        return {**{k: v for k, v in old.items() if k != "llmc.state"}, "num_input": 1}

    def binding(self, var, value):
        if var not in self.wanted:
            return
        super().binding(var, value)
        if var in self.lookups.found:
            part = self.new[var]
            if dtype_of(part) != self.lookups.dtype:
                part = self.emit(R.astype(part, self.lookups.dtype))
            self.parts.append(part)

    def rewrite(self, var, value):
        if var not in self.lookups.found:
            return self.again(value)
        # Rows are cast after the lookup, not the whole table before it.
        table, dtype = value.args[0], dtype_of(var)
        while op_name(inner := self.lookups.bound.get(table, table)) == "astype":
            table = inner.args[0]
        rows = R.take(self.get(table), self.get(value.args[1]), 0, value.attrs.mode)
        return rows if dtype_of(table) == dtype else R.astype(self.emit(rows), dtype)

    def result(self, body):
        return self.parts[0] if len(self.parts) == 1 else R.concat(self.parts, axis=-1)


class _Step(Rewriter):
    def __init__(self, module: tvm.IRModule, lookups: _Lookups):
        super().__init__(module, "step")
        self.lookups = lookups
        self.parts = None

    def params(self, old):
        widths = [self.lookups.width(v) for v in self.lookups.found]
        shape = [self.lookups.tokens.ty.shape[0], sum(widths)]
        self.hidden = relax.Var("hidden", relax.TensorType(shape, self.lookups.dtype))
        return [self.hidden, *old[1:]]

    def binding(self, var, value):
        if var in self.lookups.found:
            part = self.part(list(self.lookups.found).index(var))
            self.new[var] = part if dtype_of(part) == dtype_of(var) else self.emit(R.astype(part, dtype_of(var)))
        elif var not in self.lookups.indices:
            super().binding(var, value)

    def part(self, index: int) -> relax.Var:
        widths = [self.lookups.width(v) for v in self.lookups.found]
        if len(widths) == 1:
            return self.hidden
        if self.parts is None:
            ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            self.parts = self.emit(R.split(self.hidden, ends, axis=-1))
        return self.emit(relax.TupleGetItem(self.parts, index))


INTEGERS = {"int32", "int64", "bool"}


def dtype_of_or_none(value: relax.Expr) -> str | None:
    return dtype_of(value) if isinstance(value.ty, relax.TensorType) else None


def drop_unused_weights(function: relax.Function) -> relax.Function:
    """The function without the weights that it does not read, and without their names in llmc.weights."""
    count = int(function.attrs["num_input"])
    used = {v for b in bindings(function) for v in variables(b.value)} | variables(function.body.body)
    names = list(map(str, function.attrs["llmc.weights"]))
    kept = [(p, name) for p, name in zip(list(function.params)[count:], names, strict=True) if p in used]
    params = [*list(function.params)[:count], *(p for p, _ in kept)]
    new = relax.Function(params, function.body, function.ret_ty, function.is_pure, function.attrs)
    return new.with_attr("llmc.weights", [name for _, name in kept])
