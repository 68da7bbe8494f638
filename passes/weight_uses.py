"""What a program does with each of its weights: which may be quantized, and which may not, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from llmc.ir.forms import weights_of
from llmc.ir.ops import attributes_of, op_of
from llmc.ir.rewrite import bindings, op_name, variables

__all__ = ["Use", "weight_uses"]


@dataclass
class Use:
    """How a program uses the weight [..., o, i] of products, or [rows, depth] of lookups.

    transposed  the parameter is [..., i, o]
    roles       of "product", "head" (a product whose results are logits), "router" (one that picks experts), "experts",
                "embedding" (a lookup of tokens), "table" (a lookup of anything else)
    sites       the calls that read it
    rowwise     all of what its products multiply it with is computed number by number or row by row, so that the kernel
                that does so can take one more factor: neither another product nor an attention gives it as it is
    other       an op that kernels over quantized weights do not know, if there is one
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    roles: set[str] = field(default_factory=set)
    sites: list[relax.Call] = field(default_factory=list)
    rowwise: bool = True
    other: str | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape [..., o, i]."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def see(self, role: str, transposed: bool, site: relax.Call) -> None:
        if self.roles and transposed != self.transposed:
            self.other = "a product with its transpose"
        self.transposed = transposed
        self.roles.add(role)
        self.sites.append(site)


def weight_uses(module: tvm.IRModule) -> dict[str, Use]:
    """The use of every float weight of two or three axes of `main`, in the imported or the textbook form."""
    return _Uses(module).found


class _Uses:
    def __init__(self, module: tvm.IRModule):
        self.module, main = module, module["main"]
        self.bound = {b.var: b.value for b in bindings(main)}
        self.found: dict[str, Use] = {}
        self.derived: dict[relax.Var, tuple[Use, bool]] = {}  # -> weight, and whether its last axes are turned
        for name, param in weights_of(main).items():
            shape = tuple(int(d) for d in param.ty.shape)
            if len(shape) in (2, 3) and "float" in str(param.ty.dtype):
                self.found[name] = Use(name, shape)
                self.derived[param] = self.found[name], False
        self.tokens = {main.params[0]}
        for var, value in self.bound.items():
            self.visit(var, value)
        result = main.body.body
        if isinstance(result, relax.Var):
            if result in self.derived:
                self.derived[result][0].other = "the result"
            self.mark(result, "head")
        for value in self.bound.values():
            if op_of(module, value) == "expert_linear":
                self.mark(value.args[2], "router")

    def visit(self, var: relax.Var, value: relax.Expr) -> None:
        used = variables(value)
        if used & self.tokens and isinstance(var.ty, relax.TensorType) and "int" in str(var.ty.dtype):
            self.tokens.add(var)
        if not used & self.derived.keys():
            return
        if isinstance(value, relax.Var):
            self.derived[var] = self.derived[value]
            return
        name = op_name(value)
        if name == "astype" or (name == "permute_dims" and _turns(value)):
            use, turned = self.derived[value.args[0]]
            self.derived[var] = use, turned != (name == "permute_dims")
            return
        if op_of(self.module, value) == "expert_linear":
            for bias in used & self.derived.keys() & set(value.args[3:]):  # no matrix of a product
                self.found.pop(self.derived.pop(bias)[0].name, None)
        read = self.read(value)
        for weight in used & self.derived.keys():
            use, turned = self.derived[weight]
            if read is None or not read[0].same_as(weight):
                use.other = name or op_of(self.module, value) or type(value).__name__
            else:
                _, role, columns_last = read
                use.see(role, turned != columns_last, value)
                use.rowwise &= self.rowwise(value.args[0])

    def read(self, value: relax.Expr) -> tuple[relax.Var, str, bool] | None:
        """The weight that a call reads, in what role, and whether as [..., i, o]; None for a call of another kind."""
        name = op_name(value)
        if name == "matmul" and value.args[0] not in self.derived and len(value.args[1].ty.shape) == 2:
            return value.args[1], "product", True
        if name == "take" and value.args[1] not in self.derived:
            by_row = value.attrs.axis is not None and int(value.attrs.axis) == 0 and len(value.args[0].ty.shape) == 2
            return (value.args[0], "embedding" if value.args[1] in self.tokens else "table", False) if by_row else None
        if op_of(self.module, value) == "expert_linear" and value.args[0] not in self.derived:
            return value.args[1], "experts", bool(attributes_of(self.module, value)["transposed"])
        return None

    def rowwise(self, x: relax.Expr) -> bool:
        """Is x computed, whatever moves it then, by an op that is neither a product nor a semantic one?"""
        value: Any = self.bound.get(x)
        while op_name(value) in _MOVES:
            value = self.bound.get(value.args[0])
        return op_name(value) not in (None, "matmul")

    def mark(self, result: relax.Expr, role: str) -> None:
        """Give `role` to the weights of the products that `result` is made of, through no other product."""
        todo, seen = [result], set()
        while todo:
            var = todo.pop()
            if not isinstance(var, relax.Var) or var in seen:
                continue
            seen.add(var)
            value = self.bound.get(var)
            if value is None:
                continue
            if op_name(value) == "matmul" and value.args[1] in self.derived:
                self.derived[value.args[1]][0].roles.add(role)
            elif op_of(self.module, value) is None:
                todo += variables(value)


# Ops that hand on what another has computed.
_MOVES = {"astype", "expand_dims", "flatten", "permute_dims", "repeat", "reshape", "squeeze", "take"}


def _turns(value: relax.Call) -> bool:
    """Does a permute_dims swap the last two axes, and nothing else?"""
    rank = len(value.args[0].ty.shape)
    axes = list(range(rank))[::-1] if value.attrs.axes is None else [int(a) % rank for a in value.attrs.axes]
    return axes == [*range(rank - 2), rank - 1, rank - 2]
