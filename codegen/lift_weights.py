"""Weight-only work leaves the step: it becomes recipes, done once at compile time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import tvm
import tvm_ffi
from tvm import relax

from llmc.ir.errors import CompileError
from llmc.ir.quantized import format_of
from llmc.ir.rewrite import Rewriter, bindings, op_name

from .weight_only import WeightOnly, substitute, variables

__all__ = ["RECIPES", "LiftWeights"]

RECIPES = "llmc.recipes"


@dataclass(frozen=True)
class LiftWeights:
    """What depends on weights alone is computed at compile time.

        step(hidden, ..., w): x = matmul(hidden, permute_dims(w))      attrs llmc.weights = ["w"]
        ->
        step(hidden, ..., w_t): x = matmul(hidden, w_t)                attrs llmc.weights = ["w:permute_dims"]
        recipes: {"w:permute_dims": (w) -> permute_dims(w)}            attrs llmc.sources = ["w"]

    Keeps: every value, bit for bit. Leaves alone: weights that are used as they are (their recipe is the identity), and
    ops that make a weight larger. Refuses a dequantized weight that no kernel took: it would be stored in full. The
    recipes stand in the module's attribute "llmc.recipes", a map from name to Relax function; equal recipes of the same
    sources are one.
    """

    name: str = "lift_weights"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        recipes = _Recipes()
        for function in ("embed", "step"):
            refuse_dequantized(module, function)
            module = _Lift(module, function, recipes).run()
        return module.with_attr(RECIPES, recipes.named)


def refuse_dequantized(module: tvm.IRModule, name: str) -> None:
    """CompileError where a function still dequantizes a weight."""
    function = module[name]
    known = WeightOnly(module, function)
    for b in bindings(function):
        format = format_of(module, b.value)
        if format is not None:
            weight = known.sources.get(b.value.args[0], b.value.args[0].name)
            weight = str(weight).removesuffix(":codes")
            users = [op_name(u.value) or "a call" for u in bindings(function) if b.var in variables(u.value)]
            raise CompileError(
                f"expected every quantized weight to be read by a kernel, found {weight} ({format}) used by "
                f"{', '.join(users) or 'nothing'} in {name}: leave this weight as it is",
                op="dequantize",
            )


@dataclass
class _Recipes:
    """Recipes by name; one for every distinct function of its sources."""

    named: dict[str, relax.Function] = field(default_factory=dict)

    def add(self, sources: list[str], function: relax.Function) -> str:
        steps = [op_name(b.value) or "tuple" for b in bindings(function)]
        stem = _joined(sources) + (":" + "+".join(dict.fromkeys(steps)) if steps else "")
        name, count = stem, 1
        while name in self.named:
            if tvm_ffi.structural_equal(self.named[name], function):
                return name
            count += 1
            name = f"{stem}:{count}"
        self.named[name] = function
        return name


def _joined(sources: list[str]) -> str:
    """One name for several: "a.q.weight", "a.k.weight" -> "a.q+k.weight"."""
    parts = [s.split(".") for s in sources]
    if len({len(p) for p in parts}) > 1:
        return "+".join(sources)
    return ".".join("+".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))


class _Lift(Rewriter):
    def __init__(self, module, function, recipes):
        super().__init__(module, function)
        self.recipes = recipes
        self.known = WeightOnly(module, self.old)
        self.lifted = {}  # weight-only variable that something else uses -> the parameter in its place
        self.made = {}  # name of a recipe -> its parameter
        for var in self._boundary():
            self._lift(var)

    def _boundary(self):
        """Weights, and variables made of weights, that the rest of the function uses, in order of first use."""
        used: dict[relax.Var, None] = {}
        for b in bindings(self.old):
            if b.var not in self.known.values:
                used |= dict.fromkeys(x for x in variables(b.value) if x in self.known)
        return used

    def _lift(self, var):
        sources: list[relax.Var] = []
        copies: dict[relax.Var, relax.Var] = {}
        chain: list[tuple[relax.Var, relax.Expr]] = []

        def visit(x):
            if x in copies:
                return
            if x in self.known.sources:
                copies[x] = relax.Var(f"w{len(sources)}", x.ty)
                sources.append(x)
                return
            value = self.known.values[x]
            for leaf in variables(value):
                visit(leaf)
            copies[x] = x
            chain.append((x, value))

        visit(var)
        builder = relax.BlockBuilder()
        new = {s: copies[s] for s in sources}
        with builder.function("recipe", [copies[s] for s in sources]):
            with builder.dataflow():
                for x, value in chain:
                    new[x] = builder.emit(substitute(value, new))
                out = builder.emit_output(new[var])
            builder.emit_func_output(out)
        function = relax.transform.CanonicalizeBindings()(builder.get())["recipe"]
        names = [self.known.sources[s] for s in sources]
        function = function.without_attr("global_symbol").with_attr("llmc.sources", names)
        name = self.recipes.add(names, function)
        if name not in self.made:
            self.made[name] = relax.Var(re.sub(r"\W", "_", name), var.ty)
        self.lifted[var] = self.made[name]

    def params(self, old):
        self.new.update(self.lifted)
        return [p for p in old if p not in self.known.sources] + list(self.made.values())

    def attrs(self, old):
        return old | {"llmc.weights": list(self.made)}

    def binding(self, var, value):
        if var in self.lifted:
            self.new[var] = self.lifted[var]
        elif var not in self.known.values:
            super().binding(var, value)
