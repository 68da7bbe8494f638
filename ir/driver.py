"""Drive a program of the ragged form by its reference: page tables in numpy, sequences that grow step by step.

What the runtime does at scale, in its plainest shape; verification and tests compare programs with it. Everything that
may not be read holds NaN: the scratch page, pages never written, slots past the end.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import ml_dtypes
import numpy as np
import tvm

from llmc.ir.evaluate import Reference
from llmc.ir.ragged_form import TABLES

__all__ = ["Driver", "Pages", "numpy_dtype", "state_of", "unwritten"]

Name = TypeVar("Name", bound=Hashable)  # of a sequence: whatever the caller calls it
Rows = Sequence[int] | np.ndarray


class Pages:
    """The pages of one state group: which sequence holds which, in what order.

    `count` pages, of which page 0 is scratch; they are handed out in a shuffled order, so that a program which takes a
    page's place for its number is found out. With a window or a chunk, pages that no later token can see go back at
    once and their entry names the scratch page.
    """

    def __init__(self, page_size: int, count: int, window: int = 0, chunk: int = 0, seed: int = 0):
        self.page_size, self.window, self.chunk = page_size, window, chunk
        self.free = [int(p) + 1 for p in np.random.default_rng(seed).permutation(count - 1)]
        self.held: dict[object, list[int]] = {}
        self.length: dict[object, int] = {}

    def first_seen(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        start = max(0, position - self.window + 1) if self.window else 0
        return max(start, position // self.chunk * self.chunk) if self.chunk else start

    def extend(self, new: Mapping[Name, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Makes room for new[s] tokens of each sequence s; returns kv_indptr, kv_indices, kv_last_page_len (int32)."""
        indptr, indices, last = [0], [], []
        for sequence, count in new.items():
            pages, length = self.held.setdefault(sequence, []), self.length.get(sequence, 0)
            unseen = self.first_seen(length) // self.page_size
            for i in range(min(unseen, len(pages))):
                if pages[i]:
                    self.free.insert(0, pages[i])
                    pages[i] = 0
            length += count
            while len(pages) * self.page_size < length:
                pages.append(self.free.pop())
            self.length[sequence] = length
            indptr.append(indptr[-1] + len(pages))
            indices += pages
            last.append(length - (len(pages) - 1) * self.page_size)
        return np.array(indptr, "int32"), np.array(indices, "int32"), np.array(last, "int32")


class Driver:
    """Serve sequences with a program whose attention is paged, by reference.

        driver = Driver(module, weights)
        driver.step({"a": [5, 9, 3], "b": [7]})      -> {"a": logits [3, vocab], "b": logits [1, vocab]}
        driver.step({"a": [1]}, rows={"a": [0]})     one more token of a; rows: which new tokens are asked for

    weights: name -> array, for all names in the functions' attribute llmc.weights. The program may stand anywhere
    between page_attention and the ragged form: parameters are filled by their names, and `embed` is called where
    there is one.
    """

    def __init__(self, module: tvm.IRModule, weights: Mapping[str, np.ndarray], *, pages: int = 64, seed: int = 0):
        self.reference = Reference(module)
        self.inputs = {v.name_hint: input_names(f) for v, f in module.functions.items() if v.name_hint in FUNCTIONS}
        names = {f: list(map(str, module[f].attrs["llmc.weights"])) for f in self.inputs}
        wanted = {name for ns in names.values() for name in ns}
        loaded = {name: tvm.runtime.tensor(np.ascontiguousarray(weights[name])) for name in wanted}
        self.weights = {f: [loaded[n] for n in ns] for f, ns in names.items()}
        self.state = state_of(module)
        self.groups = [Pages(g["page_size"], pages, g["window"], g["chunk"], seed) for g in self.state]
        self.pools = {
            t["name"]: tvm.runtime.tensor(unwritten((pages, *t["shape"]), t["dtype"]))
            for group in self.state
            for t in group["tensors"]
        }

    def length(self, sequence: object) -> int:
        return self.groups[0].length.get(sequence, 0) if self.groups else 0

    def step(self, batch: Mapping[Name, Rows], rows: Mapping[Name, Rows] | None = None) -> dict[Name, np.ndarray]:
        """Adds the new tokens of each sequence; returns the logits of `rows` of these (None: of all)."""
        return {s: values[0] for s, values in self.results(batch, rows).items()}

    def results(
        self, batch: Mapping[Name, Rows], rows: Mapping[Name, Rows] | None = None
    ) -> dict[Name, list[np.ndarray]]:
        """`step`, for a program that returns a tuple: logits, and other values of one or more rows a token."""
        tokens = [np.asarray(t, "int32") for t in batch.values()]
        indptr = np.cumsum([0, *map(len, tokens)])
        positions = [self.length(s) + np.arange(len(t)) for s, t in zip(batch, tokens, strict=True)]
        asked = {s: np.arange(len(t)) if rows is None else np.asarray(rows[s]) for s, t in batch.items()}
        values = {
            "tokens": np.concatenate(tokens),
            "positions": np.concatenate(positions)[None],
            "qo_indptr": indptr,
            "logit_rows": np.concatenate([start + r for start, r in zip(indptr, asked.values(), strict=False)]),
        }
        for i, group in enumerate(self.groups):
            table = group.extend({s: len(t) for s, t in zip(batch, tokens, strict=True)})
            values |= {f"{n}_{i}": t for n, t in zip(TABLES, table, strict=True)}
        values = {k: np.asarray(v, "int32") for k, v in values.items()} | self.pools
        if "embed" in self.inputs:
            values["hidden"] = self.call("embed", values)
        result = self.call("step", values)
        out = list(result) if isinstance(result, tuple) else [result]
        if "logit_rows" not in self.inputs["step"]:
            out[0] = out[0][values["logit_rows"]]
        ends = np.cumsum([len(r) for r in asked.values()])
        parts = [np.split(x, ends[:-1] * (len(x) // max(ends[-1], 1))) for x in out]
        return dict(zip(batch, map(list, zip(*parts, strict=True)), strict=True))

    def call(self, function: str, values: Mapping[str, object]):
        """What a function returns, its parameters filled from `values` and the weights."""
        inputs = [values[name] for name in self.inputs[function]]
        return self.reference(*inputs, *self.weights[function], function=function)


FUNCTIONS = ("embed", "step")


def input_names(function: tvm.relax.Function) -> list[str]:
    """The names of a function's parameters that are no weights."""
    return [p.name for p in list(function.params)[: int(function.attrs["num_input"])]]


def unwritten(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Pages that nothing has written: NaN; codes, whose scales are NaN, hold anything."""
    number = numpy_dtype(dtype)
    return np.full(shape, np.nan if number.kind not in "iu" else 85, number)


def state_of(module: tvm.IRModule) -> list[dict]:
    """The state groups of `step`: what its attribute llmc.state says."""
    return json.loads(str(module["step"].attrs["llmc.state"]))


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a TVM dtype's name; bfloat16 is ml_dtypes'."""
    return np.dtype(getattr(ml_dtypes, name, name))
