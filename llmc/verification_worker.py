"""The process of `llmc verify`: python -m llmc.verification_worker ARTIFACT TARGET HOST REPORT.json"""

from __future__ import annotations

import json
import math
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tvm

from llmc import targets
from llmc.codegen.library import machine_code
from llmc.codegen.software_device import DeviceFault
from llmc.codegen.software_device import device as software
from llmc.ir.driver import Pages, numpy_dtype, unwritten
from llmc.ir.errors import CompileError
from llmc.ir.evaluate import Reference
from llmc.runtime import artifact
from llmc.runtime.devices import pages_of
from llmc.runtime.devices.gpu import GpuExecutor
from llmc.runtime.executor import Draws, Executor, HostLogits, Table
from llmc.runtime.sampler import Sampling, best, distribution

CACHE_TOKENS = 512
FILTERS = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)
# Unit roundoff of the activations' dtype: half the distance from 1 to the next number.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# Between codes of 8 bits: int8's of the largest number that shares their scale, fp8's of the number itself.
STEP = {"int8": 2.0**-7, "fp8": 2.0**-3}
PRODUCTS = 4  # of a layer, one after the other, that may read activations in 8 bits
ROUNDINGS = 12  # of a layer's values on their way through it: norms, projections, rotation, attention, gate, sums


def steps_of(page_size: int) -> tuple[tuple[str, dict[str, int]], ...]:
    """What travels in each step, by sequence: prefill over a page boundary, prefill beside decode, decode of both.

    After the first, the page that is whole is copied, and read from the copy from then on.
    """
    return (
        ("prefill", {"a": page_size + 3}),
        ("prefill and decode", {"a": 1, "b": 9}),
        ("decode", {"a": 1, "b": 1}),
        ("decode", {"b": 1, "a": 1}),
    )


def error_bound(dtype: str, layers: int, kv_cache: str | None = None, activations: Sequence[str] = ()) -> float:
    """How far logits may be from the reference's, of their spread.

    float32: the orders of sums differ, nothing else: 1e-4. float16 and bfloat16: kernels and reference round at
    different places (a fused kernel keeps float32 between its statements), about ROUNDINGS times a layer each.
    Roundings are independent, so that errors add as their squares do: roundoff · sqrt(2 · ROUNDINGS · layers), of the
    activations' size; twice that, as the largest of many logits is looked at. The spread is no less than their size.

    A cache in 8 bits (kv_cache): where keys differ by e, a share e / step of their numbers is coded a step further, in
    the root of the mean square by sqrt(e · step). So do activations that products take in 8 bits (of what kinds), with
    each product anew.
    """
    error = 1e-4 if dtype == "float32" else 2 * ROUNDOFF[dtype] * math.sqrt(2 * ROUNDINGS * layers)
    cached = math.sqrt(error * STEP[kv_cache]) if kv_cache else 0.0
    return (
        error + cached + max((math.sqrt(PRODUCTS * layers * error * STEP[kind]) for kind in activations), default=0.0)
    )


class ReferenceExecutor(HostLogits):
    """The plain loops of src/…zip, on this CPU, over the artifact's weights."""

    def __init__(self, module: tvm.IRModule, folder: Path, manifest: artifact.Manifest, entry: artifact.TargetEntry):
        self.groups = entry.state
        self.pages = [CACHE_TOKENS // group.page_size + 1 for group in entry.state]
        self.machine = Reference(module).machine
        weights = artifact.check(folder, manifest, entry)
        names = {name for f in ("embed", "step") for name in entry.functions[f].weights}
        held = {name: tensor(weights[name], weights.specs[name][1]) for name in names}
        self.weights = {f: [held[name] for name in entry.functions[f].weights] for f in ("embed", "step")}
        self.pools = [
            tvm.runtime.tensor(unwritten((count, *t.shape), t.dtype))
            for group, count in zip(entry.state, self.pages, strict=True)
            for t in group.tensors
        ]

    def embed(self, tokens: np.ndarray) -> Any:
        return self.machine["embed"](tvm.runtime.tensor(tokens), self.weights["embed"])

    def step(self, hidden, positions, qo_indptr, logit_rows, tables) -> np.ndarray:
        given = (positions, qo_indptr, logit_rows, *(array for table in tables for array in table))
        placed = [tvm.runtime.tensor(array) for array in given]
        return self.machine["step"](hidden, *placed, self.pools, self.weights["step"]).numpy()

    def copy_pages(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        raise NotImplementedError("the steps of a verification share no pages")

    def close(self) -> None:
        self.pools.clear()


def tensor(array: np.ndarray, dtype: str) -> Any:
    """bfloat16 is stored as its bits."""
    plain = np.ascontiguousarray(array)
    return tvm.runtime.tensor(plain.view(numpy_dtype(dtype)) if dtype == "bfloat16" else plain)


class Sequences:
    """Random tokens of the sequences that the steps extend, and the tables of each step."""

    def __init__(self, groups: Sequence[artifact.StateGroup], vocabulary: int):
        self.pages = [Pages(g.page_size, CACHE_TOKENS // g.page_size, g.window, g.chunk) for g in groups]
        self.random, self.vocabulary = np.random.default_rng(0), vocabulary

    def arguments(self, batch: Mapping[str, int]) -> tuple[np.ndarray, tuple]:
        """Tokens, and what a step takes beside them."""
        before = [self.pages[0].length.get(s, 0) for s in batch]
        positions = np.concatenate([start + np.arange(n) for start, n in zip(before, batch.values(), strict=True)])
        tables = [Table(*group.extend(batch)) for group in self.pages]
        count = sum(batch.values())
        tokens = self.random.integers(0, self.vocabulary, count).astype("int32")
        indptr = np.cumsum([0, *batch.values()]).astype("int32")
        return tokens, (positions.astype("int32")[None], indptr, np.arange(count, dtype="int32"), tables)

    def whole_pages(self, sequence: str, pages: Sequence[int]) -> list[dict[int, int]]:
        """Of each group, the first page of a sequence and one that nobody has. pages: how many the device has."""
        return [{group.held[sequence][0]: count - 1} for group, count in zip(self.pages, pages, strict=True)]


def from_copies(rest: tuple, copies: Sequence[Mapping[int, int]]) -> tuple:
    """What a step takes, with copies in place of the pages that were copied."""
    *others, tables = rest
    moved = []
    for table, pages in zip(tables, copies, strict=True):
        indices = np.array([pages.get(int(page), int(page)) for page in table.kv_indices], "int32")
        moved.append(table._replace(kv_indices=indices))
    return (*others, moved)


def one_by_one(tokens: np.ndarray, rest: tuple) -> Iterator[tuple[np.ndarray, tuple]]:
    """Of a step of several sequences, one of each."""
    positions, indptr, _, tables = rest
    for s, (start, stop) in enumerate(pairwise(indptr)):
        rows = np.arange(stop - start, dtype="int32")
        alone = []
        for table in tables:
            first, last = table.kv_indptr[s : s + 2]
            pages = np.array([0, last - first], "int32")
            alone.append(Table(pages, table.kv_indices[first:last], table.kv_last_page_len[s : s + 1]))
        yield tokens[start:stop], (positions[:, start:stop], np.array([0, len(rows)], "int32"), rows, alone)


def run(executor: Executor, tokens: np.ndarray, rest: tuple) -> tuple[np.ndarray, np.ndarray]:
    """-> a step's logits, and a token for each of their rows where the executor draws them (else none)."""
    logits = executor.step(executor.embed(tokens), *rest)
    found = np.array(executor.fetch(logits), "float32")
    return found, executor.sample(logits, draws_of(len(found))) if executor.samples else np.empty(0, np.int32)


def draws_of(rows: int) -> Draws:
    """Every other row greedy, every other by FILTERS."""
    drawn = np.arange(rows) % 2
    return Draws(
        (drawn * FILTERS.temperature).astype("float32"),
        (drawn * FILTERS.top_k).astype("int32"),
        np.where(drawn, FILTERS.top_p, 1).astype("float32"),
        (drawn * FILTERS.min_p).astype("float32"),
        ((np.arange(rows) * 0.37 + 0.1) % 1).astype("float32"),
    )


def wrong_tokens(logits: np.ndarray, tokens: np.ndarray) -> str:
    """What is wrong with the tokens that were drawn from these logits; "" if nothing is."""
    for row, token in enumerate(tokens):
        allowed = distribution(logits[row], FILTERS)[0] if row % 2 else [best(logits[row])]
        if token not in allowed:
            return f"row {row}: token {token} was drawn, expected one of {list(allowed)[:8]}"
    return ""


def placed(folder: Path, entry: artifact.TargetEntry) -> tuple[Any, tvm.IRModule]:
    """-> an artifact's kernels for a target on the software device, as an executable; and their plain loops."""
    assert entry.sources is not None
    [facts] = targets.parse(entry.target, entry.host)
    assert isinstance(facts, targets.GpuTarget)
    with zipfile.ZipFile(artifact.inside(folder, entry.sources.file)) as sources:
        for name in ("module.json", "reference.json"):
            if name not in sources.namelist():
                raise CompileError(
                    f"{entry.sources.file}: expected {name}, found {', '.join(sources.namelist()) or 'nothing'}: an "
                    "llmc that wrote none made this artifact; compile the model again with this one"
                )
        module, plain = (tvm.ir.load_json(sources.read(f"{n}.json").decode()) for n in ("module", "reference"))
        [text] = [sources.read(n).decode() for n in sources.namelist() if n.endswith((".cu", ".ll", ".metal"))]
    software.install(entry.kind, strict=True, text=text)
    return machine_code(module, tvm.target.Target(facts.tvm(), host={"kind": "llvm"}))[0], plain


def work(folder: Path, target: str, host: str) -> dict[str, Any]:
    """-> what `verification.Report` tells."""
    manifest = artifact.read(folder)
    [entry] = [t for t in manifest.targets if (t.target, t.host) == (target, host)]
    executable, plain = placed(folder, entry)
    steps = expected_steps(ReferenceExecutor(plain, folder, manifest, entry), entry, int(manifest.model["vocab_size"]))
    model = manifest.model
    rounded = (model.get("quantization") or {}).get("activations", ())
    bound = error_bound(entry.dtype, int(model["layers"]), model.get("kv_cache"), rounded)
    done: list[dict[str, Any]] = []
    found = {"bound": bound, "steps": done, "fault": ""}
    for invariant in (False, True) if "step_invariant" in entry.functions else (False,):
        machines = {
            order: GpuExecutor(
                folder, manifest, entry, cache_tokens=CACHE_TOKENS, batch_invariant=invariant,
                machine=executable.mod["vm_load_executable"](),
            )
            for order in ("forward", "reverse")
        }  # fmt: skip
        try:
            done += compared(machines, steps, invariant)
        except DeviceFault as fault:
            return found | {"fault": str(fault)}
        for machine in machines.values():
            machine.close()
    return found


class Step(NamedTuple):
    """What a step is given, and what it must come to.

    expected: logits. read: of each group, pages that are read from copies; made: copies to make once the step is done.
    """

    name: str
    tokens: np.ndarray
    rest: tuple
    expected: np.ndarray
    read: list[dict[int, int]]
    made: list[dict[int, int]]


def expected_steps(reference: Executor, entry: artifact.TargetEntry, vocabulary: int) -> list[Step]:
    """The steps of a verification, by the reference."""
    sequences = Sequences(entry.state, vocabulary)
    steps: list[Step] = []
    nothing: list[dict[int, int]] = [{} for _ in entry.state]
    for name, batch in steps_of(entry.state[0].page_size):
        tokens, rest = sequences.arguments(batch)
        expected, _ = run(reference, tokens, rest)
        read = steps[0].made if steps else nothing
        made = nothing if steps else sequences.whole_pages("a", pages_of(entry.state, CACHE_TOKENS))
        steps.append(Step(name, tokens, rest, expected, read, made))
    reference.close()
    return steps


def compared(machines: Mapping[str, Executor], steps: Sequence[Step], invariant: bool) -> Iterator[dict[str, Any]]:
    """Of each step, what a report tells. machines: by the order of their lanes, "forward" and "reverse".

    invariant: they run the functions whose sums are in one order; then the second runs each sequence by itself.
    Raises DeviceFault: a kernel did what has no meaning, or what must be the same bits is not.
    """
    for step in steps:
        whole = step.tokens, from_copies(step.rest, step.read)
        results, started = [], time.perf_counter()
        for order, machine in machines.items():
            software.configure(order=order)
            parts = one_by_one(*whole) if invariant and order == "reverse" else (whole,)
            try:
                results.append(
                    [np.concatenate(found) for found in zip(*(run(machine, *p) for p in parts), strict=True)]
                )
                for group, pages in enumerate(step.made):
                    if pages:
                        machine.copy_pages(group, list(pages), list(pages.values()))
            except Exception as error:
                fault = software.last_fault()
                if fault is None:
                    raise
                raise fault from error
        spread = float(step.expected.max() - step.expected.min())
        [forward, drawn], [reverse, again] = results
        off = float(np.abs(forward - step.expected).max()) / spread
        if not np.array_equal(forward, reverse):
            why = "a race, or sums that depend on the batch" if invariant else "a race"
            raise DeviceFault(f"{step.name}: lanes in reverse order give other logits: {why}")
        if not invariant and not np.array_equal(drawn, again):  # of one sequence, other rows are greedy
            raise DeviceFault(f"{step.name}: lanes in reverse order give other tokens: a race")
        if wrong := wrong_tokens(forward, drawn):
            raise DeviceFault(f"{step.name}: {wrong}")
        yield {
            "name": f"{step.name}, invariant" if invariant else step.name,
            "tokens": len(step.tokens),
            "error": off if math.isfinite(off) else math.inf,
            "seconds": round(time.perf_counter() - started, 2),
        }


def main(folder: str, target: str, host: str, answer: str) -> None:
    try:
        found = work(Path(folder), target, host)
    except CompileError as error:
        found = {"error": str(error)}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
