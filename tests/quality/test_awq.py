"""Scaling by inputs: against numpy, and on models whose activations have outliers, as large models have."""

import json

import numpy as np
import pytest

from llmc.ir.decode import decode
from llmc.passes import schemes
from llmc.passes.weight_uses import weight_uses
from llmc.quality.awq import ALPHAS, inverse_scale, sample, search
from llmc.quality.calibrate import calibrate
from llmc.quality.evaluator import Evaluator
from llmc.quality.gptq import Hessian, gptq
from llmc.quality.measure import Variant, compare, windows
from tests.decoders import Decoder
from tests.quality.test_part import lazy


def inputs(count, depth, seed, outliers=True):
    """Independent inputs; a few of them fifty times as large as the others."""
    size = np.ones(depth)
    size[5::37] = 50 if outliers else 1
    return (np.random.default_rng(seed).standard_normal((count, depth)) * size).astype("float32")


def hessian(x):
    found = Hessian(x.shape[1])
    for part in np.array_split(x, 3):
        found.add(part)
    return found


def test_the_scale_is_the_papers():
    size = np.random.default_rng(0).uniform(0.1, 9, 40).astype("float32")
    for alpha in (0.05, 0.5, 1):
        s = size.astype("float64") ** alpha
        s /= np.sqrt(s.max() * s.min())
        np.testing.assert_allclose(inverse_scale(size, alpha), 1 / s, rtol=1e-6)
    assert np.isfinite(inverse_scale(np.array([0, 0, 3], "float32"), 1)).all(), "inputs that are always 0"


def test_hessians_of_scaled_inputs():
    x = inputs(60, 24, 0)
    factors = np.random.default_rng(1).uniform(0.1, 3, 24).astype("float32")
    found, want = hessian(x).scaled(factors), x.astype("float64") * factors
    np.testing.assert_allclose(found.matrix, want.T @ want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.size, np.abs(want).mean(axis=0), rtol=1e-5)
    assert found.inverse_factor(0.01) is found.inverse_factor(0.01)
    found.add(x)
    again = hessian(np.concatenate([want, x]).astype("float32"))
    np.testing.assert_allclose(found.inverse_factor(0.01), again.inverse_factor(0.01), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["int4", "int3-g32", "int8"])
def test_alpha_is_the_best_of_the_grid_and_helps_other_inputs(name):
    scheme, rng = schemes.parse(name), np.random.default_rng(2)
    weights = [rng.standard_normal((n, 128)).astype("float32") for n in (200, 250)]
    seen, other = inputs(500, 128, 3), inputs(300, 128, 4)
    fit, check = hessian(seen), hessian(other)
    inverse = search([(sample(w), scheme) for w in weights], 450, fit, check)

    def lost(factors, x):
        """Of products, with weights that are rounded by how large their inputs are."""
        total, importance = 0.0, ((seen * factors).astype("float64") ** 2).sum(axis=0).astype("float32")
        for w in weights:
            found = decode(scheme.format(128), *scheme.encode(w / factors, importance).values())
            total += float((((x * factors) @ found.T - x @ w.T).astype("float64") ** 2).sum())
        return total

    size = np.abs(seen).mean(axis=0).astype("float64")
    grid = [np.sqrt((size**a).max() * (size**a).min()) / size**a for a in ALPHAS]
    best = min(grid, key=lambda factors: lost(factors.astype("float32"), seen))
    np.testing.assert_allclose(inverse, best, rtol=1e-5)
    assert lost(inverse, other) < 0.7 * lost(np.float32(1), other)
    # and with GPTQ on top, on the inputs that neither was fitted to
    scaled = fit.scaled(inverse), check.scaled(inverse)
    together = [decode(scheme.format(128), *gptq(w / inverse, *scaled, scheme).values()) * inverse for w in weights]
    alone = [decode(scheme.format(128), *gptq(w, fit, check, scheme).values()) for w in weights]
    errors = [
        sum(float(((other @ (f - w).T) ** 2).sum()) for f, w in zip(found, weights, strict=True))
        for found in (together, alone)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_are_all_alike_are_not_scaled():
    w = np.random.default_rng(5).standard_normal((32, 64)).astype("float32")
    fit, check = hessian(inputs(300, 64, 6, outliers=False)), hessian(inputs(200, 64, 7, outliers=False))
    assert search([(w, schemes.parse("int4"))], 32, fit, check) is None
    assert search([(w, schemes.parse("int4"))], 32, Hessian(64), Hessian(64)) is None, "nothing was ever read"


def outlying(layers=2):
    """A decoder whose norms make a few activations forty times as large as the others; the weights that read them
    do so as those of the others."""
    model = Decoder(layers=layers, hidden=64, heads=4, head_dim=16, v_dim=16, intermediate=64, vocab=64)
    for name, w in model.weights.items():
        if name.endswith("norm.weight"):
            w[3::23] *= 40
    return model


def test_a_program_with_outliers_is_less_damaged():
    model = outlying()
    evaluator = Evaluator(model.module, lazy(model.weights), 32)
    rng = np.random.default_rng(0)
    plan = {
        n: schemes.parse("int4-g32-a8" if "layers.1.mlp" in n else "int4")
        for n, w in model.weights.items()
        if w.ndim == 2 and "embed" not in n
    }
    sequences = list(rng.integers(0, model.vocab, (24, 32)).astype("int32"))
    scalable = {n for n, use in weight_uses(model.module).items() if use.rowwise}
    found = calibrate(evaluator, sequences, plan, scalable=scalable)
    scaled = {n: w.scaled for n, w in found.weights.items() if w.scaled}
    at = "layers.0.self_attn"
    assert {f"{at}.{s}_proj.weight": f"{at}.q_proj.weight" for s in "qkv"}.items() <= scaled.items()
    assert "layers.0.mlp.up_proj.weight" in scaled and not any("o_proj" in n for n in scaled)
    assert not any("layers.1.mlp" in n for n in scaled), "what rounding activations loses is not measured"
    assert found.facts()["scaled"] == list(scaled) and found.facts()["weights"] == len(plan)
    assert sum(found.rows.values()) == sum(len(model.weights[n]) for n in plan)
    chosen = found.schemes(plan)
    assert {n: s.scaled for n, s in chosen.items() if s.scaled} == scaled
    weight = found.weights[f"{at}.k_proj.weight"]
    own = decode(weight.format, *(part.read() for part in weight.parts.values())) * weight.inverse_scale.read()
    np.testing.assert_array_equal(weight.read(), own)
    plain = calibrate(evaluator, sequences, plan)
    assert not any(w.scaled for w in plain.weights.values())
    text = windows(rng.integers(0, model.vocab, 500), 32)
    scores = compare(evaluator, text, {"gptq": Variant(plain.weights), "awq": Variant(found.weights)})
    assert scores["awq"].mean_divergence < 0.8 * scores["gptq"].mean_divergence


def test_an_interrupted_calibration_goes_on_with_the_factors_that_it_had():
    model = outlying(layers=1)
    evaluator = Evaluator(model.module, lazy(model.weights), 32)
    plan = {n: schemes.parse("int4") for n, w in model.weights.items() if w.ndim == 2 and "embed" not in n}
    sequences = list(np.random.default_rng(0).integers(0, model.vocab, (12, 32)).astype("int32"))
    parts, facts = {}, {}

    def keep(name, made):
        if "v_proj" in name and "stopped" not in facts:
            facts["stopped"] = "true"
            raise KeyboardInterrupt
        return parts.setdefault(name, made)

    def once(fact, make):
        if fact not in facts:
            facts[fact] = json.dumps(make())
        return json.loads(facts[fact])

    how = {"scalable": list(plan), "keep": keep, "find": parts.get, "once": once}
    with pytest.raises(KeyboardInterrupt):
        calibrate(evaluator, sequences, plan, **how)
    assert len(parts) == 2
    found, want = calibrate(evaluator, sequences, plan, **how), calibrate(evaluator, sequences, plan, scalable=plan)
    assert found.facts() == want.facts() and len(want.facts()["scaled"]) > 3
    for name, weight in want.weights.items():
        np.testing.assert_array_equal(found.weights[name].read(), weight.read())
    again = calibrate(evaluator, sequences, plan, **how)
    assert again.facts() == want.facts() and again.schemes(plan) == want.schemes(plan)
