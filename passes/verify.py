"""Evaluate the program after every pass: the hook behind `--verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from llmc.ir.driver import Driver
from llmc.ir.errors import CompileError
from llmc.ir.evaluate import Reference
from llmc.ir.forms import weight_names
from llmc.ir.ops import op_of
from llmc.ir.rewrite import Rewriter, bindings, op_name
from llmc.passes.goal import Goal
from llmc.passes.locality import whereabouts
from llmc.passes.pipeline import Pass

__all__ = ["TOLERANCE", "Verifier"]

# Largest error as a fraction of the spread of logits. A pass may change the order of a sum: in float32 some 1e-6 a
# layer; in half precision every value is rounded to 8 or 11 bits again.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


class Verifier:
    """After every pass that changed something, the program must still compute what the imported one computes.

        manager.run(imported.module, goal, on_pass=Verifier(imported.module, imported.weights, goal).on_pass)

    Sequences of `lengths` random tokens run through the imported program one by one, and through the program after the
    pass: one by one too in the textbook form; from page_attention on side by side, in chunks and token by token, from
    paged caches. Every weight is read into memory once.

    Raises CompileError with the pass, the op and the nearest weight where the two part.
    """

    def __init__(
        self,
        imported: tvm.IRModule,
        weights: Mapping[str, Any],
        goal: Goal,
        *,
        lengths: Sequence[int] = (1, 23, 40),
        seed: int = 0,
    ):
        main = imported["main"]
        self.weights = {n: w.read() if hasattr(w, "read") else np.asarray(w) for n, w in weights.items()}
        rng = np.random.default_rng(seed)
        vocabulary = int(main.ret_ty.shape.values[-1])
        self.sequences = [rng.integers(0, vocabulary, n).astype("int32") for n in lengths]
        self.tolerance = TOLERANCE[goal.dtype]
        self.wanted = self.one_by_one(imported)
        self.spread = max(float(np.ptp(w)) for w in self.wanted)

    def on_pass(self, index: int, current: Pass, before: tvm.IRModule, after: tvm.IRModule) -> None:
        if after.same_as(before):
            return
        found = self.one_by_one(after) if has(after, "main") else self.side_by_side(after)
        error = max(float(np.abs(f - w).max()) for f, w in zip(found, self.wanted, strict=True)) / self.spread
        if error <= self.tolerance:
            return
        place = self.first_difference(before, after)
        where = f"the first value to differ is {place[1]}" if place else "no value that both programs name differs"
        raise CompileError(
            f"{current.name} changed what the program computes: expected the imported program's logits within "
            f"{self.tolerance:g} of their spread, found an error of {error:.2g}; {where}",
            pass_name=current.name,
            op=None if place is None else place[0],
        )

    def one_by_one(self, module: tvm.IRModule) -> list[np.ndarray]:
        run = Reference(module)
        return [logits_of(run(*self.inputs(module, s))) for s in self.sequences]

    def inputs(self, module: tvm.IRModule, tokens: np.ndarray) -> list[np.ndarray]:
        """Arguments of main in the imported form or the textbook form."""
        main = module["main"]
        shape = [1] * (len(main.params[0].ty.shape.values) - 1) + [len(tokens)]
        positions = np.arange(len(tokens), dtype="int32")
        return [tokens.reshape(shape), positions.reshape(shape), *(self.weights[n] for n in weight_names(main))]

    def side_by_side(self, module: tvm.IRModule) -> list[np.ndarray]:
        """Each sequence in three parts: the last token alone, and all before it cut in two at a different place."""
        driver = Driver(module, self.weights)
        parts: list[list[np.ndarray]] = [[] for _ in self.sequences]
        numbered = list(enumerate(self.sequences))
        cuts = [sorted({0, len(s) * (i + 1) // (len(self.sequences) + 1), len(s) - 1, len(s)}) for i, s in numbered]
        while any(len(c) > 1 for c in cuts):
            batch = {i: self.sequences[i][c[0] : c[1]] for i, c in enumerate(cuts) if len(c) > 1}
            for i, logits in driver.step(batch).items():
                parts[i].append(logits_of(logits))
                cuts[i] = cuts[i][1:]
        return [np.concatenate(p) for p in parts]

    # Where two programs part.

    def first_difference(self, before: tvm.IRModule, after: tvm.IRModule) -> tuple[str, str] | None:
        """(op, place) of the first value of `after` that differs from the value of the same name in `before`."""
        tokens = self.sequences[-1]
        old, new = (self.values(module, tokens) for module in (before, after))
        function = after["main" if has(after, "main") else "step"]
        for binding in bindings(function):
            name = binding.var.name
            if name not in old or name not in new or old[name].size != new[name].size:
                continue
            x, y = (v[name].astype("float64").ravel() for v in (old, new))
            if np.abs(x - y).max() > self.tolerance * max(float(np.ptp(x)), 1e-9):
                op = op_name(binding.value)
                op = op_of(after, binding.value) if op is None or op.startswith("call_tir") else op
                op = op or type(binding.value).__name__
                return op, f"{name} ({op}, {whereabouts(function, binding)})"
        return None

    def values(self, module: tvm.IRModule, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Every floating value of a program on one sequence, by name."""
        function = "main" if has(module, "main") else "step"
        tap = _Tap(module, function)
        tapped = tap.run()
        if function == "main":
            _, *values = Reference(tapped)(*self.inputs(module, tokens))
        else:
            driver = _TappedDriver(tapped, self.weights)
            driver.step({0: tokens})
            values = driver.values
        return dict(zip(tap.names, values, strict=True))


class _Tap(Rewriter):
    """Returns all floating values beside the result."""

    def __init__(self, module: tvm.IRModule, function: str):
        super().__init__(module, function)
        self.tapped = [b.var for b in bindings(self.old) if is_floating(b.var.ty) and not is_pages(module, b.value)]
        self.names = [v.name for v in self.tapped]

    def result(self, body: relax.Expr) -> relax.Expr:
        return relax.Tuple([self.get(body), *map(self.get, self.tapped)])


class _TappedDriver(Driver):
    def call(self, function: str, values: Mapping[str, object]):
        result = super().call(function, values)
        if function != "step":
            return result
        logits, *self.values = result
        return logits


def is_floating(ty) -> bool:
    return isinstance(ty, relax.TensorType) and "float" in str(ty.dtype)


def is_pages(module: tvm.IRModule, value: relax.Expr) -> bool:
    return op_of(module, value) == "append_pages"


def has(module: tvm.IRModule, name: str) -> bool:
    return any(v.name_hint == name for v in module.functions)


def logits_of(value: np.ndarray) -> np.ndarray:
    """Logits as [n, vocab] float32, whatever the form they come in."""
    return value.reshape(-1, value.shape[-1]).astype("float32")
