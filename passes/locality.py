"""Token-locality analysis: where the tokens are in every value, and which op first mixes them outside the dialect.

Every value of a function is in one of these states:

    UNIFORM                 the same whatever the tokens are, and however many; its shape names no token axis
    Token(axis, outer, inner, rows)
                            dimension `axis` is outer · n · inner long, and its element (o · n + t) · inner + i depends
                            on token t alone (and, through semantic ops, on what that token may see)
    Opaque(kind)            page tables, pages, and the numbers of the answer rows: only semantic ops (and the gather of
                            answer rows) may touch them
    a tuple of states       for a tuple

`rows` names which axis is meant: "token" ([n]) or, after the answer rows were gathered, "answer" ([m]). Rules (one for
each op, in `locality_rules`) carry states through ops. What no rule knows is refused, by name, and what a rule says is
checked against the type of the result; so a wrong rule is far more likely to refuse than to accept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import tvm
from tvm import relax, tirx

from llmc.ir.errors import FormError
from llmc.ir.ops import op_of
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import shape_text
from llmc.passes.locality_rules import (
    CREATES,
    RULES,
    SIZED,
    UNIFORM,
    Mixing,
    Opaque,
    Site,
    State,
    Token,
    is_value,
    semantic_rule,
    shape_of,
)

__all__ = ["UNIFORM", "Analysis", "MixesTokens", "Opaque", "State", "Token", "analyze", "whereabouts"]

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Min": min,
    "Max": max,
}


class MixesTokens(FormError):
    """A function mixes tokens outside the dialect (or by an op that has no rule); `op` names it."""


def analyze(
    function: relax.Function,
    module: tvm.IRModule,
    n: tirx.Var,
    *,
    answers: tirx.Var | None = None,
    given: dict[relax.Var, State] | None = None,
) -> dict[relax.Var, State]:
    """The state of every variable of `function` whose token axis is as long as `n` says.

    answers: the variable that counts answer rows, in a function that gathers them. given: the states of parameters that
    are not what their type says (Opaque ones); all others are Token where n stands in their type, or UNIFORM.
    Raises MixesTokens, which names the first op that mixes tokens outside the dialect.
    """
    return Analysis(module, {n: "token"} | ({answers: "answer"} if answers is not None else {})).run(function, given)


class Analysis:
    """One run over one function. Rules see it through `Site`."""

    def __init__(self, module: tvm.IRModule, rows: dict[tirx.Var, str]):
        self.module = module
        self.rows = rows
        self.states: dict[relax.Var, State] = {}
        self.arithmetic = tvm.sym.Analyzer()

    def run(self, function: relax.Function, given: dict[relax.Var, State] | None = None) -> dict[relax.Var, State]:
        for p in function.params:
            self.states[p] = given[p] if given and p in given else self.from_type(p.ty)
        for binding in bindings(function):
            try:
                self.states[binding.var] = self.binding(binding)
            except Mixing as why:
                raise self.refusal(function, binding, why) from None
        return self.states

    def binding(self, binding: relax.Binding) -> State:
        value = binding.value
        state = self.call(value) if isinstance(value, relax.Call) else self.of(value)
        self.agrees(state, binding.var.ty)
        return state

    def of(self, value: relax.Expr) -> State:
        """The state of an expression that computes nothing."""
        if isinstance(value, relax.Tuple):
            return tuple(self.of(field) for field in value.fields)
        if isinstance(value, relax.TupleGetItem):
            state = self.of(value.tuple_value)
            return state[value.index] if isinstance(state, tuple) else state
        if isinstance(value, tvm.ir.GenericConst):
            return UNIFORM
        if isinstance(value, relax.Var) and value in self.states:
            return self.states[value]
        raise Mixing(f"there is no rule for a {type(value).__name__}")

    def call(self, call: relax.Call) -> State:
        op = op_of(self.module, call)
        if op is not None:
            return semantic_rule(op, self.site(call))
        name = op_name(call)
        if name is None or name.startswith("call_"):
            raise Mixing("a function that is no semantic op: there is no rule for it")
        site = self.site(call)
        counts = any(self.mentions_rows(a) for a in call.args if not is_value(a))
        if name == "arange" and (counts or self.type_mentions_rows(call.ty)):
            raise Mixing("it counts rows, which are positions only in a program of one sequence")
        if any(isinstance(s, Opaque) for s in site.flat) and name != "take":
            raise Mixing("it touches page tables, pages or answer rows, which only semantic ops may")
        if counts and name not in SIZED:
            raise Mixing("it depends on the number of tokens")
        if not any(site.flat):
            if (counts or self.type_mentions_rows(call.ty)) and name not in CREATES:
                raise Mixing("it makes rows of something that has none")
            return self.from_type(call.ty)
        if name not in RULES:
            raise Mixing("there is no rule for this op")
        return RULES[name](site)

    def site(self, call: relax.Call) -> Site:
        args = call.args
        if op_name(call) in ("call_tir", "call_tir_inplace"):
            args = args[1].fields
        return Site(self, call, list(args), [self.of(a) if is_value(a) else UNIFORM for a in args])

    # Shapes.

    def count(self, dimension: tirx.PrimExpr) -> tuple[str | None, int]:
        """(rows, c) of a dimension of c · n (or c · m) elements, (None, 0) of one that no rows are in."""
        if isinstance(dimension, tirx.IntImm):
            return None, 0
        for variable, rows in self.rows.items():
            if dimension.same_as(variable):
                return rows, 1
            if variable in self.variables(dimension):
                c = self.at_one(dimension, variable)
                if not self.arithmetic.can_prove_equal(dimension, variable * c):
                    raise Mixing(f"a dimension of {dimension} is no multiple of the number of tokens")
                return rows, c
        return None, 0

    def at_one(self, dimension: tirx.PrimExpr, variable: tirx.Var) -> int:
        """A dimension at variable = 1."""
        if isinstance(dimension, tirx.IntImm):
            return int(dimension)
        if dimension.same_as(variable):
            return 1
        operate = ARITHMETIC.get(type(dimension).__name__)
        if operate is None:
            raise Mixing(f"a dimension of {dimension} depends on more than the number of tokens")
        return operate(self.at_one(dimension.a, variable), self.at_one(dimension.b, variable))

    def variables(self, expr: tirx.PrimExpr) -> list[tirx.Var]:
        return list(tirx.analysis.undefined_vars(expr))

    def mentions_rows(self, value) -> bool:
        """Whether a shape, a number or a tuple of numbers depends on the number of tokens."""
        if isinstance(value, relax.ShapeExpr):
            return any(self.mentions_rows(d) for d in value.values)
        if isinstance(value, relax.Tuple):
            return any(self.mentions_rows(f) for f in value.fields)
        if isinstance(value, (tirx.IntImm, tirx.FloatImm, tvm.ir.StringImm)):
            return False
        if tvm.ir.is_prim_expr(value):
            return any(v in self.rows for v in self.variables(value))
        return True  # a shape in a variable: nothing is known of it

    def type_mentions_rows(self, ty) -> bool:
        if isinstance(ty, relax.TupleType):
            return any(self.type_mentions_rows(f) for f in ty.fields)
        return any(self.mentions_rows(d) for d in shape_of(ty))

    def from_type(self, ty) -> State:
        """The state of a value that each token has a copy of its own of, read off its type."""
        if isinstance(ty, relax.TupleType):
            return tuple(self.from_type(f) for f in ty.fields)
        counts = [(axis, *self.count(d)) for axis, d in enumerate(shape_of(ty))]
        found = [Token(axis, 1, count, rows) for axis, rows, count in counts if rows is not None]
        if len(found) > 1:
            raise Mixing("its result has two token axes")
        return found[0] if found else UNIFORM

    def agrees(self, state: State, ty) -> None:
        """The check on every rule: the rows that a state claims are those of the type, and there are no others."""
        if isinstance(state, Opaque):
            return
        if isinstance(ty, relax.TupleType):
            states = state if isinstance(state, tuple) else (state,) * len(ty.fields)
            for s, t in zip(states, ty.fields, strict=True):
                self.agrees(s, t)
            return
        if isinstance(state, tuple):
            raise Mixing("there is no rule for a tuple here")
        for axis, dimension in enumerate(shape_of(ty)):
            expected = (state.rows, state.outer * state.inner) if state and axis == state.axis else (None, 0)
            if self.count(dimension) != expected:
                raise Mixing(f"its result of shape {shape_text(shape_of(ty))} does not keep the tokens on one axis")

    # Errors.

    def refusal(self, function: relax.Function, binding: relax.Binding, why: Mixing) -> MixesTokens:
        value = binding.value
        name = op_name(value) or op_of(self.module, value)
        if name is None and isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            name = value.op.name_hint
        name = name or type(value).__name__
        return MixesTokens(
            f"expected every token to reach another through a semantic op alone, found {name} ({binding.var.name}, "
            f"{whereabouts(function, binding)}): {why}. Such a program can't serve many sequences at once",
            op=name,
        )


def whereabouts(function: relax.Function, binding: relax.Binding) -> str:
    """The weight that was last used before a binding: layers have no names, weights have."""
    names = list(function.attrs.get("llmc.weights", [])) if function.attrs else []
    weights = dict(zip(list(function.params)[len(function.params) - len(names) :], names, strict=True))
    last = None
    for b in bindings(function):
        used = [a for a in b.value.args if isinstance(a, relax.Var)] if isinstance(b.value, relax.Call) else []
        last = next((weights[a] for a in used if a in weights), last)
        if b.var.same_as(binding.var):
            break
    return f"near weight {last}" if last else "before the first weight"
