"""FuseProjections: one product where there were several, value for value."""

import numpy as np
import pytest
import tvm
from tvm.relax import op as R

from llmc.ir.evaluate import evaluate
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import text
from llmc.passes.fuse_projections import FuseProjections
from llmc.passes.goal import Goal
from tests import decoders


def fused(decoder):
    module = FuseProjections().run(decoder.module, Goal())
    tvm.relax.analysis.well_formed(module)
    return module


def run(module, decoder):
    tokens = np.random.default_rng(1).integers(0, decoder.vocab, 9).astype("int32")
    return evaluate(module, [tokens, np.arange(9, dtype="int32"), *decoder.arrays]).astype("float32")


def count(module, op="matmul"):
    return sum(op_name(b.value) == op for b in bindings(module["main"]))


def widths(module):
    return [int(b.var.ty.shape[1]) for b in bindings(module["main"]) if op_name(b.value) == "matmul"]


@pytest.mark.parametrize(
    "kind",
    [{}, {"bias": True}, {"stored": "bfloat16"}, {"stored": "bfloat16", "dtype": "bfloat16", "bias": True}],
    ids=["plain", "bias", "cast weights", "bfloat16"],
)
def test_values_stay(kind):
    decoder = decoders.Decoder(**kind)
    module = fused(decoder)
    assert count(module) == 9  # of a block q/k/v, o, gate/up and down; the head
    np.testing.assert_array_equal(run(module, decoder), run(decoder.module, decoder))


def test_what_all_do_next_is_done_once():
    module = fused(decoders.Decoder(layers=1, bias=True, dtype="bfloat16", stored="bfloat16"))
    ops = [op_name(b.value) for b in bindings(module["main"])]
    at = ops.index("matmul")
    assert [o for o in ops[at:] if o not in ("concat", "astype") or o == "astype"][:1] == ["matmul"]
    after = [o for o in ops[at + 1 : ops.index("split")] if o != "concat"]
    assert after == ["astype", "add", "astype"]  # the bias cast to float32, added, and the sum cast


def test_weights_are_joined_as_they_are_stored():
    module = fused(decoders.Decoder(layers=1, stored="bfloat16"))
    joined = [b.var for b in bindings(module["main"]) if op_name(b.value) == "concat" and len(b.var.ty.shape) == 2]
    weights = [v for v in joined if all(int(d) > 0 for d in v.ty.shape if hasattr(d, "value"))]
    stored = [v for v in weights if str(v.ty.dtype) == "bfloat16"]
    assert [[int(d) for d in v.ty.shape] for v in stored] == [[64, 16], [48, 16]]


class Parallel(decoders.Decoder):
    """Attention and MLP side by side on one norm (as gpt_neox and cohere have it)."""

    def body(self, n, tokens, positions):
        x = self.embedding(tokens)
        for i in range(self.layers):
            y = self.norm(x, f"layers.{i}.norm")
            mlp = self.mlp(f"layers.{i}.mlp", y)
            x = self.emit(R.add(self.emit(R.add(x, self.attention(i, y, n, positions))), mlp))
        return self.head(self.norm(x, "norm"))


def test_attention_and_mlp_side_by_side_keep_products_of_their_own():
    decoder = Parallel()
    module = fused(decoder)
    assert sorted(widths(module)) == sorted([64, 48, 16, 16] * 2 + [32])
    np.testing.assert_array_equal(run(module, decoder), run(decoder.module, decoder))


class Mixed(decoders.Decoder):
    """The key's weight is stored in another dtype."""

    def weight(self, name, *shape):
        stored = self.stored
        self.stored = "float16" if "k_proj" in name else stored
        try:
            return super().weight(name, *shape)
        finally:
            self.stored = stored


def test_weights_of_another_dtype_are_joined_as_they_are_used():
    decoder = Mixed(stored="bfloat16")
    module = fused(decoder)
    assert count(module) == 9
    np.testing.assert_array_equal(run(module, decoder), run(decoder.module, decoder))


class Sums(decoders.Decoder):
    """One product is kept in float32, its neighbours are cast: they are not the same."""

    def mlp(self, at, x):
        gate = self.linear(x, f"{at}.gate_proj", self.intermediate)
        w = self.emit(R.permute_dims(self.weight(f"{at}.up_proj.weight", self.intermediate, self.hidden), [1, 0]))
        up = self.emit(R.matmul(x, w, out_dtype="bfloat16"))
        return self.linear(self.emit(R.multiply(gate, up)), f"{at}.down_proj", self.hidden)


def test_results_of_another_dtype_are_left_alone():
    decoder = Sums(layers=1, dtype="bfloat16", stored="bfloat16")
    assert count(fused(decoder)) == 6


def test_nothing_to_fuse_leaves_the_module():
    module = fused(decoders.Decoder(layers=1))
    assert FuseProjections().run(module, Goal()) is module


def test_expected(golden):
    golden("fuse_projections.txt", text(fused(decoders.Decoder(layers=1, bias=True, stored="bfloat16"))))
