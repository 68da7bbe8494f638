"""Run a textbook program over many sequences, one layer after the other: bounded memory, any weights in any place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import tvm
import tvm_ffi

from llmc.ir.driver import numpy_dtype
from llmc.ir.quantized_cache import LARGEST, TINY
from llmc.quality.head import Head, find_head
from llmc.quality.layers import Layer, cut_layers
from llmc.quality.part import Part, Pieces, Product, inlined

__all__ = ["Evaluator", "Use"]

SLICE = 32 << 20  # bytes in float32 of a weight that are converted at a time
KEPT = 96 << 20  # bytes in float32 of the weights of a part that are kept from one run of it to the next
ALIVE = 64 << 20  # bytes of the values of sequences that go through a part side by side
State = list[dict[int, np.ndarray]]  # of every sequence, the values that are alive
Own = TypeVar("Own")
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

    Equal layers share one compiled function. Memory does not grow with the model: weights are read in slices, and only
    so many sequences go through a part side by side as ALIVE bytes of their values allow. A Mapping of `others` puts
    other tensors in the place of weights: each with `read(start, stop)` -> rows, and perhaps `activation`, the group in
    which the activations of its products are rounded to 8 bits (see ir.round_activation; to what, `format` says), and
    `order`.

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
                part = Part(inlined(layer.module), pieces)
                built.append((layer.module, part))
            self.parts.append(part)
        self.head: Head | None = find_head(inlined(self.layers[-1].module), pieces)
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
        part, here, found = self.parts[layer], self.layers[layer], []
        for some in self.together(state, part):
            written = part.run([[values[r] for r in here.reads] for values in some], held)
            after = [
                values | dict(zip(here.writes, own, strict=True)) for values, own in zip(some, written, strict=True)
            ]
            found += [{k: v for k, v in values.items() if k in self.alive[layer]} for values in after]
        return found

    def together(self, state: list[Own], part: Part) -> Iterator[list[Own]]:
        """What there is of each sequence, in groups that can go through a part side by side."""
        size = max(1, ALIVE // max(part.peak, 1))
        return (state[i : i + size] for i in range(0, len(state), size))

    def approach(self, state: State, held: Held) -> list[list[np.ndarray]]:
        """From the state before the last part, what `logits` reads of each sequence."""
        given = [[values[r] for r in self.layers[-1].reads] for values in state]
        if self.head is None:
            return given
        found = [own for some in self.together(given, self.head.before) for own in self.head.before.run(some, held)]
        return [[held.read(self.head.product, x), *operands] for x, *operands in found]

    @property
    def slices(self) -> list[slice]:
        """The vocabulary in slices; in one, where the last part ends in something else than a head."""
        return [slice(None)] if self.head is None else self.head.slices

    def logits(self, read: Sequence[np.ndarray], held: Held, columns: slice) -> np.ndarray:
        """Logits float32 [n, …] of one sequence for a slice of the vocabulary, from what `approach` gave."""
        if self.head is None:
            ((logits,),) = self.parts[-1].run([read], held)
            return np.asarray(logits, np.float32)
        x, *operands = read
        return self.head.logits(x, operands, held.columns(self.head.product, columns), columns)

    def __call__(
        self, sequences: Sequence[np.ndarray], others: Mapping[str, Any] | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of each sequence, one after the other: they are the largest of all values."""
        state, last = self.start(sequences), len(self.layers) - 1
        for layer in range(last):
            state = self.run(layer, state, self.hold(layer, others))
        (result,), held = self.layers[-1].writes, self.hold(last, others)
        for values in state:
            yield np.asarray(self.run(last, [values], held)[0][result], np.float32)


class Held:
    """The weights of one part as its products read them; what fits into KEPT is converted once for all runs."""

    def __init__(self, evaluator: Evaluator, layer: int, others: Mapping[str, Any]):
        self.names, self.layer = evaluator.layers[layer].weights, layer
        self.watch: Watch | None = None
        self.plain, self.others = evaluator.weights, others
        self.kept: dict[tuple, np.ndarray] = {}
        self.last: tuple[slice, np.ndarray] | None = None  # the slice of the head that was read last

    def tensor(self, weight: int) -> Any:
        name = self.names[weight]
        return self.others.get(name) if name in self.others else self.plain[name]

    def slices(self, weight: int, product: Product, needed: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
        key, tensor = (weight, product.stored), self.tensor(weight)
        size, count = 4 * math.prod(tensor.shape), tensor.shape[0]
        if key in self.kept or size + sum(w.nbytes for w in self.kept.values()) <= KEPT:
            if key not in self.kept:
                self.kept[key] = self.matrix(weight, product)
            yield 0, self.kept[key]
            return
        step = max(1, SLICE * count // max(size, 1))
        for start in range(0, count, step):
            if needed is None or ((needed >= start) & (needed < start + step)).any():
                yield start, self.part(weight, product, slice(start, min(start + step, count)))

    def matrix(self, weight: int, product: Product) -> np.ndarray:
        """All of a weight in float32, converted slice by slice."""
        tensor = self.tensor(weight)
        out = np.empty(tensor.shape, np.float32)
        step = max(1, SLICE * len(out) // max(out.nbytes, 1))
        for start in range(0, len(out), step):
            rows = slice(start, min(start + step, len(out)))
            out[rows] = self.part(weight, product, rows)
        return out

    def part(self, weight: int, product: Product, rows: slice) -> np.ndarray:
        """Rows of a weight in float32."""
        return cast(self.tensor(weight).read(rows.start, rows.stop), self.casts(weight, product))

    def columns(self, product: Product, rows: slice) -> np.ndarray:
        """Rows of the head's weight; those that were read last are kept."""
        if self.last is None or self.last[0] != rows:
            self.last = None
            self.last = rows, self.part(product.weight, product, rows)
        return self.last[1]

    def read(self, product: Product, x: np.ndarray) -> np.ndarray:
        """What the head's product is to read, [n, i] float32."""
        return self.see(product.weight, product, np.ascontiguousarray(x, np.float32), None)

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
        other = self.others.get(self.names[weight])
        group, format = (getattr(other, name, None) for name in ("activation", "format"))
        return x if group is None else rounded_activation(x, group, format.rounds if format else "int8")


def cast(values: np.ndarray, casts: tuple[str, ...]) -> np.ndarray:
    """As the program casts a weight; to float32 from bfloat16 by a shift, ten times as quick as ml_dtypes does it."""
    for dtype in casts or ("float32",):
        if str(values.dtype) == "bfloat16" and dtype == "float32":
            bits = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)
            values = np.left_shift(bits, 16, out=bits).view(np.float32)
        else:
            values = values.astype(numpy_dtype(dtype), copy=False)
    return values


def rounded_activation(x: np.ndarray, group: int, kind: str = "int8") -> np.ndarray:
    """What ir.round_activation says of x [s, i] float32, in numpy."""
    y, largest = x.reshape(len(x), -1, group or x.shape[1]), LARGEST[kind]
    most = np.maximum(np.abs(y).max(axis=-1, keepdims=True), np.float32(TINY))
    q = y * (np.float32(largest) / most)
    q = np.round(q) if kind == "int8" else q.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return (q * (most * np.float32(1 / largest))).reshape(x.shape)
