"""Running a program layer by layer, with its own weights or with others."""

import numpy as np
import pytest
from tvm.relax import op as R

from llmc.ir.evaluate import evaluate
from llmc.ir.quantized import round_activation
from llmc.quality.evaluator import Evaluator, rounded_activation
from tests.decoders import Decoder
from tests.quality.test_part import Lazy, lazy
from tests.textbook import program


@pytest.fixture(scope="module")
def model():
    return Decoder(layers=3, stored="bfloat16")


@pytest.fixture(scope="module")
def evaluator(model):
    return Evaluator(model.module, lazy(model.weights), 8)


def sequences(count, length=8, vocab=32):
    return list(np.random.default_rng(0).integers(0, vocab, (count, length)).astype("int32"))


def test_other_weights_stand_where_they_are_put(model, evaluator):
    name = "layers.1.mlp.down_proj.weight"
    other = np.random.default_rng(1).standard_normal(model.weights[name].shape).astype("float32")
    (tokens,) = sequences(1)
    (found,) = evaluator([tokens], {name: Lazy(other)})
    weights = {**model.weights, name: other.astype(model.weights[name].dtype)}
    want = evaluate(model.module, [tokens, np.arange(8, dtype="int32"), *weights.values()])
    (plain,) = evaluator([tokens])
    assert np.abs(found - want).max() < 2e-2 * np.ptp(want), "the program rounds the weight to bfloat16"
    assert np.abs(found - plain).max() > 0.1 * np.ptp(want)


def test_equal_layers_share_what_is_compiled(evaluator):
    assert evaluator.parts[1] is evaluator.parts[2]


def test_a_watcher_sees_what_every_product_reads(model, evaluator):
    seen = {}
    state = evaluator.start(sequences(2))
    for layer in range(len(evaluator.layers)):
        state = evaluator.run(layer, state, watch=lambda use, x, ids: seen.setdefault(use.weight, []).append(x))
    assert set(seen) == {n for n in model.weights if n.endswith("_proj.weight") or n == "lm_head.weight"}
    q, k = (seen[f"layers.0.self_attn.{p}_proj.weight"] for p in "qk")
    assert len(q) == 2 and q[0].shape == (8, model.hidden)
    np.testing.assert_array_equal(q[0], k[0])


def test_weights_of_one_layer_are_in_memory(model):
    read = []

    class Counted(Lazy):
        def read(self, start=0, stop=None):
            read.append(self.name)
            return super().read(start, stop)

    weights = {}
    for name, array in model.weights.items():
        weights[name] = Counted(array)
        weights[name].name = name
    evaluator = Evaluator(model.module, weights, 8)
    state = evaluator.run(0, evaluator.start(sequences(4)))
    assert set(read) == {"embed_tokens.weight"}
    read.clear()
    evaluator.run(1, state)
    matrices = [name for name in read if name.endswith("proj.weight")]
    assert all(name.startswith("layers.0.") for name in matrices)
    assert len(matrices) == len(set(matrices)) == 7, "once for all sequences"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("group", [0, 4])
def test_rounded_activations_are_those_of_the_op(group, kind):
    rng = np.random.default_rng(2)
    table = (rng.standard_normal((48, 8)) * 3).astype("float32")
    table[5] = 0

    def body(bb, tokens, positions, table):
        return round_activation(bb, bb.emit(R.take(table, tokens, 0)), group=group, kind=kind)

    tokens = np.arange(48, dtype="int32")
    module = program(body, {"table": (48, 8)}, batch=False)
    want = evaluate(module, [tokens, tokens, table])
    np.testing.assert_array_equal(rounded_activation(table, group, kind), want)


def test_a_weight_says_how_activations_are_rounded(model, evaluator):
    name = "layers.1.mlp.down_proj.weight"
    same = Lazy(model.weights[name])
    (tokens,) = sequences(1)
    (plain,), (unrounded,) = evaluator([tokens]), evaluator([tokens], {name: same})
    np.testing.assert_array_equal(plain, unrounded)
    same.activation = 0
    (found,) = evaluator([tokens], {name: same})
    error = np.abs(found - plain).max() / np.ptp(plain)
    assert 1e-5 < error < 2e-2
