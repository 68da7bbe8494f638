"""The output head, a slice of the vocabulary at a time: neither its weight nor all logits are ever in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax

from llmc.ir.driver import numpy_dtype
from llmc.ir.rewrite import bindings, op_name
from llmc.quality.part import Part, Pieces, Product, piece_of, recognise

__all__ = ["Head", "find_head"]

WEIGHT, LOGITS = 16 << 20, 4 << 20  # bytes in float32 of a slice: of the weight, of the logits of a sequence
# What gives an element of its result from that element of its operands.
ELEMENTWISE = {"add", "astype", "clip", "divide", "maximum", "minimum", "multiply", "negative", "subtract", "tanh"}


class Ending(NamedTuple):
    """How a part ends: logits [n, vocab] = code(x · wᵀ, operands).

    x         what the product reads
    product   the step, with its weight
    chain     values from the product's to the logits
    operands  what the code reads besides: values of weights alone, one number or one for each column
    """

    x: relax.Var
    product: Product
    chain: list[relax.Var]
    operands: list[relax.Var]


class Head:
    """The last part of a program, whose logits are computed for a slice of the vocabulary at a time.

    before   the part up to the product: gives x, then the operands of the code that follows it
    product  the product with the head's weight
    width    columns of a slice; the last one may have fewer
    """

    def __init__(self, module: tvm.IRModule, pieces: Pieces, ending: Ending):
        self.product, self.pieces = ending.product, pieces
        self.before = Part(module, pieces, [ending.x, *ending.operands])
        vocab, (length, depth) = self.product.columns, map(int, ending.x.ty.shape.values)
        self.width = max(1, min(vocab, WEIGHT // (4 * depth), LOGITS // (4 * length)))
        first, *rest = ending.chain
        self.code = ""
        if rest:
            bound = {b.var: b.value for b in bindings(module["main"])}
            taken = [first, *ending.operands]
            narrow = {v: narrowed(v.ty, vocab, self.width) for v in taken}
            self.code = pieces.add(piece_of(taken, rest, rest[-1:], bound, narrow))

    @property
    def slices(self) -> list[slice]:
        """The vocabulary in slices."""
        vocab = self.product.columns
        return [slice(start, min(start + self.width, vocab)) for start in range(0, vocab, self.width)]

    def logits(self, x: np.ndarray, operands: Sequence[np.ndarray], w: np.ndarray, columns: slice) -> np.ndarray:
        """Logits float32 [n, len(w)] from what `before` gave and the rows w [len(w), i] of a slice of the weight."""
        out = (x @ w.T).astype(numpy_dtype(self.product.dtype), copy=False)
        if self.code:
            own = [
                values[..., columns] if values.shape[-1:] == (self.product.columns,) else values for values in operands
            ]
            given = [self.filled(values, len(w)) for values in (out, *own)]
            out = self.pieces.call(self.code, given)[0][:, : len(w)]
        return np.asarray(out, np.float32)

    def filled(self, values: np.ndarray, count: int) -> np.ndarray:
        """Values of `count` columns with zeros up to the width that code is compiled for; one number as it is."""
        missing = 0 if values.size == 1 else self.width - count
        padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values
        return np.ascontiguousarray(padded)


def narrowed(ty: relax.TensorType, vocab: int, width: int) -> relax.TensorType:
    """The type of `width` columns."""
    shape = [int(d) for d in ty.shape.values]
    return relax.TensorType([*shape[:-1], width] if shape[-1:] == [vocab] else shape, str(ty.dtype))


def find_head(module: tvm.IRModule, pieces: Pieces) -> Head | None:
    """The head of the last part of a program (inlined); None where it ends in something else."""
    ending = find_ending(module)
    return ending and Head(module, pieces, ending)


def find_ending(module: tvm.IRModule) -> Ending | None:
    """Back from the logits, through elementwise code, to the product with the head's weight."""
    function = module["main"]
    params, inputs = list(function.params), int(function.attrs["num_input"])
    weights = {v: i for i, v in enumerate(params[inputs:])}
    bound = {b.var: b.value for b in bindings(function)}
    (var,) = bound[function.body.body].fields
    chain: list[relax.Var] = []
    operands: list[relax.Var] = []
    while var in bound and len(var.ty.shape.values) == 2:
        chain.insert(0, var)
        value = bound[var]
        found = recognise(module, var, value, bound, weights)
        if found is not None:
            kind, (x, *_), weight, turned, casts = found
            vocab = int(var.ty.shape.values[-1])
            product = Product(kind, (), -1, weight, turned, casts, str(var.ty.dtype), vocab)
            fits = kind == "linear" and not turned and len(x.ty.shape.values) == 2
            return Ending(x, product, chain, operands) if fits else None
        if op_name(value) not in ELEMENTWISE:
            return None
        given = [a for a in value.args if isinstance(a.ty, relax.TensorType)]
        through = [a for a in given if same_shape(a, var)]
        if len(set(through)) != 1 or not all(a in through or spread(a, var) for a in given):
            return None
        operands += [a for a in given if isinstance(a, relax.Var) and a not in (*through, *operands)]
        var = through[0]
    return None


def same_shape(value: relax.Expr, other: relax.Expr) -> bool:
    return list(map(int, value.ty.shape.values)) == list(map(int, other.ty.shape.values))


def spread(value: relax.Expr, over: relax.Expr) -> bool:
    """Whether a value is the same in all rows of another: one number, or a variable of one for each column."""
    size = math.prod(map(int, value.ty.shape.values))
    return size == 1 or (
        isinstance(value, relax.Var) and size == int(value.ty.shape.values[-1]) == int(over.ty.shape[-1])
    )
