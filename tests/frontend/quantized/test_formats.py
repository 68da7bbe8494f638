"""Quantized checkpoints: what is read is what was written, and the model computes with it."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from llmc.frontend.huggingface import load, stored_dtype
from llmc.frontend.quantized import QuantizedTensor, read
from llmc.frontend.weights import open_checkpoint
from llmc.ir.quantized import Format

from . import writers

TOKENS = [1, 5, 9, 200, 31, 7]


def compressed(layout, activations=None, **weights):
    """The quantization_config of compressed-tensors with one group for every Linear."""
    weights = {"type": "int", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


# name: (settings of config.json, writer, the format of the weights)
FORMATS = {
    "gptq-4": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        writers.gptq(),
        Format(4, 32, "float16", offset=8),
    ),
    "gptq-4-act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
        writers.gptq(act_order=True),
        Format(4, 32, "float16", offset=8),
    ),
    "gptq-4-asymmetric": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        writers.gptq(symmetric=False, act_order=True),
        Format(4, 32, "float16", zeros=True),
    ),
    "gptq-4-v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
        writers.gptq(group=16, symmetric=False, first=0),
        Format(4, 16, "float16", zeros=True),
    ),
    "gptq-8": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        lambda weight, rng: writers.gptq(bits=8, group=weight.shape[1])(weight, rng),
        Format(8, 0, "float16", offset=128),
    ),
    "gptq-3": (
        {"quant_method": "gptq", "bits": 3, "group_size": 32},
        writers.gptq(bits=3, symmetric=False),
        Format(3, 32, "float16", zeros=True),
    ),
    "awq-gemm": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        writers.awq(),
        Format(4, 32, "float16", zeros=True),
    ),
    "awq-gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        writers.awq("gemv"),
        Format(4, 32, "float16", zeros=True),
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        writers.fp8_tensor(),
        Format(8, 0, "float32", table="e4m3"),
    ),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        writers.fp8_blocks(32, 32),
        Format(8, 32, "float32", table="e4m3"),
    ),
    "fp8-blocks-at-edges": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]},
        writers.fp8_blocks(48, 48, scale_dtype=ml_dtypes.bfloat16),
        Format(8, 16, "bfloat16", table="e4m3"),
    ),
    "fbgemm-fp8": ({"quant_method": "fbgemm_fp8"}, writers.fp8_channel, Format(8, 0, "float32", table="e4m3")),
    "modelopt-fp8": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        writers.fp8_tensor(),
        Format(8, 0, "float32", table="e4m3"),
    ),
    "compressed-4": (
        compressed("pack-quantized", num_bits=4, group_size=32, strategy="group"),
        writers.compressed_packed(),
        Format(4, 32, "bfloat16", offset=8),
    ),
    "compressed-4-asymmetric-act-order": (
        compressed("pack-quantized", num_bits=4, group_size=16, strategy="group", symmetric=False, actorder="group"),
        writers.compressed_packed(group=16, symmetric=False, act_order=True, dtype="float16"),
        Format(4, 16, "float16", zeros=True),
    ),
    "compressed-8": (
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        writers.compressed_packed(8, 0),
        Format(8, 0, "bfloat16", offset=128),
    ),
    "compressed-3": (
        compressed("pack-quantized", num_bits=3, group_size=32, strategy="group", symmetric=False),
        writers.compressed_packed(3, symmetric=False),
        Format(3, 32, "bfloat16", zeros=True),
    ),
    "compressed-int8": (
        compressed("int-quantized", num_bits=8, strategy="channel"),
        writers.compressed_int8(),
        Format(8, 0, "bfloat16", offset=128),
    ),
    "compressed-int8-asymmetric": (
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        writers.compressed_int8(symmetric=False),
        Format(8, 0, "bfloat16", zeros=True),
    ),
    "compressed-fp8-tensor": (
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
        writers.fp8_tensor(ml_dtypes.bfloat16, static=False),
        Format(8, 0, "bfloat16", table="e4m3"),
    ),
    "compressed-fp8-channel": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        writers.fp8_channel,
        Format(8, 0, "float32", table="e4m3"),
    ),
    "compressed-fp8-blocks": (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
        writers.fp8_blocks(32, 32, ".weight_scale"),
        Format(8, 32, "float32", table="e4m3"),
    ),
    "compressed-mxfp4": (
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        writers.compressed_mxfp4,
        Format(4, 32, "e8m0", table="e2m1"),
    ),
    "bnb-nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        writers.bnb_nf4(block=32, nested=False),
        Format(4, 32, "float32", table="nf4"),
    ),
    "bnb-nf4-nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        writers.bnb_nf4(block=32),
        Format(4, 32, "float32", table="nf4"),
    ),
    "bnb-int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        writers.bnb_int8,
        Format(8, 0, "float32", offset=128),
    ),
}
ORDERED = {"gptq-4-act-order", "gptq-4-asymmetric", "compressed-4-asymmetric-act-order"}


@pytest.fixture
def written(tmp_path):
    """written(write, o, i) -> (tensors of a checkpoint with one module "m", the numbers [o, i] it stands for)."""

    def make(write, o=64, i=160):
        rng = np.random.default_rng(1)
        parts, want = write(rng.standard_normal((o, i)).astype("float32"), rng)
        parts = {f"m{end}": np.ascontiguousarray(part) for end, part in parts.items()}
        save_file(parts | {"n.weight": np.ones(3, "float32")}, tmp_path / "model.safetensors")
        return open_checkpoint(tmp_path), want

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_written(name, written):
    settings, write, format = FORMATS[name]
    tensors, want = written(write)
    found = read(settings, tensors, "float32").tensors
    assert sorted(found) == ["m.weight", "n.weight"]
    weight = found["m.weight"]
    assert isinstance(weight, QuantizedTensor) and weight.format == format and weight.dtype == "float32"
    assert (weight.order is not None) == (name in ORDERED) and weight.activation is None
    rounds = dict(rtol=2e-7, atol=0)  # a scale that is itself a product rounds once more
    np.testing.assert_allclose(weight.read(), want, **rounds)
    np.testing.assert_allclose(weight.read(3, 21), want[3:21], **rounds)
    assert weight.parts["codes"].read().max() < 2**format.bits


def test_nf4_blocks_may_end_within_rows(written):
    for o, i, group in ((64, 160, 32), (6, 32, 0), (64, 33, 1)):  # blocks of 64
        tensors, want = written(writers.bnb_nf4(nested=False), o, i)
        weight = read(FORMATS["bnb-nf4"][0], tensors, "float32").tensors["m.weight"]
        assert weight.format.group == group
        np.testing.assert_array_equal(weight.read(), want)
        np.testing.assert_array_equal(weight.read(3, 5), want[3:5])


# Format, model, and how many weights are quantized as parts.
LOGITS = [
    ("gptq-4-act-order", "llama", 2 * 7),
    ("gptq-8", "gpt2", 2 * 4),  # Conv1D: the transpose of what is stored
    ("awq-gemm", "mixtral", 2 * 6),  # experts stored one by one, stacked, gate and up joined
    ("fp8-blocks", "deepseek_v3", 2 * 5 + 3 + 2 + 3),
    ("compressed-int8", "llama", 2 * 7),
    ("gptq-4-act-order", "mixtral", 2 * 4),  # experts with inputs in orders of their own: floats
]


@pytest.mark.parametrize(("name", "kind", "count"), LOGITS)
def test_logits_are_those_of_the_numbers(name, kind, count, tmp_path, make_model, imported_logits):
    settings, write, format = FORMATS[name]
    writers.publish(make_model(kind), tmp_path, write, settings)
    imported = load(tmp_path)
    agree(imported_logits(imported, TOKENS), tmp_path / "floats")
    found = imported.quantized
    assert {replace(w.format, group=format.group) for w in found.values()} == {format}  # short rows: one group
    assert len(found) == count, sorted(found)
    notes = [note for note in imported.facts["notes"] if "computed with as floats" in note]
    assert len(notes) == (kind == "mixtral" and "act-order" in name)
    assert imported.facts["checkpoint_dtype"] == "float32" and name.startswith(imported.facts["quantized_by"][:4])


def test_random_weights_are_floats(tmp_path, make_model):
    settings, write, _ = FORMATS["gptq-4"]
    writers.publish(make_model("llama"), tmp_path, write, settings)
    imported = load(tmp_path, weights="random")
    assert imported.quantized == {}
    assert "quantization by gptq is left out: random weights are floats" in imported.facts["notes"]


def test_the_dtype_of_a_quantized_checkpoint_is_its_config_s(tmp_path, make_model):
    settings, write, _ = FORMATS["gptq-4"]
    writers.publish(make_model("llama"), tmp_path, write, settings)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert stored_dtype(tmp_path) == "bfloat16"


def agree(got, floats):
    """Logits are those that transformers computes with the numbers in `floats`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        floats, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)[None], use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_the_experts_of_gpt_oss(tmp_path, make_model, imported_logits):
    make_model("gpt_oss").save_pretrained(tmp_path)
    tensors = dict(load_file(tmp_path / "model.safetensors"))
    floats = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        parts, floats[name] = writers.gpt_oss_experts(tensors.pop(name))
        tensors |= {name + end: part for end, part in parts.items()}
    writers.save(tmp_path, tensors, floats, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    imported = load(tmp_path)
    assert len(imported.quantized) == 4
    for name, weight in imported.quantized.items():
        assert weight.format == Format(4, 32, "e8m0", table="e2m1") and weight.turned
        np.testing.assert_array_equal(weight.read(), floats[name])
        np.testing.assert_array_equal(weight.read(1, 3), floats[name][1:3])
    agree(imported_logits(imported, TOKENS), tmp_path / "floats")
    assert imported.facts["quantized_by"] == "mxfp4"
