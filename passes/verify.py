"""Evaluate the program after every pass: the hook behind `--verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.driver import Driver, state_of
from llmc.ir.errors import CompileError
from llmc.ir.evaluate import Reference
from llmc.ir.forms import weight_names
from llmc.ir.ops import attributes_of, op_of
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION
from llmc.ir.quantized import activation_group
from llmc.ir.rewrite import Rewriter, bindings, dtype_of, op_name
from llmc.passes.goal import Goal
from llmc.passes.locality import whereabouts
from llmc.passes.pipeline import Pass
from llmc.passes.stands_for import fake_quantized

__all__ = ["TOLERANCE", "Verifier"]

# Largest error as a fraction of the spread of logits. A pass may change the order of a sum: in float32 some 1e-6 a
# layer; in half precision every value is rounded to 8 or 11 bits again.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
# What a cache in 8 bits may change: a number is off by half a step, 2 ** -8 or 2 ** -4 of the largest beside it.
LOSS = {"int8": 3e-2, "fp8": 1.5e-1}
# And afterwards: where sums differ in their last bits, a number between two codes may become the other one.
FLIPS = {"int8": 5e-3, "fp8": 5e-2}
# Activations in 8 bits (scheme.activation), by what they are rounded to: as of a cache.
ROUNDED = {"int8": 1e-1, "fp8": 3e-1}
ROUNDED_FLIPS = {"int8": 1e-2, "fp8": 5e-2}
# Later tokens attend to a number that became another, and a model may magnify it: how far a program moves is told by
# itself, with all that is rounded STIRRED as sums in another order are. Sequences of SHORT tokens are added, of which
# most meet no such number: their median is bound as if nothing was rounded.
STIRRED = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHORT = (1, 1, 1, 1, 1, 2, 2, 2, 3)
# Kernels over quantized weights may take activations as 16-bit fixed point in groups: 1e-5 of the largest beside each.
KERNELS = 5e-3
LONGEST = 256  # tokens; windows and chunks beyond it are not crossed


class Verifier:
    """After every pass that changed something, the program must still compute what the imported one computes.

        manager.run(imported.module, goal, on_pass=Verifier(imported.module, imported.weights, goal).on_pass)

    Sequences of `lengths` random tokens (by default of one token, a few, over two pages, past every window and chunk)
    run through the imported program one by one, and through the program after the pass: one by one too in the
    textbook form; from page_attention on side by side from paged caches: prefill, chunks, and decode in the same
    steps. Every weight is read into memory once.

    Quantized weights are another program: quantize_weights is held against the one before it over the weights that its
    codes stand for (numpy's word; ROUNDED off where activations are rounded too), and what comes after against it.
    Where activations are rounded, see STIRRED and SHORT.

    A cache in 8 bits (goal.kv_cache) changes what is computed: page_attention may be off by LOSS then, and what comes
    after is compared with what it made.

    Raises CompileError with the pass, the layer and the op where the two part.
    """

    def __init__(
        self,
        imported: tvm.IRModule,
        weights: Mapping[str, Any],
        goal: Goal,
        *,
        lengths: Sequence[int] | None = None,
        seed: int = 0,
    ):
        self.imported, self.schemes, self.kernels = imported, goal.schemes, 0.0
        self.weights = _Arrays(weights)
        self.tolerance, self.dtype, self.kv_cache = TOLERANCE[goal.dtype], goal.dtype, goal.kv_cache
        vocabulary = int(imported["main"].ret_ty.shape.values[-1])
        rng = np.random.default_rng(seed)
        lengths = list(telling_lengths(imported, goal) if lengths is None else lengths)
        rounds = any(scheme.activation is not None for scheme in self.schemes.values())
        self.short = range(len(lengths), len(lengths) + len(SHORT)) if rounds else range(0)
        lengths += SHORT if rounds else ()
        self.typical = float("inf")  # how far off the median of `short` may be
        self.rounding = 0.0  # what rounding of activations may cost
        self.tokens = {i: rng.integers(0, vocabulary, n).astype("int32") for i, n in enumerate(lengths)}
        self.wanted = self.run(imported)
        self.spread = max(float(np.ptp(w.astype("float64"))) for w in self.wanted.values())

    def on_pass(self, index: int, current: Pass, before: tvm.IRModule, after: tvm.IRModule) -> None:
        """The manager's hook."""
        if after.same_as(before):
            return
        if current.name == "quantize_weights":
            self.quantized(current, before, after)
            return
        found = self.run(after)
        wrong = self.wrong(found, self.allowed(current, self.tolerance), self.allowed(current, self.typical))
        if wrong is None:
            self.accept(current, found)
            return
        op, where = self.locate(before, after, wrong.sequence)
        raise CompileError(f"{self.words(current.name, wrong)}; {where}", pass_name=current.name, op=op)

    def quantized(self, current: Pass, before: tvm.IRModule, after: tvm.IRModule) -> None:
        """Hold a quantized program against the one before it; from here on it is what is wanted."""
        program, fake = fake_quantized(before, after, self.schemes, self.weights)
        given = {n: fake[n] if n in fake else self.weights[n] for n in weight_names(program["main"])}
        weights, self.weights = self.weights, _Arrays(given)
        self.wanted, self.weights = self.run(program), weights
        found = self.run(after)
        kinds, own, moved = rounded_to(after), self.tolerance, 0.0
        if kinds:
            stirred = self.run(Stirred(after, STIRRED[self.dtype]).run())
            moved = min(1.0, max(difference(stirred[s], found[s], self.spread) for s in self.tokens))
        self.rounding = max((ROUNDED[kind] for kind in kinds), default=0.0)
        rounded = max(own, self.rounding)
        wrong = self.wrong(found, rounded + 2 * moved, rounded)
        if wrong is not None:
            raise CompileError(self.words(current.name, wrong), pass_name=current.name, op="dequantize")
        if kinds:
            self.typical, self.tolerance = own, max(own, 2 * moved, *(ROUNDED_FLIPS[kind] for kind in kinds))
        self.wanted, self.imported = found, after
        self.kernels = KERNELS
        self.__dict__.pop("wanted_points", None)

    def allowed(self, current: Pass, bound: float) -> float:
        """How far a pass may bring the program from what is wanted, where others may by `bound`. What a cache in 8 bits
        changes makes rounded activations others: they may cost once more what they did."""
        return max(bound, LOSS[self.kv_cache] + self.rounding) if self.loses(current) and self.kv_cache else bound

    def loses(self, current: Pass) -> bool:
        """Does a pass round what the program computes with, on purpose?"""
        return self.kv_cache is not None and current.name == "page_attention"

    def accept(self, current: Pass, found: dict[int, np.ndarray]) -> None:
        """Passes after one that rounds are held against what it made."""
        if self.loses(current) and self.kv_cache:
            self.wanted, self.tolerance = found, max(self.tolerance, FLIPS[self.kv_cache])

    def judge(self, found: Mapping[int, np.ndarray], what: str, *, stage: str) -> None:
        """Raises CompileError where logits [n, vocab] of the sequences, computed by `what`, are not those wanted."""
        wrong = self.wrong(found, max(self.tolerance, self.kernels), max(self.typical, self.kernels))
        if wrong is not None:
            raise CompileError(self.words(what, wrong), stage=stage)

    def wrong(self, found: Mapping[int, np.ndarray], limit: float, typical: float) -> Wrong | None:
        """The worst sequence where that is further off than the limit, or the median one of `short` where that is
        further off than is typical; None where neither is."""
        errors = {s: difference(found[s], self.wanted[s], self.spread) for s in self.tokens}
        for sequences, rank, bound in ((self.tokens, -1, limit), (self.short, len(self.short) // 2, typical)):
            ranked = sorted(sequences, key=lambda s: errors[s])
            if ranked and not errors[ranked[rank]] <= bound:
                return Wrong(ranked[rank], errors[ranked[rank]], bound)
        return None

    def words(self, what: str, wrong: Wrong) -> str:
        return (
            f"{what} changed what the program computes: expected the imported program's logits within "
            f"{wrong.limit:g} of their spread, found an error of {wrong.error:.2g}"
        )

    @cached_property
    def wanted_points(self) -> dict[int, dict[Point, np.ndarray]]:
        """Operands and results of the imported program's semantic ops, for every sequence."""
        trace = Trace(self.imported)
        results = self.results(trace.module)
        return {s: dict(zip(trace.points, values[1:], strict=True)) for s, values in results.items()}

    def run(self, module: tvm.IRModule) -> dict[int, np.ndarray]:
        """Logits [n, vocab] of every sequence."""
        return {s: values[0] for s, values in self.results(module).items()}

    def results(self, module: tvm.IRModule) -> dict[int, list[np.ndarray]]:
        """What the program returns, logits and whatever it was made to return beside, row by row of every sequence."""
        return self.served(module) if function_of(module) == "step" else self.alone(module, self.tokens)

    def alone(self, module: tvm.IRModule, sequences: Iterable[int]) -> dict[int, list[np.ndarray]]:
        reference = Reference(module)
        main = module["main"]
        weights = [self.weights[name] for name in weight_names(main)]
        batch = len(main.params[0].ty.shape.values) == 2
        out = {}
        for s in sequences:
            tokens = self.tokens[s]
            positions = np.arange(len(tokens), dtype="int32")
            inputs = [tokens[None], positions[None]] if batch else [tokens, positions]
            values = as_list(reference(*inputs, *weights))
            out[s] = [values[0].reshape(len(tokens), -1), *values[1:]]
        return out

    def pages(self, module: tvm.IRModule) -> int:
        """How many pages hold all sequences."""
        return 1 + sum(-(-len(t) // g["page_size"]) for t in self.tokens.values() for g in state_of(module))

    def served(self, module: tvm.IRModule) -> dict[int, list[np.ndarray]]:
        driver = Driver(module, self.weights, pages=self.pages(module))
        parts: dict[int, list[list[np.ndarray]]] = {s: [] for s in self.tokens}
        for step in plan({s: len(t) for s, t in self.tokens.items()}):
            spans = {s: (driver.length(s), driver.length(s) + n) for s, n in step.items()}
            results = driver.results({s: self.tokens[s][lo:hi] for s, (lo, hi) in spans.items()})
            for s, values in results.items():
                parts[s].append(values)
        return {s: [np.concatenate(column) for column in zip(*steps, strict=True)] for s, steps in parts.items()}

    # Where two programs part.

    def locate(self, before: tvm.IRModule, after: tvm.IRModule, sequence: int) -> tuple[str | None, str]:
        """The op at which the program parts, and the words for it."""
        op, layer = self.first_point(after, sequence)
        value = self.first_value(before, after, sequence)
        if value is None:
            return op, f"{layer}; no value that both programs name differs in a plain prefill"
        return value[0], f"{layer}; the first value to differ is {value[1]}"

    def first_point(self, after: tvm.IRModule, sequence: int) -> tuple[str | None, str]:
        """The first semantic op whose operands or result are not those of the imported program."""
        trace, last = Trace(after), None
        values = self.results(trace.module)[sequence][1:]
        for point, value in zip(trace.points, values, strict=True):
            other = self.wanted_points[sequence].get(point)
            if other is None or value.size != other.size:
                continue  # the pass made something else of it: nothing to compare
            place = f"{point.value} of {point.op} of layer {point.layer}"
            if difference(value, other) > self.tolerance:
                if point.value == RESULT:
                    return point.op, f"{place} differs, its operands do not"
                return point.op, f"{place} differ, what is wrong lies between {last or 'the tokens'} and these"
            last = place
        return None, f"no semantic op differs, what is wrong lies behind {last or 'the tokens'}"

    def first_value(self, before: tvm.IRModule, after: tvm.IRModule, sequence: int) -> tuple[str, str] | None:
        """(op, place) of the first value of `after` that differs from the value of the same name in `before`."""
        old, new = (self.values(module, sequence) for module in (before, after))
        function = after[function_of(after)]
        for binding in bindings(function):
            name = binding.var.name
            if name not in old or name not in new or old[name].size != new[name].size:
                continue
            if difference(new[name], old[name]) > self.tolerance:
                op = op_name(binding.value)
                op = op_of(after, binding.value) if op is None or op.startswith("call_tir") else op
                op = op or type(binding.value).__name__
                return op, f"{name} ({op}, {whereabouts(function, binding)})"
        return None

    def values(self, module: tvm.IRModule, sequence: int) -> dict[str, np.ndarray]:
        """Every floating value of a program on one sequence by itself, by name."""
        tap, tokens = Tap(module), self.tokens[sequence]
        if tap.function == "main":
            results = self.alone(tap.module, [sequence])[sequence]
        else:
            results = Driver(tap.module, self.weights, pages=self.pages(module)).results({sequence: tokens})[sequence]
        return dict(zip(tap.names, results[1:], strict=True))


class Wrong(NamedTuple):
    """A sequence that is further off than it may be."""

    sequence: int
    error: float
    limit: float


class Stirred(Rewriter):
    """`run()` gives the program in which every number that is rounded to 8 bits is off by a share of up to `by`."""

    def __init__(self, module: tvm.IRModule, by: float):
        super().__init__(module, function_of(module))
        self.by, self.random = by, np.random.default_rng(0)

    def rewrite(self, var, value):
        if activation_group(self.module, value) is None:
            return self.again(value)
        [x] = map(self.get, value.args)
        shares = 1 + self.by * self.random.uniform(-1, 1, int(x.ty.shape[-1]))
        by = relax.const(shares.astype("float32"), "float32")
        stirred = self.emit(R.astype(self.emit(R.multiply(self.emit(R.astype(x, "float32")), by)), dtype_of(x)))
        return relax.Call(value.op, [stirred], value.attrs, value.ty_args)


def function_of(module: tvm.IRModule) -> str:
    """The function that computes logits: step from page_attention on, main before."""
    return "step" if any(v.name_hint == "step" for v in module.functions) else "main"


class Tap(Rewriter):
    """`module` is the program that also returns all its floating values; `names` says which."""

    def __init__(self, module: tvm.IRModule):
        super().__init__(module, function_of(module))
        self.tapped = [
            b.var for b in bindings(self.old) if is_floating(b.var.ty) and op_of(module, b.value) != APPEND_PAGES
        ]
        self.names = [v.name for v in self.tapped]
        self.module = self.run()

    def result(self, body: relax.Expr) -> relax.Expr:
        return relax.Tuple([self.get(body), *map(self.get, self.tapped)])


def is_floating(ty) -> bool:
    return isinstance(ty, relax.TensorType) and "float" in str(ty.dtype)


class Point(NamedTuple):
    """A value to compare: an operand or the result of a semantic op."""

    layer: int
    op: str
    which: int  # of its kind in the layer
    value: str


class Trace(Rewriter):
    """`module` is the program that also returns the operands and results of its semantic ops; `points` says which."""

    def __init__(self, module: tvm.IRModule):
        super().__init__(module, function_of(module))
        self.points: list[Point] = []
        self.values: list[relax.Var] = []
        self.layer = -1
        self.counts: dict[tuple[int, str], int] = {}
        self.appended: list[relax.Expr] = []
        self.module = self.run()

    def binding(self, var, value):
        op = op_of(self.module, value)
        operands = list(value.args) if op in ("attention", "expert_linear") else []
        if op == APPEND_PAGES:
            self.appended.append(value.args[1].fields[-5])  # the rows: four tables come after
        if op == PAGED_ATTENTION:
            op, operands = "attention", [value.args[1].fields[0], *self.appended]
            self.appended = []
        self.layer += op == "attention"
        super().binding(var, value)
        if op not in OPERANDS:
            return
        count = self.counts[self.layer, op] = self.counts.get((self.layer, op), -1) + 1
        for name, operand in zip(OPERANDS[op], operands, strict=False):
            self.keep(Point(self.layer, op, count, name), self.get(operand))
        self.keep(Point(self.layer, op, count, RESULT), self.new[var])

    def keep(self, point: Point, value: relax.Var) -> None:
        self.points.append(point)
        self.values.append(value)

    def result(self, body):
        return relax.Tuple([self.get(body), *self.values])


RESULT = "the result"
OPERANDS = {"attention": ("the queries", "the keys", "the values"), "expert_linear": ("the rows",)}


class _Arrays(Mapping):
    """Weights as arrays, read when first asked for."""

    def __init__(self, weights: Mapping[str, Any]):
        self.weights = weights
        self.read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.read:
            weight = self.weights[name]
            self.read[name] = weight if isinstance(weight, np.ndarray) else np.asarray(weight.read())
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def telling_lengths(imported: tvm.IRModule, goal: Goal) -> list[int]:
    """Lengths of sequences: one token, a few, over two pages, past every window and chunk (up to LONGEST)."""
    calls = [b.value for b in bindings(imported["main"]) if op_of(imported, b.value) == "attention"]
    reach = max([int(attributes_of(imported, c)[k]) for c in calls for k in ("window", "chunk")], default=0)
    longest = min(goal.max_context or LONGEST, LONGEST)
    lengths = {1, 7, 2 * goal.page_size + 3} | ({min(reach + goal.page_size + 3, longest)} if reach else set())
    return sorted(n for n in lengths if n <= longest)


def plan(lengths: Mapping[int, int]) -> list[dict[int, int]]:
    """Steps that bring every sequence to its length.

    Each is cut in two chunks and single tokens, and begins a step after the one before it, so that prefill, chunks and
    decode stand side by side.
    """
    cuts = {}
    for s, n in lengths.items():
        single = min(2, n - 1)
        half = (n - single + 1) // 2
        cuts[s] = [c for c in (half, n - single - half, *[1] * single) if c]
    last = max(i + len(c) for i, c in enumerate(cuts.values()))
    return [{s: c[k - i] for i, (s, c) in enumerate(cuts.items()) if 0 <= k - i < len(c)} for k in range(last)]


def difference(found: np.ndarray, wanted: np.ndarray, spread: float | None = None) -> float:
    """The largest error as a fraction of the spread (of what is wanted); infinite where there is a NaN."""
    found, wanted = found.astype("float64").ravel(), wanted.astype("float64").ravel()
    error = float(np.abs(found - wanted).max()) / max(spread or float(np.ptp(wanted)), 1e-9)
    return error if np.isfinite(error) else float("inf")


def as_list(value: np.ndarray | tuple) -> list[np.ndarray]:
    return list(value) if isinstance(value, tuple) else [value]


def rounded_to(module: tvm.IRModule) -> set[str]:
    """The kinds of numbers that a program's activations are rounded to: see llmc.ir.quantized.round_activation."""
    made = [f.attrs for f in module.functions.values() if f.attrs and f.attrs.get("llmc.op") == "round_activation"]
    return {str(attrs["kind"]) for attrs in made}
