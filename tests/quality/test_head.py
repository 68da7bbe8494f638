"""The output head in slices of the vocabulary."""

import tracemalloc

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir.evaluate import Reference, evaluate
from llmc.quality import evaluator as evaluators
from llmc.quality import head
from llmc.quality.evaluator import Evaluator
from llmc.quality.measure import Variant, compare, windows
from tests.decoders import Decoder
from tests.quality.test_part import Lazy, lazy

LENGTH = 11


class Capped(Decoder):
    """Logits with a bias and a soft cap, as bfloat16 computes them."""

    vocab = 37

    def head(self, x):
        y = self.linear(x, "lm_head", self.vocab, bias=True)
        cap = relax.const(5.0, self.dtype)
        y = self.emit(R.multiply(self.emit(R.tanh(self.emit(R.divide(y, cap)))), cap))
        return self.emit(R.astype(y, "float32"))


class Shared(Decoder):
    """Logits that depend on one another."""

    def head(self, x):
        return self.emit(R.nn.log_softmax(self.linear(x, "lm_head", self.vocab)))


MODELS = {
    "plain": Decoder(vocab=40),
    "tied": Decoder(stored="bfloat16", tied=True, vocab=38),
    "capped": Capped(vocab=37),
    "half": Capped(dtype="bfloat16", stored="bfloat16", vocab=37),
}


@pytest.fixture
def small(monkeypatch):
    """Slices of 8 tokens of a vocabulary, of few rows of weights, sequences one by one, nothing kept."""
    monkeypatch.setattr(head, "WEIGHT", 8 * 4 * 16)
    monkeypatch.setattr(evaluators, "SLICE", 5 * 4 * 16)
    monkeypatch.setattr(evaluators, "KEPT", 0)
    monkeypatch.setattr(evaluators, "ALIVE", 1)


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_the_logits(name, small):
    model = MODELS[name]
    tokens = np.random.default_rng(1).integers(0, model.vocab, (3, LENGTH)).astype("int32")
    program = Evaluator(model.module, lazy(model.weights), LENGTH)
    assert [(s.start, s.stop) for s in program.slices] == [
        (i, min(i + 8, model.vocab)) for i in range(0, model.vocab, 8)
    ]
    state, last = program.start(tokens), len(program.layers) - 1
    for layer in range(last):
        state = program.run(layer, state)
    held = program.hold(last)
    reads = program.approach(state, held)
    found = [[program.logits(read, held, columns) for read in reads] for columns in program.slices]
    whole = Reference(model.module)
    for k, own in enumerate(tokens):
        want = whole(own, np.arange(LENGTH, dtype="int32"), *model.arrays).astype("float32")
        tolerance = 3e-2 if model.dtype == "bfloat16" else 1e-5  # see test_part
        assert np.abs(np.concatenate([piece[k] for piece in found], axis=1) - want).max() <= tolerance * np.ptp(want)


def test_logits_that_depend_on_one_another_come_whole():
    model = Shared()
    tokens = np.arange(LENGTH, dtype="int32")
    program = Evaluator(model.module, lazy(model.weights), LENGTH)
    assert program.head is None and program.slices == [slice(None)]
    (found,) = program([tokens])
    want = evaluate(model.module, [tokens, tokens, *model.arrays])
    np.testing.assert_allclose(found, want, atol=1e-5)
    scores = compare(program, windows(tokens, LENGTH), {"other": Variant(lazy(model.weights))})
    assert scores["other"].divergence == 0 and scores["other"].surprise == scores[""].surprise


def test_scores_do_not_depend_on_slices(small, monkeypatch):
    """Rounding of sums in float64 apart."""
    model = MODELS["capped"]
    text = windows(np.random.default_rng(0).integers(0, model.vocab, 30), LENGTH)
    others = {n: Lazy(w + 0.1 * np.sign(w)) for n, w in model.weights.items() if n.endswith("proj.weight")}
    others["lm_head.weight"] = Lazy(np.roll(model.weights["lm_head.weight"], 1, axis=0))
    variants = {"all": Variant(others), "head": Variant(others, frozenset([3]), 2)}

    def scores():
        return compare(Evaluator(model.module, lazy(model.weights), LENGTH), text, variants)

    found = scores()
    monkeypatch.undo()
    for name, want in scores().items():
        assert found[name].tokens == want.tokens and found[name].agreement == want.agreement
        assert found[name].surprise == pytest.approx(want.surprise, rel=1e-5)
        assert found[name].divergence == pytest.approx(want.divergence, rel=1e-4, abs=1e-9)
    assert found["all"].divergence > 1 and found["head"].agreement < found["head"].tokens


@pytest.mark.parametrize("vocab", [4096, 16384])
def test_memory_does_not_grow_with_the_vocabulary(vocab, monkeypatch):
    monkeypatch.setattr(head, "WEIGHT", 1 << 19)
    monkeypatch.setattr(head, "LOGITS", 1 << 16)
    monkeypatch.setattr(evaluators, "SLICE", 1 << 19)
    model = Decoder(layers=1, vocab=vocab, hidden=128, tied=True)
    program = Evaluator(model.module, lazy(model.weights), LENGTH)
    text = windows(np.random.default_rng(0).integers(0, vocab, 40), LENGTH)
    list(program([text[0].tokens]))  # what is compiled and kept is there now
    tracemalloc.start()
    try:
        compare(program, text, {"same": Variant(lazy(model.weights))})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20  # the embedding in float32: 2 or 8 MB, the logits of a window 0.2 or 0.7 MB, in float64
