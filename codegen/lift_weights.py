"""Weight-only work leaves the step: it becomes recipes, done once at compile time."""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
import tvm_ffi
from tvm import relax

from llmc.ir.rewrite import Rewriter, bindings, op_name

__all__ = ["RECIPES", "LiftWeights"]

RECIPES = "llmc.recipes"

# Ops whose result is larger than what they read: cheaper to repeat in a kernel than to store.
GROWS = {"broadcast_to", "repeat", "tile", "zeros", "ones", "full", "one_hot"}


@dataclass(frozen=True)
class LiftWeights:
    """What depends on weights alone is computed at compile time.

        step(hidden, ..., w): x = matmul(hidden, permute_dims(w))      attrs llmc.weights = ["w"]
        ->
        step(hidden, ..., w_t): x = matmul(hidden, w_t)                attrs llmc.weights = ["w:permute_dims"]
        recipes: {"w:permute_dims": (w) -> permute_dims(w)}            attrs llmc.sources = ["w"]

    Keeps: every value, bit for bit. Leaves alone: weights that are used as they are (their recipe is the identity), and
    ops that make a weight larger. The recipes stand in the module's attribute "llmc.recipes", a map from name to Relax
    function; equal recipes of the same sources are one.
    """

    name: str = "lift_weights"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        recipes = _Recipes()
        for function in ("embed", "step"):
            module = _Lift(module, function, recipes).run()
        return module.with_attr(RECIPES, recipes.named)


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
        count = int(self.old.attrs["num_input"])
        names = [str(n) for n in self.old.attrs["llmc.weights"]]
        self.sources = dict(zip(list(self.old.params)[count:], names, strict=True))
        self.values = {}  # weight-only variable -> the expression it is bound to
        self.lifted = {}  # weight-only variable that something else uses -> the new parameter
        self.names = []
        for b in bindings(self.old):
            if self._weight_only(b.value):
                self.values[b.var] = b.value
        for var in self._boundary():
            self._lift(var)

    def _weight_only(self, value) -> bool:
        """The value is made of weights (and constants), by ops that are worth doing beforehand."""
        if isinstance(value, relax.Call):
            leaves = _leaves(value.args)
            pure = op_name(value) is not None and op_name(value) not in GROWS and not op_name(value).startswith("call_")
        elif isinstance(value, relax.TupleGetItem):
            leaves, pure = [value.tuple_value], True
        else:
            leaves, pure = _leaves([value]), isinstance(value, (relax.Var, relax.Tuple))
        variables = [x for x in leaves if isinstance(x, relax.Var)]
        known = all(x in self.sources or x in self.values for x in variables)
        return pure and bool(variables) and known

    def _boundary(self):
        """Weights, and variables made of weights, that the rest of the function uses, in order of first use."""
        used = {}
        for b in bindings(self.old):
            if b.var not in self.values:
                for x in _variables(b.value):
                    if x in self.values or x in self.sources:
                        used.setdefault(x)
        return used

    def _lift(self, var):
        sources, copies, chain = [], {}, []

        def visit(x):
            if x in copies:
                return
            if x in self.sources:
                copies[x] = relax.Var(f"w{len(sources)}", x.ty)
                sources.append(x)
                return
            value = self.values[x]
            for leaf in _variables(value):
                visit(leaf)
            copies[x] = x
            chain.append((x, value))

        visit(var)
        builder = relax.BlockBuilder()
        new = {s: copies[s] for s in sources}
        with builder.function("recipe", [copies[s] for s in sources]):
            with builder.dataflow():
                for x, value in chain:
                    new[x] = builder.emit(_substitute(value, new))
                out = builder.emit_output(new[var])
            builder.emit_func_output(out)
        function = relax.transform.CanonicalizeBindings()(builder.get())["recipe"]
        names = [self.sources[s] for s in sources]
        function = function.without_attr("global_symbol").with_attr("llmc.sources", names)
        name = self.recipes.add(names, function)
        if name in self.names:
            self.lifted[var] = next(p for v, p in self.lifted.items() if self._name_of[v] == name)
        else:
            self.names.append(name)
            self.lifted[var] = relax.Var(name.replace(".", "_").replace(":", "_").replace("+", "_"), var.ty)
        self._name_of = getattr(self, "_name_of", {}) | {var: name}

    def params(self, old):
        unique = list(dict.fromkeys(self.lifted.values()))
        self.new.update(self.lifted)
        return [p for p in old if p not in self.sources] + unique

    def attrs(self, old):
        return old | {"llmc.weights": self.names}

    def binding(self, var, value):
        if var in self.lifted:
            self.new[var] = self.lifted[var]
        elif var not in self.values:
            super().binding(var, value)


def _leaves(args):
    """Arguments with tuples opened."""
    for a in args:
        if isinstance(a, relax.Tuple):
            yield from _leaves(a.fields)
        else:
            yield a


def _variables(value):
    if isinstance(value, relax.Call):
        leaves = _leaves(value.args)
    elif isinstance(value, relax.TupleGetItem):
        leaves = [value.tuple_value]
    else:
        leaves = _leaves([value])
    return [x for x in leaves if isinstance(x, relax.Var)]


def _substitute(value, new):
    def sub(x):
        if isinstance(x, relax.Tuple):
            return relax.Tuple([sub(f) for f in x.fields])
        return new.get(x, x) if isinstance(x, relax.Var) else x

    if isinstance(value, relax.Call):
        return relax.Call(value.op, [sub(a) for a in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(sub(value.tuple_value), value.index)
    return sub(value)
