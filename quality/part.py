"""Run a part of a program: products by the system's matrix multiplication, what stands between them by TVM.

TVM's plain code is the reference of everything but slow at products (a few GFLOP/s), which are nearly all of the
work. So a part becomes a list of steps: a product, or a function of all that can be computed before the next products.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from llmc.quality.layers import renamed

__all__ = ["Part", "Pieces", "Product", "Weights"]


class Weights(Protocol):
    """What products ask for: a weight of the part, by its number among the part's weights."""

    def matrix(self, weight: int, product: Product) -> np.ndarray:
        """A weight that is multiplied: float32, [o, i] ([i, o] if the product says `turned`), or one a matrix more."""

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
    """

    kind: str
    reads: tuple[int, ...]
    write: int
    weight: int
    turned: bool
    stored: tuple[str, ...]
    dtype: str


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


class Part:
    """A part of a program, ready to run. See layers.Layer for what `module` is.

    steps    in order. Values have numbers: first those that the part takes, then those that it makes; -1 - i is its
             weight i, as it is stored
    results  the values that the part writes
    """

    def __init__(self, module: tvm.IRModule, pieces: Pieces):
        self.pieces = pieces
        self.steps, self.results = stage(inlined(module), int(module["main"].attrs["num_input"]), pieces)
        readers: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            readers |= dict.fromkeys(step.reads, i)
        self.last = {v: i for v, i in readers.items() if v not in self.results}

    @property
    def products(self) -> list[Product]:
        return [step for step in self.steps if isinstance(step, Product)]

    def run(self, given: Sequence[np.ndarray], weights: Weights) -> list[np.ndarray]:
        """The values that the part writes, from those that it reads."""
        values: dict[int, np.ndarray] = dict(enumerate(given))
        for i, step in enumerate(self.steps):
            read = [values[r] if r >= 0 else weights.whole(-1 - r) for r in step.reads]
            if isinstance(step, Product):
                values[step.write] = multiply(step, read, weights)
            else:
                out = self.pieces.machine[step.piece](*map(tvm.runtime.tensor, read))
                values |= {w: out[k].numpy() for k, w in enumerate(step.writes)}
            for number in step.reads:
                if self.last.get(number) == i:
                    values.pop(number, None)
        return [values[v] for v in self.results]


def multiply(product: Product, operands: list[np.ndarray], weights: Weights) -> np.ndarray:
    """What a product gives. Sums are in float32, rounded once to its dtype."""
    if product.kind == "rows":
        return weights.rows(product.weight, product, operands[0])
    if product.kind == "matmul":
        out = np.matmul(*(np.asarray(x, np.float32) for x in operands))
    elif product.kind == "linear":
        (x,) = operands
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
        flat = weights.see(product.weight, product, flat, None)
        w = weights.matrix(product.weight, product)
        out = (flat @ (w if product.turned else w.T)).reshape(*x.shape[:-1], -1)
    else:
        x, ids, *bias = operands
        x = weights.see(product.weight, product, np.ascontiguousarray(x, np.float32), ids)
        w = weights.matrix(product.weight, product)
        out = np.empty((len(x), w.shape[2 if product.turned else 1]), np.float32)
        for expert in np.unique(ids):
            chosen = ids == expert
            out[chosen] = x[chosen] @ (w[expert] if product.turned else w[expert].T)
            if bias:
                out[chosen] += np.asarray(bias[0][expert], np.float32)
    return out.astype(numpy_dtype(product.dtype), copy=False)


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


def stage(module: tvm.IRModule, inputs: int, pieces: Pieces) -> tuple[list[Product | Plain], tuple[int, ...]]:
    """Steps of a part, and the values that it returns.

    Products come as early as what they read allows, all else as late as its readers do.
    """
    function = module["main"]
    params = list(function.params)
    weights = {v: i for i, v in enumerate(params[inputs:])}
    bound = {b.var: b.value for b in bindings(function)}
    heavy = {v: p for v, value in bound.items() if (p := recognise(module, v, value, bound, weights)) is not None}
    results = list(bound[function.body.body].fields)
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
                steps.append(Product(kind, read, numbers[var], weight, turned, casts, str(var.ty.dtype)))
    return steps, numbered(results, numbers)


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


def piece_of(taken: list, own: list, writes: list, bound: dict) -> relax.Function:
    """A function from `taken` to the tuple of `writes`, which computes `own`."""
    builder = relax.BlockBuilder()
    new: dict = {v: relax.Var(f"p{i}", v.ty) for i, v in enumerate(taken)}
    with builder.function("piece", [new[v] for v in taken]):
        with builder.dataflow():
            for var in own:
                new[var] = builder.emit(renamed(bound[var], new))
            out = builder.emit_output(relax.Tuple([new[v] for v in writes]))
        builder.emit_func_output(out)
    return builder.get()["piece"].without_attr("global_symbol")
