"""Calibrated weights of a whole program."""

import numpy as np
import pytest

from llmc.passes import schemes
from llmc.quality.calibrate import calibrate
from llmc.quality.encoded import Encoded
from llmc.quality.evaluator import Evaluator
from llmc.quality.measure import Variant, compare, windows
from tests.decoders import Decoder
from tests.quality.test_part import Experts, lazy


def encoded(weights, plan):
    out = {}
    for name, scheme in plan.items():
        rows = weights[name].astype("float32")
        out[name] = Encoded.of(scheme.format(rows.shape[-1]), scheme.encode(rows))
    return out


def test_calibration_beats_rounding_on_other_text():
    model = Decoder(layers=2, hidden=64, heads=4, head_dim=16, v_dim=16, intermediate=64, vocab=64)
    evaluator = Evaluator(model.module, lazy(model.weights), 32)
    rng = np.random.default_rng(0)
    scheme = schemes.parse("int4")
    plan = {name: scheme for name, w in model.weights.items() if w.ndim == 2 and not name.startswith("embed")}
    sequences = list(rng.integers(0, model.vocab, (24, 32)).astype("int32"))
    done = []
    found = calibrate(evaluator, sequences, plan, report=done.append).weights
    assert set(found) == set(plan) and done[-1] == 1
    text = windows(rng.integers(0, model.vocab, 500), 32)
    rounded = encoded(model.weights, plan)
    scores = compare(evaluator, text, {"plain": Variant(rounded), "calibrated": Variant(found)})
    assert scores["calibrated"].mean_divergence < 0.9 * scores["plain"].mean_divergence


def test_experts_and_tied_tables_are_encoded_too():
    model = Experts(layers=1, hidden=32, tied=True)
    evaluator = Evaluator(model.module, lazy(model.weights), 16)
    scheme = schemes.parse("int4")
    plan = {"embed_tokens.weight": schemes.parse("int8"), "layers.0.mlp.experts": scheme}
    sequences = list(np.random.default_rng(0).integers(0, model.vocab, (2, 16)).astype("int32"))
    kept = []

    def keep(name, parts):
        kept.append(name)
        return parts

    found = calibrate(evaluator, sequences, plan, keep=keep).weights
    assert sorted(kept) == sorted(plan)
    for name in plan:
        w = model.weights[name]
        assert found[name].shape == w.shape
        if name.startswith("embed"):
            plain = encoded(model.weights, {name: plan[name]})[name].read()
            np.testing.assert_array_equal(found[name].read(), plain, "a table is rounded by itself")
        assert np.abs(found[name].read() - w).max() < 0.5 * np.abs(w).max()


@pytest.mark.parametrize("shape", [(6, 32), (3, 6, 32)])
def test_turned_weights_are_read_as_they_lie(shape):
    w = np.random.default_rng(1).standard_normal(shape).astype("float32")
    scheme = schemes.parse("int8")
    parts = scheme.encode(w.reshape(-1, 32))
    parts = {name: part.reshape(*shape[:-1], -1) for name, part in parts.items()}
    weight = Encoded.of(scheme.format(32), parts, turned=True)
    assert weight.shape == (*shape[:-2], 32, 6)
    want = Encoded.of(scheme.format(32), parts).read().swapaxes(-1, -2)
    np.testing.assert_array_equal(weight.read(), want)
    np.testing.assert_array_equal(weight.read(1, 3), want[1:3])
    assert weight.nbytes == pytest.approx(w.size * (8 + 32 / 32) / 8)
