"""The proof that no token reaches another but through the dialect."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tvm
from tvm import relax

from llmc.ir.errors import FormError
from llmc.ir.forms import length_of, type_text
from llmc.passes.goal import Goal
from llmc.passes.locality import Opaque, State, Token, analyze

__all__ = ["ProveTokenLocality"]

TABLES = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")


@dataclass(frozen=True)
class ProveTokenLocality:
    """Changes nothing; refuses a program in which a token reaches another outside the dialect.

    In the textbook form main is proven; in the ragged form embed and step, where page tables and pages may go to
    semantic ops alone, and the answer rows, once gathered, are kept apart as tokens are.

    Raises MixesTokens, whose `op` is the first op that mixes tokens (or that no rule knows).
    """

    name: str = "prove_token_locality"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        functions = {v.name_hint: f for v, f in module.functions.items()}
        for name in ("main", "embed"):
            if name in functions:
                prove(functions[name], module, name)
        if "step" in functions:
            step = functions["step"]
            prove(step, module, "step", opaque_inputs(step))
        return module


def prove(
    function: relax.Function, module: tvm.IRModule, name: str, given: dict[relax.Var, State] | None = None
) -> None:
    """The first input has one row a token, the result one row a token (or, if answer rows are given, an answer)."""
    tokens = function.params[0].ty
    n = length_of(tokens, 1 if name == "main" and len(tokens.shape.values) == 2 else 0)
    if n is None:
        raise FormError(f"expected {name} to take a symbolic number of tokens, found {type_text(tokens)}")
    rows = next((p for p, state in (given or {}).items() if state == Opaque("answer rows")), None)
    answers = None if rows is None else length_of(rows.ty, 0)
    found = analyze(function, module, n, answers=answers, given=given)[function.body.body]
    expected = Token(len(function.ret_ty.shape.values) - 2, rows="token" if answers is None else "answer")
    if found != expected:
        raise FormError(f"expected {name} to return one row a token ({expected}), found {found}")


def opaque_inputs(step: relax.Function) -> dict[relax.Var, State]:
    """The inputs of `step` that are numbers of rows, pages and tokens, not values of tokens."""
    groups = json.loads(str(step.attrs["llmc.state"]))
    pages = {tensor["name"] for group in groups for tensor in group["tensors"]}
    states: dict[relax.Var, State] = {}
    for p in list(step.params)[: int(step.attrs["num_input"])]:
        if p.name in pages:
            states[p] = Opaque("pages")
        elif p.name == "logit_rows":
            states[p] = Opaque("answer rows")
        elif p.name.startswith(TABLES):
            states[p] = Opaque("table")
    return states
