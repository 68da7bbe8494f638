"""Quantized checkpoints: what is read is what was written, and the model computes with it."""

import numpy as np
import pytest
import torch

from llmc.frontend.huggingface import load
from llmc.frontend.quantized import QuantizedTensor
from llmc.ir.quantized import Format

from . import writers

TOKENS = [1, 5, 9, 200, 31, 7]
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
}


@pytest.fixture
def published(tmp_path, make_model):
    """published(settings, write) -> (folder, the model that has the numbers written, name: those numbers)."""

    def make(settings, write, kind="llama", **options):
        model = make_model(kind)
        model.save_pretrained(tmp_path)
        want = writers.rewrite(tmp_path, write, settings, **options)
        with torch.no_grad():
            for name, value in want.items():
                model.get_parameter(name).copy_(torch.from_numpy(value))
        return tmp_path, model, want

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_weights_and_logits_are_those_written(name, published, transformers_logits, imported_logits):
    settings, write, format = FORMATS[name]
    folder, model, want = published(settings, write)
    imported = load(folder)
    assert sorted(imported.quantized) == sorted(want)
    for weight, value in want.items():
        found = imported.weights[weight]
        assert isinstance(found, QuantizedTensor) and found.format == format and found.dtype == "float32"
        assert (found.order is not None) == ("act-order" in name or name == "gptq-4-asymmetric")
        np.testing.assert_array_equal(found.read(), value)
        np.testing.assert_array_equal(found.read(3, 21), value[3:21])
        assert found.parts["codes"].read().max() < 2**format.bits
    got, expected = imported_logits(imported, TOKENS), transformers_logits(model, TOKENS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
