"""Budgets: they are kept, they are spent where the damage is, and weights that are fused agree."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmc.ir.decode import decode
from llmc.ir.errors import CompileError
from llmc.passes import schemes
from llmc.quality.budget import Choice, Rows, choose, groups, hull, spend
from llmc.quality.evaluator import Evaluator
from llmc.quality.measure import Variant, compare, windows
from tests.decoders import Decoder
from tests.quality.test_calibrate import encoded
from tests.quality.test_part import Experts, Lazy, lazy

INT4, INT8 = schemes.parse("int4"), schemes.parse("int8")


def table(*choices):
    return [Choice(INT4, bits, damage) for bits, damage in choices]


def test_the_lower_hull_is_what_is_worth_taking():
    found = hull(table((3, 9.0), (4, 8.5), (5, 2.0), (6, 3.0), (8, 1.9)))
    assert [c.bits for c in found] == [3, 5, 8]


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_kept_and_spent_about_as_well_as_they_can_be(seed):
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(5):
        size, harm = rng.integers(1, 10), rng.random()
        tables.append(table(*((bits * size, harm * 4.0**-bits) for bits in (3.0, 4.125, 4.5, 8.0))))
    least = sum(t[0].bits for t in tables)
    limit = least * rng.uniform(1, 2)
    found = choose(tables, limit, 0, 1)
    assert sum(c.bits for c in found) <= limit
    best = np.inf
    for picks in np.ndindex(*[4] * 5):
        chosen = [t[i] for t, i in zip(tables, picks, strict=True)]
        if sum(c.bits for c in chosen) <= limit:
            best = min(best, sum(c.damage for c in chosen))
    largest = max(t[0].damage - t[1].damage for t in tables)
    assert best <= sum(c.damage for c in found) <= best + largest, "a greedy choice is at most one step away"


def test_weights_of_products_of_one_activation_are_a_group():
    model = Decoder(layers=2, tied=True)
    evaluator = Evaluator(model.module, lazy(model.weights), 8)
    names = [name for name, w in model.weights.items() if w.ndim == 2]
    found = groups(evaluator.uses(), evaluator.weights, names)
    short = [tuple(name.split(".")[-2].removesuffix("_proj") for name in group.names) for group in found]
    assert short == [("embed_tokens",), *[("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2]
    assert found[1].size == (32 + 16 + 16) * 16
    assert found[1].bits(schemes.parse("int4-g128")) == found[1].size * (4 + 16 / 16), "groups that fill a row of 16"


def test_experts_count_with_all_their_rows():
    model = Experts(layers=1)
    evaluator = Evaluator(model.module, lazy(model.weights), 8)
    (group,) = groups(evaluator.uses(), evaluator.weights, ["layers.0.mlp.experts"])
    assert group.shapes == ((3 * 16, 16),)


def test_bits_go_where_the_damage_is():
    """What later layers, of large weights, make more of: the first layer gets more bits than they do."""
    model = Decoder(layers=3, hidden=64, heads=4, head_dim=16, v_dim=16, intermediate=64, vocab=64)
    for name, weight in model.weights.items():
        if name.startswith("layers.1.") and weight.ndim == 2:
            weight *= 3 * np.exp(np.random.default_rng(1).standard_normal(weight.shape)).astype("float32")
    evaluator = Evaluator(model.module, lazy(model.weights), 32)
    text = windows(np.random.default_rng(0).integers(0, 64, 128), 32)
    names = [name for name, w in model.weights.items() if w.ndim == 2 and name.startswith("layers")]
    plan = spend(evaluator, text, names, 5.0)
    assert set(plan) == set(names)
    depth = {name: model.weights[name].shape[1] for name in names}
    bits = {name: plan[name].format(depth[name]).bits_per_weight(depth[name]) for name in names}
    size = {name: model.weights[name].size for name in names}
    assert sum(bits[n] * size[n] for n in names) <= 5.0 * sum(size.values())
    mean = [np.mean([bits[n] for n in names if n.startswith(f"layers.{i}.")]) for i in range(3)]
    assert mean[0] > max(mean[1:])
    for i in range(3):
        assert len({plan[f"layers.{i}.self_attn.{p}_proj.weight"].name for p in "qkv"}) == 1
    other = np.random.default_rng(5).integers(0, 64, 256)
    variants = {"uniform": dict.fromkeys(names, INT4), "mixed": plan}
    scores = compare(
        evaluator, windows(other, 32), {key: Variant(encoded(model.weights, p)) for key, p in variants.items()}
    )
    assert scores["mixed"].divergence < scores["uniform"].divergence, "on text that it was not chosen by"


def test_a_budget_below_everything_is_refused():
    model = Decoder(layers=1)
    evaluator = Evaluator(model.module, lazy(model.weights), 8)
    text = windows(np.arange(8), 8)
    with pytest.raises(CompileError, match=r"quantize='auto:2': expected a budget of at least \d\.\d+ bits a weight"):
        spend(evaluator, text, ["layers.0.mlp.down_proj.weight"], 2)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(1000, 16), (300, 16), (5, 200, 16)])
def test_errors_are_estimated_on_rows_from_all_over_a_weight(shape, turned):
    weight = np.random.default_rng(0).standard_normal(shape).astype("float32")
    stored = Lazy(weight.swapaxes(-1, -2) if turned else weight)
    reads = []
    stored.read = lambda start=0, stop=None: reads.append((start, stop)) or Lazy.read(stored, start, stop)
    use = SimpleNamespace(weight="w", product=SimpleNamespace(turned=turned, kind="linear"))
    rows = Rows(SimpleNamespace(uses=lambda: [use], weights={"w": stored}), "w")
    flat = weight.reshape(-1, 16)
    some = flat[np.unique(np.linspace(0, len(flat) - 1, 512).astype(int))]
    np.testing.assert_array_equal(rows.sample(), some)
    assert (turned and len(shape) == 2) or all(stop == start + 1 for start, stop in reads)
    error = ((decode(INT4.format(16), *INT4.encode(some).values()) - some) ** 2).sum() * len(flat) / len(some)
    assert rows.error(INT4) == pytest.approx(error, rel=1e-4)


def test_bits_for_scaled_inputs_are_put_aside():
    model = Decoder(layers=1, hidden=64, heads=4, head_dim=16, v_dim=16, intermediate=64, vocab=64)
    evaluator = Evaluator(model.module, lazy(model.weights), 8)
    text = windows(np.arange(8), 8)
    names = [f"layers.0.mlp.{s}_proj.weight" for s in ("gate", "up", "down")]
    plan = spend(evaluator, text, names, 5.5, scalable=names)
    bits = sum(plan[n].format(64).bits_per_weight(64) for n in names) * 64 * 64
    assert 3.5 < bits / (3 * 64 * 64) <= 5.5 - 2 * 32 / (3 * 64), "a factor for each of 64 inputs, twice"
