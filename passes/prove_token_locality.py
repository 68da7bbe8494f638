"""The proof that ends the textbook stage."""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from llmc.ir.errors import FormError
from llmc.ir.forms import length_of
from llmc.passes.goal import Goal
from llmc.passes.locality import Token, analyze

__all__ = ["ProveTokenLocality"]


@dataclass(frozen=True)
class ProveTokenLocality:
    """Changes nothing; refuses a program in which a token reaches another outside the dialect.

    Raises MixesTokens, whose `op` is the first op that mixes tokens (or that no rule knows).
    """

    name: str = "prove_token_locality"

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule:
        main = module["main"]
        n = length_of(main.params[0].ty, len(main.params[0].ty.shape.values) - 1)
        if n is None:
            raise FormError(f"expected tokens of symbolic length, found {main.params[0].ty}")
        logits = analyze(main, module, n)[main.body.body]
        rank = len(main.ret_ty.shape.values)
        if logits != Token(rank - 2):
            raise FormError(f"expected logits of one row a token, found {logits}")
        return module
