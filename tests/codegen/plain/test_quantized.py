"""Plain loops over quantized weights, against float64."""

import functools

import numpy as np
import pytest
import tvm

from llmc.codegen.plain import quantized
from tests.codegen.gpu.quantized_products import FORMATS, QuantizedCase, round_activation


def run(kernel, *arguments):
    """What the kernel writes to its last argument, an array of zeros."""
    made = tvm.compile(tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")}), target="llvm")
    tensors = [tvm.runtime.tensor(a) for a in arguments]
    made["kernel"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize("name", ["int8-g64", "int4-zp", "int3", "fp8-g128", "nf4-row", "mxfp4"])
def test_products(name):
    case = QuantizedCase(name, 10, max(64, 2 * FORMATS[name].group), "float16", out="float32")
    kernel = quantized.matmul(None, 10, case.depth, format=case.format, activation="float16", out="float32")
    *given, _ = case.arguments(3)
    assert case.largest_miss(run(kernel, *given, np.zeros((3, 10), "float32"))) <= 1


def test_experts_and_rounded_activations():
    case = QuantizedCase("int4", 10, 64, "float32", experts=3, bias="float32", ids="int64")
    made = functools.partial(quantized.expert_linear, None, 3, 10, 64, format=case.format, activation="float32")
    for rounded in (None, 0, 32):
        kernel = made(ids="int64", bias="float32", rounded=rounded)
        *given, _ = case.arguments(4)
        case.x[0] *= np.float32(1e-38)  # 127 / max|x| would be infinite
        x = None if rounded is None else round_activation(case.x, rounded)
        assert case.largest_miss(run(kernel, *given, np.zeros((4, 10), "float32")), x=x) <= 1


@pytest.mark.parametrize("rounded", [0, 128])
def test_activations_beside_e4m3_weights_are_rounded_to_e4m3(rounded):
    case = QuantizedCase("fp8-g128", 10, 256, "float32")
    kernel = quantized.matmul(None, 10, 256, format=case.format, activation="float32", out="float32", rounded=rounded)
    *given, _ = case.arguments(3)
    x = round_activation(case.x, rounded, "e4m3")
    assert case.largest_miss(run(kernel, *given, np.zeros((3, 10), "float32")), x=x) <= 1


def test_rows_by_number():
    case = QuantizedCase("nf4", 10, 64, "float32")
    kernel = quantized.take(None, 10, 64, format=case.format, out="float16", ids="int32")
    found = run(kernel, *case.w.stored, np.array([3, 9, 0], "int32"), np.zeros((3, 64), "float16"))
    np.testing.assert_array_equal(found, case.w.float32()[[3, 9, 0]].astype("float16"))
