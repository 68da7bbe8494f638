"""CacheLatent: the cache holds the latent, and the logits stay."""

import numpy as np
import pytest
import tvm
from tvm.relax import op as R

from llmc.ir.driver import state_of
from llmc.ir.evaluate import Reference
from llmc.ir.text import text
from llmc.passes.cache_latent import CacheLatent
from llmc.passes.page_attention import PageAttention
from tests import decoders, serving
from tests.serving import GOAL, TOLERANCE

RANK, ROPE, NOPE, VALUE = 10, 4, 8, 6


class Latent(decoders.Decoder):
    """Latent attention as DeepSeek has it: one up-projection of keys and values, one rotary part for all heads."""

    rank, rope_width = RANK, ROPE

    def heads_first(self, x, n, width):
        return self.emit(R.permute_dims(self.emit(R.reshape(x, [n, self.heads, width])), [1, 0, 2]))

    def parts(self, at, x, n, positions):
        """q [h, n, d], the latent [n, r] and the rotated part [1, n, p]."""
        q = self.heads_first(
            self.linear(x, f"{at}.q_proj", self.heads * (NOPE + self.rope_width)), n, NOPE + self.rope_width
        )
        down = self.linear(x, f"{at}.kv_a_proj", self.rank + self.rope_width)
        down = self.emit(R.split(down, [self.rank], axis=-1))
        latent = self.norm(self.emit(tvm.relax.TupleGetItem(down, 0)), f"{at}.kv_a_norm")
        rotary = self.emit(R.reshape(self.emit(tvm.relax.TupleGetItem(down, 1)), [n, 1, self.rope_width]))
        rotary = self.emit(R.permute_dims(self.rope(rotary, positions), [1, 0, 2]))
        q = self.emit(R.split(q, [NOPE], axis=-1))
        turned = self.emit(R.permute_dims(self.emit(tvm.relax.TupleGetItem(q, 1)), [1, 0, 2]))
        turned = self.emit(R.permute_dims(self.rope(turned, positions), [1, 0, 2]))
        q = self.emit(R.concat([self.emit(tvm.relax.TupleGetItem(q, 0)), turned], axis=-1))
        return q, latent, rotary

    def expand(self, at, latent, n):
        kv = self.heads_first(self.linear(latent, f"{at}.kv_b_proj", self.heads * (NOPE + VALUE)), n, NOPE + VALUE)
        kv = self.emit(R.split(kv, [NOPE], axis=-1))
        return [self.emit(tvm.relax.TupleGetItem(kv, i)) for i in (0, 1)]

    def join(self, nope, rotary, n):
        rotary = self.emit(R.broadcast_to(rotary, [self.heads, n, self.rope_width]))
        return self.emit(R.concat([nope, rotary], axis=-1))

    def attention(self, i, x, n, positions):
        at = f"layers.{i}.self_attn"
        q, latent, rotary = self.parts(at, x, n, positions)
        nope, v = self.expand(at, latent, n)
        k = self.join(nope, rotary, n)
        q, k, v = (self.emit(R.permute_dims(x, [1, 0, 2])) for x in (q, k, v))
        o = self.emit(R.reshape(self.attend(i, q, k, v), [n, self.heads * VALUE]))
        return self.linear(o, f"{at}.o_proj", self.hidden)


class Apart(Latent):
    """Keys and values have up-projections of their own; the rotary part stands first and is repeated."""

    def parts(self, at, x, n, positions):
        q, latent, rotary = super().parts(at, x, n, positions)
        a, b = self.emit(R.split(q, [NOPE], axis=-1))
        return self.emit(R.concat([b, a], axis=-1)), latent, rotary

    def expand(self, at, latent, n):
        widths = {"k": NOPE, "v": VALUE}
        return [
            self.heads_first(self.linear(latent, f"{at}.{s}_b_proj", self.heads * w), n, w) for s, w in widths.items()
        ]

    def join(self, nope, rotary, n):
        return self.emit(R.concat([self.emit(R.repeat(rotary, self.heads, axis=0)), nope], axis=-1))


class Twice(Latent):
    """Keys and values are expanded from two different vectors: there is no one latent."""

    def expand(self, at, latent, n):
        other = self.norm(latent, f"{at}.other_norm")
        return [
            self.heads_first(self.linear(x, f"{at}.{s}_b_proj", self.heads * w), n, w)
            for s, w, x in (("k", NOPE, latent), ("v", VALUE, other))
        ]


class Biased(Latent):
    """The up-projection has a bias, which no latent holds."""

    def linear(self, x, name, outputs, bias=False):
        return super().linear(x, name, outputs, bias or "kv_b" in name)


class Wide(Latent):
    """The latent is as large as the heads: there is nothing to gain."""

    rank = 4 * (NOPE + ROPE + VALUE)


def absorbed(decoder):
    module = CacheLatent().run(decoder.module, GOAL)
    tvm.relax.analysis.well_formed(module)
    return module


@pytest.mark.parametrize(
    "decoder",
    [
        Latent(),
        Apart(layers=1),
        Latent(layers=1, windows=(5,), softcap=2.0, sinks=True),
        Latent(stored="bfloat16", layers=1),
    ],
    ids=["deepseek", "apart", "window, softcap and sinks", "cast weights"],
)
def test_serving_equals_the_textbook(decoder):
    module = PageAttention().run(absorbed(decoder), GOAL)
    state = state_of(module)
    assert [t["shape"] for g in state for t in g["tensors"]] == [[1, RANK + ROPE, 4]] * decoder.layers
    # Sums are taken in another order, through products of weights.
    assert serving.error_of(module, decoder) < 2 * TOLERANCE


def test_half_precision():
    decoder = Latent(dtype="bfloat16", stored="bfloat16")
    module = PageAttention().run(absorbed(decoder), GOAL)
    tokens = np.arange(9, dtype="int32")
    exact = Latent(stored="bfloat16")  # the same weights, computed in float32
    want = Reference(exact.module)(tokens, tokens, *exact.arrays)
    plain = Reference(decoder.module)(tokens, tokens, *decoder.arrays).astype("float32")
    got = serving.served_logits(module, decoder.weights, {"a": tokens}, [{"a": 9}])["a"].astype("float32")
    # Rounding in other places, not more of it.
    assert np.sqrt(((got - want) ** 2).mean()) < 1.5 * np.sqrt(((plain - want) ** 2).mean())


@pytest.mark.parametrize("make", [decoders.Decoder, Twice, Biased, Wide])
def test_what_is_no_latent_is_left_alone(make):
    decoder = make(layers=1)
    assert absorbed(decoder) is decoder.module


def test_expected(golden):
    golden("cache_latent.txt", text(absorbed(Latent(layers=1))))
