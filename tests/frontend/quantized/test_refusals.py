"""What quantized checkpoints are refused for, and with which words; and what is noted of those that are taken."""

import json

import numpy as np
import pytest

from llmc.frontend.quantized import read
from llmc.frontend.weights import Stored
from llmc.ir.errors import SourceError

from . import writers
from .test_formats import FORMATS, compressed


def module(name, change=None, o=64, i=160):
    """The tensors of a module "m" in a format, after a change of them."""
    rng = np.random.default_rng(1)
    parts, _ = FORMATS[name][1](rng.standard_normal((o, i)).astype("float32"), rng)
    tensors = {f"m{end}": np.ascontiguousarray(part).reshape(np.shape(part)) for end, part in parts.items()}
    if change is not None:
        change(tensors)
    return {key: Stored(array) for key, array in tensors.items()}


def refused(message, settings, tensors):
    with pytest.raises(SourceError, match=message) as error:
        read(settings, tensors, "float32")
    assert "\n" not in str(error.value)


SETTINGS = [
    ("gptq-4", {"bits": 2}, "m: expected gptq in 3, 4 or 8 bits, found 2: not supported; give the model before"),
    ("gptq-4", {"checkpoint_format": "marlin"}, "gptq: expected the layout gptq or gptq_v2, found marlin"),
    ("gptq-4", {"group_size": -7}, "m: expected a group size of -1 or more, found -7"),
    ("gptq-4", {"group_size": 16}, r"m\.scales: expected shape \[10, 64\], found \[5, 64\]"),
    ("gptq-4", {"bits": 8}, r"m\.scales: expected shape \[3, 64\]"),
    ("awq-gemm", {"bits": 3}, "awq: expected 4 bits, found 3"),
    ("awq-gemm", {"version": "gemv_fast"}, "awq: expected the layout gemm or gemv, found gemv_fast"),
    ("awq-gemv", {"group_size": 4}, r"m\.qzeros: expected zero points of 40 groups, found room for 32"),
    ("modelopt-fp8", {"quant_algo": "NVFP4"}, "modelopt: expected the algorithm FP8, found NVFP4"),
    ("fp8-blocks", {"weight_block_size": [64, 64]}, r"m\.weight_scale_inv: expected shape \[1, 3\], found \[2, 5\]"),
    ("compressed-4", {"format": "nvfp4-pack-quantized"}, "m: expected a format .* found nvfp4-pack-quantized"),
    ("compressed-4", {"config_groups": {}}, "m: expected a group in config_groups that says how it is stored"),
    ("compressed-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "expected no sparsity, found sparse-24"),
    (
        "compressed-4",
        compressed("pack-quantized", num_bits=2),
        "m: expected integers of 3, 4 or 8 bits, found int2: not supported",
    ),
    (
        "compressed-4",
        compressed("pack-quantized", num_bits=8),
        r"m\.weight_packed: expected shape \[64, 40\], found \[64, 20\]",
    ),
    (
        "compressed-4",
        compressed("pack-quantized", num_bits=4, symmetric=False),
        r"m\.weight_zero_point: expected this part of a quantized weight, found no such tensor",
    ),
    (
        "compressed-int8",
        compressed("int-quantized", num_bits=8, symmetric=False),
        r"m\.weight_zero_point: expected int8 \[64, 1\], found no such tensor",
    ),
]


@pytest.mark.parametrize(("name", "settings", "message"), SETTINGS)
def test_settings(name, settings, message):
    refused(message, FORMATS[name][0] | settings, module(name))


def put(**arrays):
    return lambda tensors: tensors.update({f"m.{key}": array for key, array in arrays.items()})


def without(*names):
    return lambda tensors: [tensors.pop(f"m.{name}") for name in names]


def state(**changes):
    def change(tensors):
        name = "m.weight.quant_state.bitsandbytes__nf4"
        found = json.loads(tensors[name].tobytes()) | changes
        found = {key: value for key, value in found.items() if value is not None}
        tensors[name] = np.frombuffer(json.dumps(found).encode(), "uint8")

    return change


def fp4(tensors):
    tensors["m.weight.quant_state.bitsandbytes__fp4"] = tensors.pop("m.weight.quant_state.bitsandbytes__nf4")


MISSING = "expected this part of a quantized weight, found no such tensor"
TENSORS = [
    ("gptq-4", without("scales"), rf"m\.scales: {MISSING}"),
    ("gptq-4", without("qzeros"), rf"m\.qzeros: {MISSING}"),
    ("gptq-4", put(g_idx=np.zeros(3, "int32")), r"m\.g_idx: expected shape \[160\], found \[3\]"),
    ("gptq-4", put(g_idx=np.zeros(160, "int32")), r"m\.g_idx: expected 32 inputs in every group, found other numbers"),
    ("gptq-4", put(qweight=np.zeros((20, 64), "int64")), r"m\.qweight: expected int32, found int64"),
    ("gptq-4", put(scales=np.zeros((5, 64), "int32")), r"m\.scales: expected float16 or .*, found int32"),
    ("awq-gemm", put(qweight=np.zeros(8, "int32")), r"m\.qweight: expected shape \[any, any\], found \[8\]"),
    ("awq-gemm", without("qzeros"), rf"m\.qzeros: {MISSING}"),
    ("awq-gemv", without("scales"), rf"m\.scales: {MISSING}"),
    ("fp8-tensor", without("weight_scale"), rf"m\.weight_scale_inv: {MISSING}"),
    ("fp8-tensor", put(weight_scale=np.ones((3, 1), "float32")), r"m\.weight_scale: expected scales of rows"),
    ("fp8-tensor", put(weight_scale=np.ones(1, "int32")), r"m\.weight_scale: expected scales in float16, .* int32"),
    (
        "fp8-tensor",
        put(weight=np.zeros((64, 160), writers.ml_dtypes.float8_e5m2)),
        r"m\.weight: expected a matrix of float8_e4m3fn, found float8_e5m2 \[64, 160\]: not supported",
    ),
    ("compressed-4", without("weight_shape"), rf"m\.weight_shape: {MISSING}"),
    ("compressed-4", without("weight_scale"), rf"m\.weight_scale: {MISSING}"),
    (
        "compressed-4-asymmetric-act-order",
        put(weight_zero_point=np.zeros((64, 10), "int32")),
        r"m\.weight_zero_point: expected int32 \[8, 10\], found int32 \[64, 10\]",
    ),
    ("compressed-mxfp4", put(weight_scale=np.zeros((64, 4), "uint8")), r"weight_scale: expected shape \[64, 5\]"),
    ("bnb-nf4", state(shape=None), r"bitsandbytes__nf4: expected JSON with the shape and blocksize of a matrix"),
    ("bnb-nf4", state(shape=[64, 32]), r"m\.weight: expected 1024 bytes, found 5120"),
    ("bnb-nf4", put(**{"weight.quant_map": np.zeros(16, "float32")}), "quant_map: expected the values of nf4"),
    ("bnb-nf4", without("weight.absmax"), rf"m\.weight\.absmax: {MISSING}"),
    ("bnb-nf4-nested", without("weight.nested_absmax"), rf"m\.weight\.nested_absmax: {MISSING}"),
    ("bnb-nf4", fp4, "m.weight: expected nf4, found fp4: not supported"),
    ("bnb-int8", put(SCB=np.ones(3, "float32")), r"m\.SCB: expected shape \[64\], found \[3\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_tensors(name, change, message):
    refused(message, FORMATS[name][0], module(name, change))


def test_experts_without_scales():
    blocks = {"e.gate_blocks": Stored(np.zeros((2, 4, 2, 16), "uint8"))}
    refused(rf"e\.gate_scales: {MISSING}", {"quant_method": "mxfp4"}, blocks)


def activations(**settings):
    return {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"} | settings


@pytest.mark.parametrize(
    ("settings", "group", "notes"),
    [
        (activations(), 0, []),
        (activations(strategy="group", group_size=32), 32, []),
        (activations(dynamic=False, strategy="tensor"), None, ["static int8 per tensor in the checkpoint"]),
        (activations(symmetric=False), None, ["activations are not rounded (dynamic int8 per token"]),
        (None, None, []),
    ],
    ids=str,
)
def test_roundings_of_activations(settings, group, notes):
    found = read(compressed("int-quantized", settings, num_bits=8), module("compressed-int8"), "float32")
    assert found.tensors["m.weight"].activation == group
    assert len(found.notes) == len(notes) and all(want in have for want, have in zip(notes, found.notes, strict=True))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("fp8-tensor", "fp8: weights are in 8-bit floats; activations are not rounded to them (static in"),
        ("fp8-blocks", "activations are not rounded to them (dynamic in the checkpoint)"),
        ("bnb-int8", "bitsandbytes: weights are in int8; activations are not rounded, so none counts as an outlier"),
    ],
)
def test_what_is_computed_is_noted(name, note):
    (found,) = read(FORMATS[name][0], module(name), "float32").notes
    assert note in found


@pytest.mark.parametrize(
    "names", ["self_attn.{}_scale", "self_attn.{}_proj.output_scale", "self_attn.{0}_proj.{0}_scale"]
)
def test_scales_of_a_cache_are_facts(names):
    scales = {f"layers.0.{names.format(which)}": Stored(np.float32(value)) for which, value in (("k", 0.5), ("v", 2))}
    found = read(FORMATS["fp8-tensor"][0], module("fp8-tensor") | scales, "float32")
    assert found.facts == {"quantized_by": "fp8", "kv_scales": {"layers.0.self_attn": {"k": 0.5, "v": 2.0}}}
    assert any("scales for a cache in 8-bit floats (1 layers)" in note for note in found.notes)
    assert sorted(found.tensors) == ["m.weight"]


def test_a_scale_of_a_cache_is_one_number():
    scales = {"a.k_scale": Stored(np.ones(4, "float32"))}
    refused(r"a\.k_scale: expected one scale for a layer, found shape \[4\]", FORMATS["fp8-tensor"][0], scales)


def test_rules_of_a_config_go_by_name():
    settings = FORMATS["gptq-4"][0] | {"bits": 8, "dynamic": {"-:x": {}, r"+:m$": {"bits": 4, "group_size": 32}}}
    assert read(settings, module("gptq-4"), "float32").tensors["m.weight"].format.bits == 4
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": ["re:.*m"], "weights": {"num_bits": 4}},
        "c": {"targets": ["n"], "weights": {"num_bits": 2}},
    }
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    assert read(settings, module("compressed-4"), "float32").tensors["m.weight"].format.bits == 4


def test_zero_points_that_borrowed_from_their_neighbours_are_whole_again():
    """Where a whole word was decreased by one a code, a zero point of 0 took one from the code above it."""
    tensors = module("gptq-4")
    zeros = np.array([[0, 5, 8, 15, 0, 0, 7, 1] * 8] * 5)
    words = np.stack([writers.stream(row, 4) for row in zeros]).view("uint32") - np.uint32(0x11111111)
    tensors["m.qzeros"] = Stored(words.view("int32"))
    found = read(FORMATS["gptq-4"][0], tensors, "float32").tensors["m.weight"].parts["zeros"].read()
    np.testing.assert_array_equal(found, zeros.T)
