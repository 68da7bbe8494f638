"""llmc.compile(quantize=...): the whole path, interrupted and gone on with, against transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.inspection import quantization_lines
from llmc.ir.decode import decode
from llmc.passes import schemes

TINY_PYTHON = Path(__file__).parents[1] / "data" / "tiny-python"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """tiny-python in int4, stopped while its weights were packed, and gone on with; -> (artifact, what was done)."""

    def interrupt(stage, done):
        if stage == "packing weights" and done > 0.5:
            raise KeyboardInterrupt

    output = tmp_path_factory.mktemp("quantized") / "a.llmc"
    asked = {"output": output, "quantize": "int4", "quality": "none"}
    with pytest.raises(KeyboardInterrupt):
        llmc.compile(TINY_PYTHON, progress=interrupt, **asked)
    work = json.loads((output.parent / "a.llmc.partial" / "work.json").read_text())
    return llmc.compile(TINY_PYTHON, **asked), work["tensors"]


def test_an_interrupted_compilation_goes_on(compiled):
    path, done = compiled
    tensors = llmc.inspect(path, check=True).manifest.weights.tensors
    assert done and done.items() <= tensors.items() and len(done) < len(tensors)


def test_logits_are_those_of_what_the_codes_stand_for(compiled):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_PYTHON, dtype=torch.float32).eval()
    facts = llmc.inspect(compiled[0]).to_dict()["model"]["quantization"]
    assert len(facts["formats"]["int4-g32"]) == 28 and facts["formats"]["int8"] == ["model.embed_tokens.weight"]
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in (name for names in facts["formats"].values() for name in names):
            scheme = schemes.parse("int8" if "embed" in name else "int4")
            parts = scheme.encode(own[name].numpy())
            own[name].copy_(torch.from_numpy(decode(scheme.format(own[name].shape[1]), *parts.values())))
        sequences = [np.random.default_rng(0).integers(2, 4096, n).tolist() for n in (1, 17, 64)]
        expected = [model(torch.tensor([tokens])).logits[0].numpy() for tokens in sequences]
    with llmc.load(compiled[0]) as loaded:
        found = loaded.logits(sequences)
    for logits, wanted in zip(found, expected, strict=True):
        # activations as 16-bit fixed point: see bench/quantized.py
        assert np.abs(logits - wanted).max() <= 5e-3 * wanted.std()


def test_inspect_says_what_activations_are_rounded_to():
    facts = {"scheme": "w8a8", "bits_per_weight": 8.3, "formats": {"int8": ["a", "b"]}, "kept": {}}
    assert len(quantization_lines(facts | {"activations": []})) == 1
    assert "activations are rounded to int8" in quantization_lines(facts | {"activations": ["int8"]})[1]


def test_inspect_says_how_weights_are_stored_and_which_are_not(compiled):
    text = str(llmc.inspect(compiled[0]))
    assert "quantized int4: 5.45 bits a weight; 1 in int8, 28 in int4-g32" in text
    size = llmc.inspect(compiled[0]).manifest.memory["weights_bytes"]
    assert size < 0.4 * 2 * sum(p.size for p in parameters())  # of bfloat16's


def parameters():
    from llmc.frontend.weights import open_checkpoint

    return [tensor.read() for tensor in open_checkpoint(TINY_PYTHON).values()]


@pytest.mark.slow
def test_verify(tmp_path):
    assert llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc", quantize="int4-g32-a8", verify=True).is_dir()


@pytest.mark.parametrize("quantize", ["int4", "fp8:head=nf4"])
def test_random_weights_are_codes_and_scales(tmp_path, quantize):
    path = llmc.compile(TINY_PYTHON / "config.json", output=tmp_path / "a.llmc", quantize=quantize, weights="random")
    described = llmc.inspect(path).manifest.weights.random
    codes = {name for name, what in described.items() if "bytes" in what}
    assert codes and all(":codes" in name for name in codes)
    assert all(what["mean"] > 0 for name, what in described.items() if ":scales" in name)
    with llmc.load(path) as model:
        assert np.isfinite(model.logits([[1, 2, 3]])[0]).all()
