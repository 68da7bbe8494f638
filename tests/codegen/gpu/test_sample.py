"""Sampling on the device, run strictly on the software device: which tokens may be drawn, and how often each is."""

import numpy as np
import pytest

from llmc.codegen.gpu.sample import sample
from llmc.codegen.software_device import Unwritten, check_all
from tests.codegen.gpu.emission import target

KINDS = ("cuda", "rocm", "metal")
QUICK = [kind if kind == "cuda" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def drawn(kind, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniforms=None):
    """The token of every row."""
    rows = len(logits)
    uniforms = np.zeros(rows) if uniforms is None else uniforms
    floats = [np.full(rows, value, np.float32) for value in (temperature, top_p, min_p)]
    arguments = [
        logits.astype(np.float32),
        floats[0],
        np.full(rows, top_k, np.int32),
        floats[1],
        floats[2],
        np.asarray(uniforms, np.float32),
        Unwritten((rows,), "int32"),
    ]
    return check_all(sample(target(kind), logits.shape[1]), target(kind), arguments)[-1]


def shares(logits, temperature, top_k, top_p, min_p):
    """An oracle in float64: the probability of every token of one row. Ties at a threshold are all kept."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= logits >= np.sort(logits)[-min(top_k, len(logits))]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        order = order[kept[order]]
        sums = np.cumsum(weights[order])
        last = order[min(np.searchsorted(sums, top_p * sums[-1]), len(order) - 1)]
        kept &= logits >= logits[last]
    kept &= weights >= min_p
    return np.where(kept, weights, 0) / weights[kept].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 7, 1031])
def test_the_best_token(kind, vocab):
    logits = np.random.default_rng(vocab).normal(size=(5, vocab)).astype(np.float32)
    logits[1] = -np.abs(logits[1]) - 1
    logits[2] = 0.5  # all alike: the lowest id
    logits[3, -1] = 1e30
    logits[4, :-1] = -np.inf
    assert drawn(kind, logits, temperature=0.0).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(kind, temperature):
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    logits[0, 270] = np.nan
    logits[1, 3] = -np.nan
    logits[2] = -np.inf
    found = drawn(kind, logits, temperature=temperature)
    assert found[:3].tolist() == [-1, -1, -1] and 0 <= found[3] < 300


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(kind, filters):
    rows, vocab = 32, 300
    logits = (3 * np.random.default_rng(len(filters)).normal(size=vocab)).astype(np.float32)
    uniforms = (np.arange(rows) + 0.5) / rows
    found = drawn(kind, np.tile(logits, (rows, 1)), uniforms=uniforms, **filters)
    expected = shares(logits, **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters))
    counts = np.bincount(found, minlength=vocab)
    assert counts.sum() == rows and not counts[expected == 0].any()
    # A token has an interval of its share: it holds that many of the evenly spaced numbers, give or take one.
    assert (np.abs(counts - expected * rows) <= 1 + 1e-3).all()


@pytest.mark.parametrize("kind", QUICK)
def test_a_row_depends_on_itself_alone(kind):
    random = np.random.default_rng(9)
    logits, uniforms = random.normal(size=(6, 500)).astype(np.float32), random.random(6)
    together = drawn(kind, logits, uniforms=uniforms, top_p=0.9)
    alone = [drawn(kind, logits[i : i + 1], uniforms=uniforms[i : i + 1], top_p=0.9)[0] for i in range(3)]
    assert together[:3].tolist() == alone
