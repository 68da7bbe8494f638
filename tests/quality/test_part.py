"""A part as products and TVM code between them."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir import ops
from llmc.ir.evaluate import evaluate
from llmc.quality.evaluator import Evaluator
from llmc.quality.layers import cut_layers
from llmc.quality.part import Part, Pieces, inlined
from tests.decoders import Decoder


class Experts(Decoder):
    """A decoder whose MLP is a mixture: each token takes two experts, found by topk."""

    experts = 3

    def mlp(self, at, x):
        n = x.ty.shape[0]
        best = self.emit(R.topk(self.linear(x, f"{at}.router", self.experts), k=2, axis=-1, ret_type="both"))
        values, ids = (self.emit(relax.TupleGetItem(best, i)) for i in range(2))
        shares = self.emit(R.reshape(self.emit(R.nn.softmax(values, -1)), (n * 2, 1)))
        ids = self.emit(R.reshape(self.emit(R.astype(ids, "int32")), (n * 2,)))
        rows = self.emit(R.repeat(x, 2, axis=0))
        w = self.weight(f"{at}.experts", self.experts, self.hidden, self.hidden)
        bias = self.weight(f"{at}.bias", self.experts, self.hidden)
        y = self.emit(R.multiply(ops.expert_linear(self.bb, rows, w, ids, bias), shares))
        return self.emit(R.sum(self.emit(R.reshape(y, (n, 2, self.hidden))), [1]))


MODELS = {
    "plain": Decoder(),
    "half": Decoder(dtype="bfloat16", stored="bfloat16"),
    "stored": Decoder(stored="bfloat16", tied=True, softcap=5.0, chunks=(4, 0)),
    "experts": Experts(layers=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_parts_compute_what_the_program_says(name):
    model = MODELS[name]
    tokens = np.random.default_rng(1).integers(0, model.vocab, 11).astype("int32")
    (found,) = Evaluator(model.module, lazy(model.weights), 11)([tokens])
    want = evaluate(model.module, [tokens, np.arange(11, dtype="int32"), *model.arrays]).astype("float32")
    # Sums in another order: float32 agrees to 1e-5, in bfloat16 a value may be rounded to its neighbour (2^-8).
    tolerance = 3e-2 if model.dtype == "bfloat16" else 1e-5
    assert np.abs(found - want).max() <= tolerance * np.ptp(want)
    assert np.ptp(want) > 1


def test_products_of_a_layer_are_products():
    _, layer, *_ = cut_layers(Decoder(layers=2).module, 5)
    part = Part(inlined(layer.module), Pieces())
    kinds = [p.kind for p in part.products]
    assert kinds.count("linear") == 7 and kinds.count("matmul") == 2
    named = [layer.weights[p.weight].split(".")[-2] for p in part.products if p.kind == "linear"]
    assert named == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    q, k, v = [p for p in part.products if p.kind == "linear"][:3]
    assert q.reads == k.reads == v.reads, "they read one activation"


class Lazy:
    """An array as a checkpoint gives it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def read(self, start=0, stop=None):
        return self.array[start:stop]


def lazy(weights):
    return {name: Lazy(array) for name, array in weights.items()}
