"""Quantized checkpoints through the whole path: the kernels compute with the checkpoint's own numbers."""

import numpy as np
import pytest
import torch
import transformers

import llmc
from tests.frontend.conftest import make
from tests.frontend.quantized import writers
from tests.frontend.quantized.test_formats import FORMATS

SEQUENCES = [[1, 5, 9, 200, 31, 7], [3], list(range(2, 40))]


def compile_and_run(folder):
    """The artifact's logits, and what its manifest says of quantization."""
    out = llmc.compile(folder, "cpu", output=folder / "model.llmc")
    with llmc.load(out) as model:
        return model.logits(SEQUENCES), dict(model.info.model)


def reference(folder, rounded=None):
    """transformers' logits with the numbers in floats; rounded: what every projection does to its activation."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "floats", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for name, module in model.named_modules():
        if rounded is not None and name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    with torch.no_grad():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0].numpy() for tokens in SEQUENCES]


def to_int8(x):
    """Every token in integers of -127 to 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


def agree(found, expected, within):
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and np.isfinite(got).all()
        assert np.abs(got - want).max() <= within * want.std()


# Weights of integers see activations of 16 bits a group, an error of 1e-5 of the largest in each of a layer's products;
# others are multiplied in float32.
CASES = [
    ("llama", "gptq-4-act-order", 1e-3),
    pytest.param("llama", "gptq-4-asymmetric", 1e-3, marks=pytest.mark.slow),
    pytest.param("llama", "gptq-8", 1e-3, marks=pytest.mark.slow),
    pytest.param("llama", "gptq-3", 1e-3, marks=pytest.mark.slow),
    pytest.param("mixtral", "awq-gemm", 1e-3, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "fp8-blocks", 1e-4, marks=pytest.mark.slow),
    pytest.param("llama", "compressed-fp8-channel", 1e-4, marks=pytest.mark.slow),
    pytest.param("llama", "compressed-mxfp4", 1e-3, marks=pytest.mark.slow),
    pytest.param("llama", "bnb-nf4-nested", 1e-4, marks=pytest.mark.slow),
    pytest.param("gpt2", "bnb-int8", 1e-3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "name", "within"), CASES)
def test_the_artifact_computes_with_the_checkpoint_s_numbers(kind, name, within, tmp_path, isolated):
    settings, write, format = FORMATS[name]
    writers.publish(make(kind), tmp_path, write, settings)
    found, facts = isolated(compile_and_run, tmp_path, timeout=500)
    agree(found, reference(tmp_path), within)
    formats = facts["quantization"]["formats"]
    assert str(format) in formats and facts["quantization"]["scheme"].startswith("checkpoint: ")
    assert facts["quantized_by"] == settings["quant_method"]


def test_activations_are_rounded_where_the_checkpoint_rounds_them(tmp_path, isolated):
    settings, write, _ = FORMATS["compressed-int8"]
    group = settings["config_groups"]["group_0"]
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    settings = settings | {"config_groups": {"group_0": group | {"input_activations": tokens}}}
    writers.publish(make("llama", num_hidden_layers=1), tmp_path, write, settings)
    found, _ = isolated(compile_and_run, tmp_path, timeout=500)
    expected, plain = reference(tmp_path, to_int8), reference(tmp_path)
    # A number that lies between two integers may be rounded to the other one: a step of one activation in 127.
    agree(found, expected, 1e-2)
    assert max(np.abs(a - b).max() / b.std() for a, b in zip(found, plain, strict=True)) > 1e-2


@pytest.mark.slow
def test_the_experts_of_gpt_oss(tmp_path, isolated):
    from safetensors.numpy import load_file

    make("gpt_oss").save_pretrained(tmp_path)
    tensors = dict(load_file(tmp_path / "model.safetensors"))
    floats = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        parts, floats[name] = writers.gpt_oss_experts(tensors.pop(name))
        tensors |= {name + end: part for end, part in parts.items()}
    writers.save(tmp_path, tensors, floats, {"quant_method": "mxfp4"})
    found, facts = isolated(compile_and_run, tmp_path, timeout=500)
    agree(found, reference(tmp_path), 1e-3)
    assert list(facts["quantization"]["formats"]) == ["e2m1-g32"]
