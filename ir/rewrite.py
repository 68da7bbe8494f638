"""Rebuild a function of a module binding by binding: what every rewrite of ours is made of."""

from __future__ import annotations

import tvm
from tvm import relax

__all__ = ["Rewriter", "bindings", "dtype_of", "finish", "needed_by", "op_name", "variables"]


def bindings(function: relax.Function):
    """Every binding of a function, in order."""
    return (binding for block in function.body.blocks for binding in block.bindings)


def op_name(value) -> str | None:
    """The op that a call is of, without its "relax." ("nn.softmax"); None for any other expression."""
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return value.op.name.removeprefix("relax.")
    return None


def dtype_of(value) -> str:
    """The dtype of a tensor's values ("float32")."""
    return str(value.ty.dtype)


def variables(value: relax.Expr) -> set[relax.Var]:
    """The variables that an expression (of a binding) reads."""
    if isinstance(value, relax.Var):
        return {value}
    if isinstance(value, relax.Tuple):
        return {v for field in value.fields for v in variables(field)}
    if isinstance(value, relax.TupleGetItem):
        return variables(value.tuple_value)
    if isinstance(value, relax.Call):
        return {v for arg in value.args for v in variables(arg)}
    return set()


def needed_by(results: list[relax.Var], bound: dict[relax.Var, relax.Expr]) -> set[relax.Var]:
    """The variables that results are computed from, themselves included."""
    needed, todo = set(), list(results)
    while todo:
        var = todo.pop()
        if var not in needed:
            needed.add(var)
            todo += variables(bound[var]) if var in bound else ()
    return needed


def finish(module: tvm.IRModule) -> tvm.IRModule:
    """Trivial bindings folded, code that nothing uses removed, for every function that can be called from outside."""
    entries = [v.name_hint for v, f in module.functions.items() if f.attrs and "global_symbol" in f.attrs]
    module = relax.transform.CanonicalizeBindings()(module)
    return relax.transform.DeadCodeElimination(entries)(module)


class Rewriter:
    """Rebuilds one function binding by binding. A subclass overrides the hooks it needs:

        params(old)         -> the new parameters; a list of relax.Var
        attrs(old)          -> the new attributes; a dict
        rewrite(var, value) -> the expression to stand where `value` stood; `var` is what it was bound to
        binding(var, value) -> all of a binding, where one expression is not enough: ends by setting `self.new[var]`
        result(body)        -> the expression to return

    and calls, within these: `emit(expr)` to bind an expression before the one being rewritten, `get(x)` for the new of
    an old variable (or tuple of variables), `again(value)` for the same expression over new arguments, whose type is
    inferred anew. Bindings keep their names, so that a diff shows only what changed.

    `run(into="step")` writes the function under another name, with symbolic variables of its own, and leaves the old.
    """

    def __init__(self, module: tvm.IRModule, function: str = "main"):
        self.module = module
        self.function = function
        self.old = module[function]
        self.builder = relax.BlockBuilder(module)
        self.new: dict[relax.Var, relax.Expr] = {}
        self.operand = ""

    def run(self, into: str | None = None) -> tvm.IRModule:
        temporary = f"{self.function}_rewritten"
        old_params = list(self.old.params)
        params = self.params(old_params)
        attrs = {k: v for k, v in self.attrs(dict(self.old.attrs)).items() if k != "global_symbol"}
        with self.builder.function(temporary, params, attrs=attrs):
            with self.builder.dataflow():
                for b in bindings(self.old):
                    if isinstance(b, relax.MatchCast):
                        self.new[b.var] = self.builder.match_cast(self.get(b.value), b.ty)
                    else:
                        self.operand = f"{b.var.name}_in"
                        self.binding(b.var, b.value)
                body = self.old.body.body
                name = body.name if isinstance(body, relax.Var) else ""
                out = self.builder.emit_output(self.result(body), name)
            self.builder.emit_func_output(out)
        module = self.builder.get()
        function = module[temporary]
        del module[temporary]
        if into is None:
            into = self.function
        else:
            function = relax.utils.copy_with_new_vars(function)
        module[into] = function.with_attr("global_symbol", into)
        return finish(module)

    def params(self, old: list[relax.Var]) -> list[relax.Var]:
        return old

    def attrs(self, old: dict) -> dict:
        return old

    def binding(self, var: relax.Var, value: relax.Expr) -> None:
        # The name of the function's result is kept for its output binding, which is emitted last.
        name = "" if var.same_as(self.old.body.body) else var.name
        self.new[var] = self.get(value) if isinstance(value, relax.Var) else self.emit(self.rewrite(var, value), name)

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr:
        return self.again(value)

    def result(self, body: relax.Expr) -> relax.Expr:
        return self.get(body)

    def emit(self, value: relax.Expr, name: str = "") -> relax.Var:
        """Binds an expression. Without a name it is called after the binding being rewritten (`lv7_in`)."""
        return self.builder.emit(value, name or self.operand)

    def get(self, x: relax.Expr) -> relax.Expr:
        if isinstance(x, relax.Tuple):
            return relax.Tuple([self.get(field) for field in x.fields])
        return self.new.get(x, x) if isinstance(x, relax.Var) else x

    def again(self, value: relax.Expr) -> relax.Expr:
        if isinstance(value, relax.Call):
            return relax.Call(value.op, [self.get(a) for a in value.args], value.attrs, value.ty_args)
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self.get(value.tuple_value), value.index)
        return self.get(value)
