"""Codes of GPU artifacts back to floats."""

import ml_dtypes
import numpy as np
import pytest

from llmc.bench.packed import PackedError
from llmc.bench.packed_codes import Decoded, dequantize
from tests.codegen.gpu.quantized_products import FORMATS, QuantizedWeight


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_of_every_format(name):
    format = FORMATS[name]
    weight = QuantizedWeight(format, (5, max(96, format.group)), np.random.default_rng(0)) if format.group != 64 else (
        QuantizedWeight(format, (5, 192), np.random.default_rng(0)))  # fmt: skip
    stored = [x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x for x in weight.stored]
    found = dequantize(str(format), *stored)[:, : weight.shape[1]]
    np.testing.assert_array_equal(found, weight.float32())


def test_a_mapping_of_floats():
    weight = QuantizedWeight(FORMATS["int4"], (5, 64), np.random.default_rng(0))
    codes, scales = weight.stored
    packed = {"a.q+k.weight:codes:concat+bitwise_or": codes, "a.q+k.weight:scales": scales, "norm.weight": np.ones(3)}
    quantization = {"formats": {"int4-g32": ["a.q.weight", "a.k.weight"]}}
    found = Decoded(packed, list(packed), quantization, "bfloat16")
    assert list(found) == ["norm.weight", "a.q+k.weight"] and len(found) == 2
    expected = weight.float32().astype(ml_dtypes.bfloat16)
    assert found["a.q+k.weight"].tobytes() == expected.tobytes()
    assert Decoded(packed, list(packed), quantization, "float16")["a.q+k.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("codes", "formats", "message"),
    [
        (np.zeros((2, 16), np.uint8), {}, "does not say in which format"),
        (np.zeros((1, 2, 3, 16), np.uint8), {"int4-g32": ["a.weight"]}, "expected rows of codes as GPUs have them"),
        (np.zeros((2, 16), np.uint8), {"int5": ["a.weight"]}, "found 'int5'"),
    ],
)
def test_what_can_not_be_read_is_refused(codes, formats, message):
    packed = {"a.weight:codes": codes, "a.weight:scales": np.ones((2, 1), np.float16)}
    with pytest.raises(PackedError, match=message):
        Decoded(packed, list(packed), {"formats": formats}, "float32")["a.weight"]
