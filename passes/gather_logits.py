"""Only the rows that were asked for pass through the head, and through the last block's MLP."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.ops import op_of
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, needed_by
from llmc.passes.goal import Goal

__all__ = ["GatherLogits"]


@dataclass(frozen=True)
class GatherLogits:
    """Adds logit_rows [m]: the rows whose logits are returned, in float32.

        step(hidden, positions, qo_indptr, …):
            o = call_tir(paged_attention, …)                  [n, h, d]
            x = add(x, o_proj(o))
            return head(add(x, mlp(x)))                       [n, vocab]

    becomes

        step(hidden, positions, qo_indptr, logit_rows, …):
            o = take(call_tir(paged_attention, …), logit_rows, axis=0)
            x = add(take(x, logit_rows, axis=0), o_proj(o))   [m, …]
            return head(add(x, mlp(x)))                       [m, vocab] float32

    Rows are gathered as early as can be: every value that no attention needs is computed for the asked rows alone.
    They are counted by a variable of their own, so that nothing can take one axis for the other.

    Keeps: row i of the result is row logit_rows[i] of what step returned, bit for bit. Leaves alone: all that leads
    to an attention.
    """

    name: str = "gather_logits"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        return _Gatherer(module, "step").run()


class _Gatherer(Rewriter):
    def __init__(self, module: tvm.IRModule, function: str):
        super().__init__(module, function)
        self.bound = {b.var: b.value for b in bindings(self.old)}
        paged = {v for v, e in self.bound.items() if op_of(module, e) in (APPEND_PAGES, PAGED_ATTENTION)}
        # What is computed for all rows: all that leads to an attention, and the attentions themselves.
        self.whole = needed_by(list(paged), self.bound)
        self.whole |= {v for v, e in self.bound.items() if _field_of(e) in self.whole}
        self.n = self.old.params[0].ty.shape[0]
        self.m = tirx.Var("m", "int64")
        self.n_to_m = tvm.sym.Analyzer()
        self.n_to_m.bind(self.n, self.m)
        self.gathered: dict[relax.Var, relax.Var] = {}

    def params(self, old):
        self.logit_rows = relax.Var("logit_rows", relax.TensorType([self.m], "int32"))
        at = [p.name for p in old].index("qo_indptr") + 1
        return [*old[:at], self.logit_rows, *old[at:]]

    def attrs(self, old):
        return {**old, "num_input": int(old["num_input"]) + 1}

    def binding(self, var, value):
        if var in self.whole or not self.mentions_n(var.ty):
            super().binding(var, value)
        # All else is computed for the asked rows, when it is asked for.

    def result(self, body):
        logits = self.rows(body)
        return logits if dtype_of(logits) == "float32" else R.astype(logits, "float32")

    def rows(self, x: relax.Expr) -> relax.Expr:
        """The asked rows of an old expression: gathered where all rows exist, else computed from the asked rows."""
        if isinstance(x, relax.Tuple):
            return relax.Tuple([self.rows(f) for f in x.fields])
        if isinstance(x, relax.ShapeExpr):
            return relax.ShapeExpr([self.n_to_m.simplify(d) for d in x.values])
        if tvm.ir.is_prim_expr(x):
            return self.n_to_m.simplify(x)
        if not isinstance(x, relax.Var) or not self.mentions_n(x.ty):
            return self.get(x)
        if x not in self.gathered:
            self.gathered[x] = self.emit(self.gather(x), x.name)
        return self.gathered[x]

    def gather(self, x: relax.Var) -> relax.Expr:
        value, axis = self.bound.get(x), self.axis(x.ty)
        # Rounded once more for the asked rows: a product's kernel does it on the way, where it finds the op before it.
        rounds = op_of(self.module, value) == "round_activation"
        if axis is not None and (value is None or x in self.whole) and not rounds:
            return R.take(self.get(x), self.logit_rows, axis, mode="fast")
        if isinstance(value, relax.Call):
            return relax.Call(value.op, [self.rows(a) for a in value.args], value.attrs, value.ty_args)
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self.rows(value.tuple_value), value.index)
        return self.rows(value)

    def axis(self, ty: relax.Type) -> int | None:
        """The axis that has a row for each token; None where a token has several rows, or ty is a tuple's."""
        found = [i for i, d in enumerate(ty.shape) if d.same_as(self.n)] if isinstance(ty, relax.TensorType) else []
        return found[0] if found else None

    def mentions_n(self, ty: relax.Type) -> bool:
        if isinstance(ty, relax.TupleType):
            return any(self.mentions_n(f) for f in ty.fields)
        return isinstance(ty, relax.TensorType) and any(self.depends_on_n(d) for d in ty.shape)

    def depends_on_n(self, dimension: tvm.ir.Expr) -> bool:
        if isinstance(dimension, tirx.IntImm):
            return False
        return any(v.same_as(self.n) for v in tirx.analysis.undefined_vars(dimension))


def _field_of(value: relax.Expr) -> relax.Expr | None:
    return value.tuple_value if isinstance(value, relax.TupleGetItem) else None
