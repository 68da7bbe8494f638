"""Run a textbook program over many sequences, one layer after the other: bounded memory, any weights in any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from llmc.ir.driver import numpy_dtype
from llmc.quality.layers import Layer, cut_layers
from llmc.quality.part import Part, Pieces, Product

__all__ = ["Evaluator", "Use"]

SLICE = 64 << 20  # bytes of a weight that are converted at a time
State = list[dict[int, np.ndarray]]  # of every sequence, the values that are alive
Watch = Callable[["Use", np.ndarray, np.ndarray | None], None]


@dataclass(frozen=True)
class Use:
    """Where a program multiplies with a weight, or takes rows of it.

    weight   its name
    layer    number of the part of the program, see Evaluator.layers
    product  the step of the part; what it reads says which uses share an activation
    """

    weight: str
    layer: int
    product: Product


class Evaluator:
    """A textbook program for sequences of one length.

        evaluator = Evaluator(module, weights, length=512)
        for logits in evaluator(sequences): …              float32 [n, vocab], sequence by sequence

    Equal layers share one compiled function; of the weights, those of one layer are in memory. A Mapping of `others`
    puts other tensors in the place of weights: each with `read(start, stop)` -> rows, and perhaps `activation`, the
    group in which the activations of its products are rounded to 8 bits (see ir.round_activation), and `order`.

    module   the textbook form
    weights  name -> tensor with shape, dtype and read(start, stop)
    length   of every sequence, in tokens
    """

    def __init__(self, module: tvm.IRModule, weights: Mapping[str, Any], length: int):
        self.weights, self.length = weights, length
        self.layers: list[Layer] = cut_layers(module, length)
        self.parts: list[Part] = []
        pieces = Pieces()
        built: list[tuple[tvm.IRModule, Part]] = []
        for layer in self.layers:
            part = next((p for m, p in built if tvm_ffi.structural_equal(m, layer.module)), None)
            if part is None:
                part = Part(layer.module, pieces)
                built.append((layer.module, part))
            self.parts.append(part)
        # What is read after each part; of the last, the logits.
        reads = [set(layer.reads) for layer in self.layers[1:]] + [set(self.layers[-1].writes)]
        self.alive = [set().union(*reads[i:]) for i in range(len(reads))]

    def uses(self) -> list[Use]:
        """Every use of a weight that is a product or a table, in order."""
        return [
            Use(layer.weights[product.weight], i, product)
            for i, (layer, part) in enumerate(zip(self.layers, self.parts, strict=True))
            for product in part.products
            if product.kind != "matmul"
        ]

    def start(self, sequences: Sequence[np.ndarray]) -> State:
        """The state before the first part. Each sequence holds `length` token ids."""
        positions = np.arange(self.length, dtype="int32")
        return [{0: np.asarray(tokens, "int32"), 1: positions} for tokens in sequences]

    def hold(self, layer: int, others: Mapping[str, Any] | None = None) -> Held:
        """The weights of a part, read when they are first needed and kept as long as this lives."""
        return Held(self, layer, others or {})

    def run(self, layer: int, state: State, held: Held | None = None, watch: Watch | None = None) -> State:
        """The state after a part, with the weights of `held`. `watch` is told of every product what it reads."""
        held = held or self.hold(layer)
        held.watch = watch
        return [self.step(layer, values, held) for values in state]

    def step(self, layer: int, values: Mapping[int, np.ndarray], held: Held) -> dict[int, np.ndarray]:
        """One sequence through one part."""
        here = self.layers[layer]
        found = self.parts[layer].run([values[r] for r in here.reads], held)
        after = dict(values) | dict(zip(here.writes, found, strict=True))
        return {k: v for k, v in after.items() if k in self.alive[layer]}

    def logits(self, values: Mapping[int, np.ndarray], held: Held) -> np.ndarray:
        """Logits float32 [n, vocab] of one sequence, from its state before the last part."""
        (result,) = self.layers[-1].writes
        return np.asarray(self.step(len(self.layers) - 1, values, held)[result], np.float32)

    def __call__(
        self, sequences: Sequence[np.ndarray], others: Mapping[str, Any] | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of each sequence, one after the other: they are the largest of all values."""
        state, last = self.start(sequences), len(self.layers) - 1
        for layer in range(last):
            state = self.run(layer, state, self.hold(layer, others))
        held = self.hold(last, others)
        for values in state:
            yield self.logits(values, held)


class Held:
    """The weights of one layer, in the form in which its products read them; converted once for all sequences."""

    def __init__(self, evaluator: Evaluator, layer: int, others: Mapping[str, Any]):
        self.names, self.layer = evaluator.layers[layer].weights, layer
        self.watch: Watch | None = None
        self.plain, self.others = evaluator.weights, others
        self.matrices: dict[tuple, np.ndarray] = {}

    def tensor(self, weight: int) -> Any:
        name = self.names[weight]
        return self.others.get(name) if name in self.others else self.plain[name]

    def matrix(self, weight: int, product: Product) -> np.ndarray:
        key = (weight, product.stored)
        if key not in self.matrices:
            self.matrices[key] = read_float32(self.tensor(weight), self.casts(weight, product))
        return self.matrices[key]

    def casts(self, weight: int, product: Product) -> tuple[str, ...]:
        """A kernel takes the unrounded value of a weight in few bits: its casts are those of stored floats alone."""
        return () if self.names[weight] in self.others else product.stored

    def rows(self, weight: int, product: Product, ids: np.ndarray) -> np.ndarray:
        tensor, wanted = self.tensor(weight), np.unique(ids)
        count, width = tensor.shape
        found = np.empty((len(wanted), width), numpy_dtype(product.dtype))
        step = max(1, SLICE // (4 * width))
        for start in range(0, count, step):
            here = (wanted >= start) & (wanted < start + step)
            if here.any():
                found[here] = cast(tensor.read(start, start + step)[wanted[here] - start], self.casts(weight, product))
        return found[np.searchsorted(wanted, ids)]

    def whole(self, weight: int) -> np.ndarray:
        return self.plain[self.names[weight]].read()

    def see(self, weight: int, product: Product, x: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        if self.watch is not None:
            self.watch(Use(self.names[weight], self.layer, product), x, ids)
        group = getattr(self.others.get(self.names[weight]), "activation", None)
        return x if group is None else rounded_activation(x, group)


def read_float32(tensor: Any, casts: tuple[str, ...]) -> np.ndarray:
    """A tensor in float32, converted slice by slice."""
    out = np.empty(tensor.shape, np.float32)
    count = tensor.shape[0]
    step = max(1, SLICE * count // max(out.nbytes, 1))
    for start in range(0, count, step):
        out[start : start + step] = cast(tensor.read(start, min(start + step, count)), casts)
    return out


def cast(values: np.ndarray, casts: tuple[str, ...]) -> np.ndarray:
    """As the program casts a weight; to float32 from bfloat16 by a shift, ten times as quick as ml_dtypes does it."""
    for dtype in casts or ("float32",):
        if str(values.dtype) == "bfloat16" and dtype == "float32":
            bits = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)
            values = np.left_shift(bits, 16, out=bits).view(np.float32)
        else:
            values = values.astype(numpy_dtype(dtype), copy=False)
    return values


def rounded_activation(x: np.ndarray, group: int) -> np.ndarray:
    """What ir.round_activation says of x [s, i] float32, in numpy."""
    y = x.reshape(len(x), -1, group or x.shape[1])
    most = np.abs(y).max(axis=-1, keepdims=True)
    most = np.where(most > 0, most, np.float32(1))
    q = np.round(y * (np.float32(127) / most))
    return (q * (most * np.float32(1 / 127))).reshape(x.shape)
