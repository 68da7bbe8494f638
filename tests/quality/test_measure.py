"""Perplexity, divergence and damage, against numpy written down independently."""

import numpy as np
import pytest

from llmc.ir.evaluate import Reference
from llmc.quality.evaluator import Evaluator
from llmc.quality.measure import Variant, compare, measure, windows
from tests.decoders import Decoder
from tests.quality.test_part import Lazy, lazy

LENGTH = 12


@pytest.fixture(scope="module")
def model():
    return Decoder(layers=3)


@pytest.fixture(scope="module")
def evaluator(model):
    return Evaluator(model.module, lazy(model.weights), LENGTH)


@pytest.fixture(scope="module")
def text(model):
    return windows(np.random.default_rng(0).integers(0, model.vocab, 40), LENGTH)


@pytest.mark.parametrize("count", [12, 13, 40, 41])
@pytest.mark.parametrize("prefix", [(), (7,)])
def test_every_token_is_scored_once(count, prefix):
    ids = np.arange(100, 100 + count)
    found = windows(ids, LENGTH, prefix=prefix)
    scored = np.concatenate([w.tokens[w.first :] for w in found])
    np.testing.assert_array_equal(scored, ids if prefix else ids[1:])
    assert all(len(w.tokens) == LENGTH and tuple(w.tokens[: len(prefix)]) == prefix for w in found)


def test_a_token_of_a_later_window_has_half_a_window_before_it():
    found = windows(np.arange(120), LENGTH)
    assert [w.first for w in found[1:-1]] == [LENGTH // 2] * (len(found) - 2)


def test_a_text_too_short_is_refused():
    with pytest.raises(ValueError, match="expected a text of at least 12 tokens for windows of 12, found 5"):
        windows(range(5), LENGTH)


def test_scores_are_those_of_numpy(model, evaluator, text):
    others = {n: Lazy(w + 0.05 * np.sign(w)) for n, w in model.weights.items() if n.endswith("proj.weight")}
    score = compare(evaluator, text, {"other": Variant(others)})
    weights = {n: others[n].read() if n in others else w for n, w in model.weights.items()}
    surprise = {"": 0.0, "other": 0.0}
    divergence = agreement = tokens = 0
    reference = Reference(model.module)
    for window in text:
        log = {}
        for name, ws in (("", model.weights), ("other", weights)):
            x = reference(window.tokens, np.arange(LENGTH, dtype="int32"), *ws.values()).astype("float64")
            log[name] = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for at in range(window.first, LENGTH):
            p, q = log[""][at - 1], log["other"][at - 1]
            divergence += np.sum(np.exp(p) * (p - q))
            agreement += p.argmax() == q.argmax()
            tokens += 1
            for name in log:
                surprise[name] -= log[name][at - 1][window.tokens[at]]
    assert score[""].tokens == score["other"].tokens == tokens == 39
    assert score["other"].agreement == agreement and score[""].agreement == tokens
    assert score["other"].mean_divergence == pytest.approx(divergence / tokens, rel=1e-4)
    assert score[""].divergence == 0
    for name in surprise:
        assert score[name].perplexity == pytest.approx(np.exp(surprise[name] / tokens), rel=1e-5)


def test_a_planted_damage_shows_as_that_layer(model, evaluator, text):
    """All layers are a little off, layer 1 far more."""
    rng = np.random.default_rng(3)
    others = {
        n: Lazy(w + rng.standard_normal(w.shape).astype("float32") * (0.2 if n.startswith("layers.1.") else 0.01))
        for n, w in model.weights.items()
        if n.endswith("proj.weight")
    }
    quality = measure(evaluator, text, others, text="random tokens", sample=2)
    assert next(iter(quality.damage)) == "layer 1"
    assert set(quality.damage) == {"layer 0", "layer 1", "layer 2"}
    assert quality.damage["layer 1"] > 5 * quality.damage["layer 0"] > 0
    assert quality.tokens == 39 and quality.sampled == sum(LENGTH - w.first for w in text[:2])
    assert quality.perplexity != quality.unquantized and quality.divergence > 0
    assert quality.to_dict()["damage"] == quality.damage


def test_the_same_weights_cost_nothing(model, evaluator, text):
    quality = measure(evaluator, text, lazy(model.weights), text="random tokens")
    assert quality.divergence == 0 and quality.agreement == 1 and quality.perplexity == quality.unquantized
    assert set(quality.damage.values()) == {0.0}


def test_nan_never_passes(model, evaluator, text):
    name = "layers.0.mlp.up_proj.weight"
    broken = model.weights[name].copy()
    broken[0, 0] = np.nan
    assert np.isnan(measure(evaluator, text, {name: Lazy(broken)}, text="x").perplexity)
