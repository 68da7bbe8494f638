"""Plans (what is quantized, what stays, and why) and weights that are encoded as they are read."""

import tracemalloc
import types

import numpy as np
import pytest

from llmc import quantization
from llmc.ir.errors import CompileError
from llmc.ir.quantized import Format
from llmc.passes import schemes
from llmc.passes.schemes import Stored
from llmc.quantization import EncodedWeights, Plan, parse, plan, prepare
from tests import decoders
from tests.codegen.conftest import Array
from tests.passes.test_quantize_weights import Conv, Mixture


def imported(decoder, quantized=None):
    weights = {name: Array(w) for name, w in decoder.weights.items()}
    return types.SimpleNamespace(module=decoder.module, weights=weights, quantized=quantized or {})


def planned(decoder, text, **limits):
    return plan(imported(decoder), parse(text), **({"smallest": 1, "narrowest": 1} | limits))


def test_head_and_embedding_have_a_scheme_of_their_own():
    assert [parse("int4").body.name, parse("int4").head.name] == ["int4", "int8"]
    assert parse("int8").head.name == "int8"
    assert parse("int4-g64:head=int4-g128").head.name == "int4-g128"
    assert parse("int4:head=none").head is None
    found = planned(decoders.Decoder(layers=1), "int4").schemes
    assert {n for n, s in found.items() if s.name == "int8"} == {"embed_tokens.weight", "lm_head.weight"}
    kept = planned(decoders.Decoder(layers=1), "int4:head=none").kept
    assert kept == {"embed_tokens.weight": "asked for", "lm_head.weight": "asked for"}


@pytest.mark.parametrize("text", ["int4:", "int4:head", "int4:tail=int8", "int4:head=int8:head=int8"])
def test_options_that_are_none(text):
    with pytest.raises(CompileError, match=r"expected a scheme, or a scheme and :head=SCHEME or :head=none"):
        parse(text)


def test_what_stays_and_why():
    decoder = Mixture(layers=1, hidden=32, vocab=64)
    found = planned(decoder, "int4", smallest=32 * 32 + 1)
    assert found.kept["layers.0.mlp.router.weight"] == "picks experts"
    # of a mixture each expert is a product: 4 of 32 by 32
    assert found.kept["layers.0.mlp.experts"] == "smaller than 1025 weights or 1 columns"
    assert "layers.0.mlp.experts" in planned(decoder, "int4", smallest=32 * 32).schemes


def test_nothing_to_quantize_is_said():
    with pytest.raises(CompileError, match=r"quantize='int4': expected weights to quantize, found none \(embed_tokens"):
        plan(imported(decoders.Decoder(layers=1)), parse("int4"))


class Checkpoint(Array):
    """A weight of a checkpoint that is quantized already, as its door hands it over."""

    def __init__(self, value, *, turned=False, order=None):
        super().__init__(value)
        self.format, self.activation, self.turned, self.order = Format(4, 32, offset=8), None, turned, order
        self.parts = {"codes": Array(value.astype("uint8")), "scales": Array(value[:, :1].astype("float16"))}


def test_a_quantized_checkpoint_stays_as_it_is():
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64)
    down = "layers.0.mlp.down_proj.weight"
    source = imported(decoder)
    source.weights[down] = Checkpoint(decoder.weights[down], order=Array(np.arange(64, dtype="int32")))
    found = quantization.stored_plan(
        types.SimpleNamespace(module=decoder.module, quantized={down: source.weights[down]})
    )
    assert found.schemes == {down: Stored("int4-g32", None, True, stored=Format(4, 32, offset=8))}
    weights = EncodedWeights(source.weights, found)
    assert weights[f"{down}:codes"] is source.weights[down].parts["codes"]
    assert weights[f"{down}:order"].shape == (64,)
    turned = {down: Checkpoint(decoder.weights[down], turned=True)}
    found = quantization.stored_plan(types.SimpleNamespace(module=decoder.module, quantized=turned))
    assert found.kept == {down: "its groups run across its rows"}


def test_a_scheme_for_a_quantized_checkpoint_is_refused():
    decoder = decoders.Decoder(layers=1)
    down = "layers.0.mlp.down_proj.weight"
    source = imported(decoder, {down: Checkpoint(decoder.weights[down])})
    with pytest.raises(CompileError, match=r"found a checkpoint that is quantized already \(layers.0.mlp.down_proj"):
        prepare(source, "int8")


@pytest.mark.parametrize("kind", [decoders.Decoder, Conv])
def test_parts_are_read_in_any_slices_and_order(kind, monkeypatch):
    monkeypatch.setattr(quantization, "CHUNK", 5 * 32)  # a few rows a chunk
    decoder = kind(layers=1, hidden=32, intermediate=64, stored="bfloat16")
    found = planned(decoder, "int4-g16-zp")
    name = "layers.0.mlp.gate_proj.weight"
    w = decoder.weights[name].astype("float32")
    wanted = found.schemes[name].encode(w.T if kind is Conv else w)
    assert (name in found.transposed) is (kind is Conv)
    for order in (["codes", "scales", "zeros"], ["zeros", "scales", "codes"]):
        weights = EncodedWeights(imported(decoder).weights, found)
        for part in order:
            source = weights[f"{name}:{part}"]
            assert (source.shape, source.dtype) == (wanted[part].shape, str(wanted[part].dtype))
            slices = [source.read(at, at + 7) for at in range(0, 64, 7)]
            np.testing.assert_array_equal(np.concatenate(slices), wanted[part])
            np.testing.assert_array_equal(source.read(), wanted[part])


def test_one_encoding_serves_codes_and_scales():
    """And what it keeps is bounded: the scales of weights read long ago are dropped, and encoded again if asked for."""
    decoder = decoders.Decoder(layers=2, hidden=32, intermediate=64)
    found = planned(decoder, "int4")
    read = []

    class Counted(Array):
        def read(self, start=0, stop=None):
            read.append((start, stop))
            return super().read(start, stop)

    weights = EncodedWeights({n: Counted(w) for n, w in decoder.weights.items()}, found)
    first, second = (f"layers.{i}.mlp.down_proj.weight" for i in (0, 1))
    weights[f"{first}:codes"].read()
    weights[f"{first}:scales"].read()
    assert len(read) == 1
    quantization_kept, quantization.KEPT = quantization.KEPT, 64
    try:
        weights[f"{second}:codes"].read()
        weights[f"{second}:scales"].read()
        assert list(weights.waiting) == [second] or len(weights.waiting) == 2
        weights[f"{first}:scales"].read()
        assert list(weights.waiting) == [first]
    finally:
        quantization.KEPT = quantization_kept


@pytest.mark.parametrize("rows", [2048, 8192])
def test_memory_does_not_grow_with_the_weight(rows):
    """Codes are read a slice at a time: what a slice of 1 MB takes is all there is, whatever the weight's size."""

    class Made(Array):
        def __init__(self):
            self.shape, self.dtype = (rows, 2048), "float32"

        def read(self, start=0, stop=None):
            return np.random.default_rng(start).standard_normal((stop - start, 2048), dtype=np.float32)

    found = Plan("int8", {"w": schemes.parse("int8")})
    codes = EncodedWeights({"w": Made()}, found)["w:codes"]
    tracemalloc.start()
    try:
        for at in range(0, rows, 512):
            codes.read(at, at + 512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 << 20 < peak < 32 << 20  # in floats the weight takes 16 or 64 MB


def test_experts_are_encoded_one_by_one():
    decoder = Mixture(layers=1, hidden=32)
    found = planned(decoder, "int4")
    weights = EncodedWeights(imported(decoder).weights, found)
    name = "layers.0.mlp.experts"
    w = decoder.weights[name]
    for part in ("codes", "scales"):
        wanted = np.stack([schemes.parse("int4").encode(e)[part] for e in w])
        np.testing.assert_array_equal(weights[f"{name}:{part}"].read(1, 3), wanted[1:3])


def test_a_weight_that_is_joined_has_other_parts():
    """The experts of a published mixture are stacked as they are read: what they are stacked of are no codes."""
    from llmc.frontend.weights import _Stacked

    decoder = Mixture(layers=1, hidden=32)
    name = "layers.0.mlp.experts"
    source = imported(decoder).weights | {name: _Stacked([Array(w) for w in decoder.weights[name]])}
    weights = EncodedWeights(source, planned(decoder, "int4"))
    wanted = np.stack([schemes.parse("int4").encode(w)["codes"] for w in decoder.weights[name]])
    np.testing.assert_array_equal(weights[f"{name}:codes"].read(), wanted)


def test_other_names_are_unknown():
    weights = EncodedWeights({"a": Array(np.zeros((2, 2), "f4"))}, Plan())
    assert "a" in weights and "a:codes" not in weights and list(weights) == ["a"]


def test_facts_count_bits_of_all_matrices():
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64)
    found = planned(decoder, "int4:head=none")
    weights = EncodedWeights(imported(decoder).weights, found)
    used = {f"{n}:codes" for n in found.schemes} - {"layers.0.self_attn.o_proj.weight:codes"}
    facts = found.facts(weights, used)
    sizes = {n: w.size for n, w in decoder.weights.items() if w.ndim == 2}
    in_few = sum(s for n, s in sizes.items() if f"{n}:codes" in used)
    wanted = (4.5 * in_few + 32 * (sum(sizes.values()) - in_few)) / sum(sizes.values())
    assert facts["bits_per_weight"] == pytest.approx(wanted, abs=1e-3)
    assert facts["formats"].keys() == {"int4-g32"} and facts["activations"] == []
    assert planned(decoder, "int4-a8:head=none").facts(weights, used)["activations"] == ["int8"]
    assert planned(decoder, "fp8-a8:head=none").facts(weights, used)["activations"] == ["fp8"]
    assert facts["kept"] == {
        "asked for": ["embed_tokens.weight", "lm_head.weight"],
        "no product reads it row by row": ["layers.0.self_attn.o_proj.weight"],
    }
