"""Serve a rewritten decoder by its reference and compare with the decoder as it was."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np

from llmc.ir.driver import Driver
from llmc.ir.evaluate import Reference
from llmc.passes.goal import Goal

# Pages of 4 tokens: sequences of a few tokens cross pages.
GOAL = Goal(target=SimpleNamespace(keys_token_last=True), page_size=4)
# float32 sums of tens of terms, in another order than the textbook's: errors of a few units in the last place of logits
# whose spread is about 1.
TOLERANCE = 2e-5

LENGTHS = {"a": 1, "b": 9, "c": 23, "d": 16}
# Prefill beside chunked prefill beside decode; a sequence without new tokens; joins and breaks.
PLAN = ({"c": 8}, {"a": 1, "b": 4, "c": 0, "d": 13}, {"b": 1, "c": 3, "d": 1}, {"d": 2, "c": 12, "b": 4})


def sequences(vocab: int, lengths=LENGTHS, seed=1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, vocab, n).astype("int32") for name, n in lengths.items()}


def textbook_logits(module, weights, tokens) -> dict[str, np.ndarray]:
    reference = Reference(module)
    arrays = [weights[str(name)] for name in module["main"].attrs["llmc.weights"]]
    return {s: reference(t, np.arange(len(t), dtype="int32"), *arrays) for s, t in tokens.items()}


def served_logits(module, weights, tokens, plan=PLAN, seed=0) -> dict[str, np.ndarray]:
    driver = Driver(module, weights, seed=seed)
    out = {s: [] for s in tokens}
    for step in plan:
        spans = {s: (driver.length(s), driver.length(s) + n) for s, n in step.items()}
        logits = driver.step({s: tokens[s][lo:hi] for s, (lo, hi) in spans.items()})
        for s, x in logits.items():
            out[s].append(x)
    return {s: np.concatenate(x) for s, x in out.items()}


def worst(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest error, in units of the logits' standard deviation; infinite where there is a NaN."""
    errors = []
    for s, x in want.items():
        assert got[s].shape == x.shape
        errors.append(np.abs(got[s].astype("float64") - x.astype("float64")).max() / x.astype("float64").std())
    return float(np.nan_to_num(max(errors), nan=np.inf)) if not any(map(np.isnan, errors)) else float("inf")


def error_of(module, decoder) -> float:
    """How far `module`, serving in mixed steps, is from the decoder's textbook."""
    tokens = sequences(decoder.vocab)
    return worst(served_logits(module, decoder.weights, tokens), wanted(decoder))


@functools.lru_cache(maxsize=4)  # faults are planted in one decoder after the other
def wanted(decoder) -> dict[str, np.ndarray]:
    return textbook_logits(decoder.module, decoder.weights, sequences(decoder.vocab))
