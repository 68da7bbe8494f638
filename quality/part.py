"""Run a part of a program: products by the system's matrix multiplication, what stands between them by TVM.

TVM's plain code is the reference of everything but slow at products (a few GFLOP/s), which are nearly all of the
work. So a part becomes a list of steps: a product, or a function of all that can be computed before the next products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from llmc.ir.driver import numpy_dtype
from llmc.ir.ops import attributes_of, callee, op_of
from llmc.ir.rewrite import Rewriter, bindings, op_name, variables
from llmc.quality.layers import nbytes, renamed

__all__ = ["Part", "Pieces", "Product", "Weights", "inlined", "piece_of", "recognise"]


class Weights(Protocol):
    """What products ask for: a weight of the part, by its number among the part's weights."""

    def slices(self, weight: int, product: Product, needed: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
        """A weight that is multiplied, [o, i] ([i, o] if the product says `turned`), or one a matrix more: slices of
        its rows in float32, each with the number of its first row. Of many matrices, only those `needed` have to come.
        """

    def rows(self, weight: int, product: Product, ids: np.ndarray) -> np.ndarray:
        """Rows of a weight [v, i], in the product's dtype: [*ids.shape, i]."""

    def whole(self, weight: int) -> np.ndarray:
        """A weight as it is stored."""

    def see(self, weight: int, product: Product, x: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        """Told the activation x [s, i] of a product (and who is its expert); returns what the product is to read."""


@dataclass(frozen=True)
class Product:
    """One step that is no TVM code.

    kind    "linear": x · wᵀ; "experts": expert_linear; "rows": rows of a table; "matmul": of two activations
    reads   the values that it reads, by number: x; x and ids (and a bias); ids; both operands
    write   the value that it gives
    weight  number of its weight among the part's, -1 for a matmul
    turned  the weight is stored [i, o], not [o, i]
    stored  dtypes that the weight is cast to before use, one after the other
    dtype   of the result
    columns of the result: its last axis
    """

    kind: str
    reads: tuple[int, ...]
    write: int
    weight: int
    turned: bool
    stored: tuple[str, ...]
    dtype: str
    columns: int


@dataclass(frozen=True)
class Plain:
    """A step of TVM code: one of the compiled pieces, from values to values."""

    piece: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Pieces:
    """The pieces of TVM code of all parts: equal ones are compiled once, and all of them in one go."""

    def __init__(self):
        self.module = tvm.IRModule()
        self.found: dict[int, list[str]] = {}

    def add(self, function: relax.Function) -> str:
        """The name under which the function is called."""
        same = self.found.setdefault(tvm_ffi.structural_hash(function), [])
        for name in same:
            if tvm_ffi.structural_equal(self.module[name].without_attr("global_symbol"), function):
                return name
        name = f"piece{len(self.module.functions)}"
        self.module[name] = function.with_attr("global_symbol", name)
        same.append(name)
        return name

    @cached_property
    def machine(self) -> relax.VirtualMachine:
        cpu = tvm.target.codegen.llvm_get_system_cpu()
        target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "opt-level": 2})
        return relax.VirtualMachine(tvm.compile(self.module, target), tvm.cpu())

    def call(self, name: str, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What a piece gives."""
        return [out.numpy() for out in self.machine[name](*map(tvm.runtime.tensor, operands))]


class Part:
    """A part of a program, ready to run.

    module   see layers.Layer, and inlined
    results  its values that are wanted; default: those that the part writes

    steps    in order. Values have numbers: first those that the part takes, then those that it makes; -1 - i is its
             weight i, as it is stored
    results  the numbers of those that are wanted
    peak     bytes of the values that one sequence has at a time, at most
    """

    def __init__(self, module: tvm.IRModule, pieces: Pieces, results: Sequence[relax.Var] = ()):
        self.pieces = pieces
        self.steps, self.results, sizes = stage(module, pieces, results)
        readers: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            readers |= dict.fromkeys(step.reads, i)
        self.last = {v: i for v, i in readers.items() if v not in self.results}
        self.peak = self.most_alive(sizes)

    @property
    def products(self) -> list[Product]:
        return [step for step in self.steps if isinstance(step, Product)]

    def most_alive(self, sizes: dict[int, int]) -> int:
        alive = {v for v in sizes if v >= 0 and not any(v in written(step) for step in self.steps)}
        most = sum(sizes[v] for v in alive)
        for i, step in enumerate(self.steps):
            alive |= set(written(step))
            most = max(most, sum(sizes[v] for v in alive))
            alive -= {v for v in alive if self.last.get(v, i + 1) <= i}
        return most

    def run(self, given: Sequence[Sequence[np.ndarray]], weights: Weights) -> list[list[np.ndarray]]:
        """The values that the part writes, from those that it reads, sequence by sequence.

        All sequences take a step before any takes the next: a slice of a weight is read once for all of them.
        """
        values: list[dict[int, np.ndarray]] = [dict(enumerate(own)) for own in given]
        for i, step in enumerate(self.steps):
            read = [[own[r] if r >= 0 else weights.whole(-1 - r) for r in step.reads] for own in values]
            if isinstance(step, Product):
                for own, found in zip(values, multiply(step, read, weights), strict=True):
                    own[step.write] = found
            else:
                for own, operands in zip(values, read, strict=True):
                    own |= dict(zip(step.writes, self.pieces.call(step.piece, operands), strict=True))
            for own in values:
                for number in step.reads:
                    if self.last.get(number) == i:
                        own.pop(number, None)
        return [[own[v] if v >= 0 else weights.whole(-1 - v) for v in self.results] for own in values]


def written(step: Product | Plain) -> tuple[int, ...]:
    return (step.write,) if isinstance(step, Product) else step.writes


def multiply(product: Product, operands: list[list[np.ndarray]], weights: Weights) -> list[np.ndarray]:
    """What a product gives, for the operands of each sequence. Sums are in float32, rounded once to its dtype."""
    if product.kind == "rows":
        return [weights.rows(product.weight, product, ids) for (ids,) in operands]
    if product.kind == "matmul":
        found = [np.matmul(*(np.asarray(x, np.float32) for x in both)) for both in operands]
    else:
        found = (linear if product.kind == "linear" else experts)(product, operands, weights)
    return [out.astype(numpy_dtype(product.dtype), copy=False) for out in found]


def linear(product: Product, operands: list[list[np.ndarray]], weights: Weights) -> list[np.ndarray]:
    """x · wᵀ for every x, a slice of w at a time."""
    xs = [np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32) for (x,) in operands]
    xs = [weights.see(product.weight, product, x, None) for x in xs]
    found = [np.zeros((len(x), product.columns), np.float32) for x in xs]
    for start, w in weights.slices(product.weight, product, None):
        rows = slice(start, start + len(w))
        for x, out in zip(xs, found, strict=True):
            if product.turned:
                out += x[:, rows] @ w
            else:
                np.matmul(x, w.T, out=out[:, rows])
    return [out.reshape(*x.shape[:-1], -1) for out, (x,) in zip(found, operands, strict=True)]


def experts(product: Product, operands: list[list[np.ndarray]], weights: Weights) -> list[np.ndarray]:
    """The product of every row of x with the matrix of its expert, a few experts at a time."""
    xs = [np.ascontiguousarray(x, np.float32) for x, *_ in operands]
    xs = [weights.see(product.weight, product, x, own[1]) for x, own in zip(xs, operands, strict=True)]
    found = [np.empty((len(x), product.columns), np.float32) for x in xs]
    needed = np.unique(np.concatenate([own[1] for own in operands]))
    for start, w in weights.slices(product.weight, product, needed):
        for x, (_, ids, *bias), out in zip(xs, operands, found, strict=True):
            for expert in np.unique(ids[(ids >= start) & (ids < start + len(w))]):
                chosen = ids == expert
                out[chosen] = x[chosen] @ (w[expert - start] if product.turned else w[expert - start].T)
                if bias:
                    out[chosen] += np.asarray(bias[0][expert], np.float32)
    return found


def inlined(module: tvm.IRModule) -> tvm.IRModule:
    """The bodies of semantic ops in main, their lengths numbers, but those of expert_linear, which stay calls."""
    return relax.transform.CanonicalizeBindings()(Inliner(module).run())


class Inliner(Rewriter):
    """Replaces a call of a semantic op by its meaning for the shapes that it is called with."""

    def rewrite(self, var, value):
        return self.again(value) if op_of(self.module, value) in (None, "expert_linear") else self.meaning(value)

    def meaning(self, call: relax.Call) -> relax.Expr:
        function: Any = callee(self.module, call)
        lengths = {}
        for param, argument in zip(function.params, call.args, strict=True):
            for own, given in zip(param.ty.shape.values, argument.ty.shape.values, strict=True):
                if isinstance(own, tirx.Var):
                    lengths[own] = given
        function = function.bind_symbolic_vars(lengths) if lengths else function
        self.new |= dict(zip(function.params, map(self.get, call.args), strict=True))
        for binding in bindings(function):
            self.new[binding.var] = self.emit(self.again(binding.value))
        return self.get(function.body.body)


def stage(
    module: tvm.IRModule, pieces: Pieces, results: Sequence[relax.Var] = ()
) -> tuple[list[Product | Plain], tuple[int, ...], dict[int, int]]:
    """Steps of a part, the values that it returns, and what each value takes in bytes.

    Products come as early as what they read allows, all else as late as its readers do.
    """
    function = module["main"]
    inputs = int(function.attrs["num_input"])
    params = list(function.params)
    weights = {v: i for i, v in enumerate(params[inputs:])}
    bound = {b.var: b.value for b in bindings(function)}
    heavy = {v: p for v, value in bound.items() if (p := recognise(module, v, value, bound, weights)) is not None}
    results = list(results or bound[function.body.body].fields)
    used = needed(results, bound, heavy)
    bound = {v: value for v, value in bound.items() if v in used and not isinstance(value, relax.Tuple)}
    when = timing(bound, heavy, results)
    numbers = {v: i for i, v in enumerate([*params[:inputs], *bound])} | {v: -1 - i for v, i in weights.items()}
    steps: list[Product | Plain] = []
    for time in range(max(when.values(), default=-1) + 1):
        own = [v for v in bound if v not in heavy and when[v] == time]
        later = {x for v in bound if v not in own for x in reads(v, bound, heavy)} | set(results)
        writes = [v for v in own if v in later]
        if writes:
            taken = list(dict.fromkeys(x for v in own for x in variables(bound[v]) if x not in own))
            piece = pieces.add(piece_of(taken, own, writes, bound))
            steps.append(Plain(piece, numbered(taken, numbers), numbered(writes, numbers)))
        for var, (kind, operands, weight, turned, casts) in heavy.items():
            if var in bound and when[var] == time:
                read = numbered(operands, numbers)
                columns = int(var.ty.shape.values[-1])
                steps.append(Product(kind, read, numbers[var], weight, turned, casts, str(var.ty.dtype), columns))
    return steps, numbered(results, numbers), {number: nbytes(v.ty) for v, number in numbers.items() if number >= 0}


def numbered(values: Sequence, numbers: dict) -> tuple[int, ...]:
    return tuple(numbers[v] for v in values)


def recognise(module: tvm.IRModule, var, value, bound: dict, weights: dict) -> tuple | None:
    """(kind, operands, weight, turned, casts) of a call that is done as a product; None for any other expression."""
    if not isinstance(value, relax.Call):
        return None
    if op_of(module, value) == "expert_linear":
        x, w, *others = value.args
        found = stored(w, bound, weights)
        turned = bool(attributes_of(module, value)["transposed"])
        return ("experts", (x, *others), found[0], turned, found[2]) if found and not found[1] else None
    if op_name(value) == "take" and value.attrs.axis is not None and int(value.attrs.axis) == 0:
        found = stored(value.args[0], bound, weights)
        fits = found and not found[1] and len(value.args[0].ty.shape) == 2 and isinstance(value.args[1], relax.Var)
        return ("rows", (value.args[1],), found[0], False, found[2]) if found and fits else None
    if op_name(value) == "matmul" and all(isinstance(a, relax.Var) for a in value.args):
        x, w = value.args
        found = stored(w, bound, weights)
        if found and len(w.ty.shape) == 2 and stored(x, bound, weights) is None:
            return "linear", (x,), found[0], not found[1], found[2]
        return "matmul", (x, w), -1, False, ()
    return None


def stored(value, bound: dict, weights: dict) -> tuple[int, bool, tuple[str, ...]] | None:
    """(number, transposed, casts) where `value` is a weight that is at most cast and transposed; else None."""
    turned = False
    casts: list[str] = []
    while value not in weights:
        made: Any = bound.get(value)
        if op_name(made) == "astype":
            casts.insert(0, str(made.ty.dtype))
        elif op_name(made) == "permute_dims" and len(made.ty.shape) == 2:
            turned ^= made.attrs.axes is None or [int(a) % 2 for a in made.attrs.axes] == [1, 0]
        else:
            return None
        value = made.args[0]
    return weights[value], turned, tuple(casts)


def reads(var, bound: dict, heavy: dict) -> set:
    """The values that a binding reads; a product does not read its weight."""
    return set(heavy[var][1]) if var in heavy else variables(bound[var])


def needed(results: list, bound: dict, heavy: dict) -> set:
    found, todo = set(), list(results)
    while todo:
        var = todo.pop()
        if var not in found:
            found.add(var)
            todo += reads(var, bound, heavy) if var in bound else ()
    return found


def timing(bound: dict, heavy: dict, results: list) -> dict:
    """For each value the round in which it is computed: plain code first, then products, round by round."""
    early: dict = {}
    for var in bound:
        early[var] = max((early[x] + (x in heavy) for x in reads(var, bound, heavy) if x in early), default=0)
    end = max((early[v] + (v in heavy) for v in results if v in early), default=0)
    when: dict = {}
    users: dict = {}
    for var in bound:
        for x in reads(var, bound, heavy):
            users.setdefault(x, []).append(var)
    for var in reversed(bound):
        # The fields of a tuple are taken where it is made: no tuple is alive between steps.
        at_once = var in heavy or isinstance(bound[var], relax.TupleGetItem) or isinstance(var.ty, relax.TupleType)
        when[var] = early[var] if at_once else min((when[u] for u in users.get(var, [])), default=end)
    return when


def piece_of(taken: list, own: list, writes: list, bound: dict, types: Mapping | None = None) -> relax.Function:
    """A function from `taken` to the tuple of `writes`, which computes `own`; of other types, if they are given."""
    builder = relax.BlockBuilder()
    new: dict = {v: relax.Var(f"p{i}", types[v] if types else v.ty) for i, v in enumerate(taken)}
    with builder.function("piece", [new[v] for v in taken]):
        with builder.dataflow():
            for var in own:
                new[var] = builder.emit(renamed(bound[var], new))
            out = builder.emit_output(relax.Tuple([new[v] for v in writes]))
        builder.emit_func_output(out)
    return builder.get()["piece"].without_attr("global_symbol")
