"""Cut a textbook program at its layers: where, between two attentions, the fewest bytes are alive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax

from llmc.ir.errors import CompileError
from llmc.ir.forms import weight_names
from llmc.ir.ops import op_of
from llmc.ir.rewrite import bindings, variables

__all__ = ["Layer", "cut_layers", "renamed"]


@dataclass(frozen=True)
class Layer:
    """A part of the program: a module whose `main` takes values of earlier parts, then weights, and returns a tuple.

    name     "embedding", "layer 0", …, "head"
    module   main(*reads, *weights) -> tuple of `writes`, every shape a number; semantic ops are calls still
    reads    values that it takes: 0 and 1 are tokens and positions, the others what earlier parts wrote
    writes   values that it gives to later parts; of the last part the logits, alone
    weights  their names in the program, in the order of the parameters
    """

    name: str
    module: tvm.IRModule
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    weights: tuple[str, ...]


def cut_layers(module: tvm.IRModule, length: int) -> list[Layer]:
    """The parts of a textbook program for sequences of `length` tokens, in order.

    Between one attention and the next, before the first and after the last, the program is cut at the last point at
    which the values alive take the fewest bytes: the residual stream alone, with what all layers share. No name is
    looked at.
    """
    module = bind_length(module, length)
    function = module["main"]
    inputs = list(function.params)[:2]
    weights = dict(zip(list(function.params)[2:], weight_names(function), strict=True))
    bound = {b.var: b.value for b in bindings(function)}
    uniform = set(weights)  # what depends on weights alone: computed in the part that reads it
    for var, value in bound.items():
        if op_of(module, value) is None and variables(value) <= uniform:
            uniform.add(var)
    order = [var for var in bound if var not in uniform]
    result = function.body.body
    if result not in bound or result in uniform:
        raise CompileError("expected logits that are computed from tokens, found some that depend on weights alone")
    points = cuts(order, bound, [i for i, v in enumerate(order) if op_of(module, bound[v]) == "attention"], result)
    numbers = {v: i for i, v in enumerate([*inputs, *order])}
    layers = []
    for k, (start, stop) in enumerate(zip([0, *points], [*points, len(order)], strict=True)):
        own = order[start:stop]
        used_later = {v for u in order[stop:] for v in variables(bound[u])} | {result}
        writes = [v for v in own if v in used_later]
        part, reads, names = extract(module, own, writes, bound, uniform, numbers, weights)
        name = "embedding" if k == 0 else "head" if k == len(points) else f"layer {k - 1}"
        layers.append(Layer(name, part, tuple(numbers[v] for v in reads), tuple(numbers[v] for v in writes), names))
    return layers


def bind_length(module: tvm.IRModule, length: int) -> tvm.IRModule:
    """The program for sequences of one length: shapes are numbers, in semantic ops as in main."""
    variable = module["main"].params[0].ty.shape.values[0]
    return relax.transform.BindSymbolicVars({variable.name: length}, "main")(module)


def cuts(order: list, bound: dict, attentions: list[int], result: relax.Var) -> list[int]:
    """How many values of `order` stand before each cut: one cut before every attention and one after the last."""
    last_use = {v: i for i, u in enumerate(order) for v in variables(bound[u])} | {result: len(order)}
    changes = [0] * (len(order) + 1)
    for i, var in enumerate(order):
        changes[i + 1] += nbytes(var.ty)
        if last_use.get(var, i) < len(order):
            changes[last_use.get(var, i) + 1] -= nbytes(var.ty)
    alive, live = 0, []
    for change in changes:
        alive += change
        live.append(alive)
    points = []
    embedded = next((i for i, v in enumerate(order) if str(getattr(v.ty, "dtype", "")).startswith(("float", "bf"))), 0)
    for first, last in zip([embedded, *attentions], [*attentions, len(order) - 1], strict=True):
        # Between `first` (whose value is then known) and `last` (which is still to come).
        between = range(first + 1, last + 1)
        points.append(min(between, key=lambda i: (live[i], -i), default=last))
    return points


def nbytes(ty) -> int:
    """What a value of this type takes; shapes are numbers."""
    if isinstance(ty, relax.TupleType):
        return sum(nbytes(field) for field in ty.fields)
    return math.prod(map(int, ty.shape.values)) * tvm.DataType(str(ty.dtype)).itemsize


def extract(module, own, writes, bound, uniform, numbers, weights):
    """The values `own` as a module of their own -> (it, the values it reads, names of the weights it takes)."""
    needed, todo = set(), [v for u in own for v in variables(bound[u])]
    while todo:
        var = todo.pop()
        if var not in needed:
            needed.add(var)
            todo += variables(bound[var]) if var in uniform and var in bound else ()
    inside = set(own)
    reads = sorted((v for v in needed if v in numbers and v not in inside), key=lambda v: numbers[v])
    params = [*reads, *(v for v in weights if v in needed)]
    builder = relax.BlockBuilder(module)
    new: dict = {v: relax.Var(f"p{i}", v.ty) for i, v in enumerate(params)}

    with builder.function("part", [new[v] for v in params], attrs={"num_input": len(reads)}):
        with builder.dataflow():
            for var, value in bound.items():
                if var not in inside and not (var in uniform and var in needed):
                    continue
                new[var] = builder.emit(renamed(value, new))
            out = builder.emit_output(relax.Tuple([new[v] for v in writes]))
        builder.emit_func_output(out)
    part = builder.get()
    function = part["part"]
    del part["part"], part["main"]
    part["main"] = function.with_attr("global_symbol", "main")
    part = relax.transform.DeadCodeElimination(["main"])(part)
    return part, reads, tuple(weights[v] for v in params[len(reads) :])


def renamed(value: relax.Expr, new: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """The expression over new variables; its type is inferred anew."""
    if isinstance(value, relax.Tuple):
        return relax.Tuple([renamed(field, new) for field in value.fields])
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [renamed(a, new) for a in value.args], value.attrs, value.ty_args)
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(renamed(value.tuple_value, new), value.index)
    return new.get(value, value) if isinstance(value, relax.Var) else value
