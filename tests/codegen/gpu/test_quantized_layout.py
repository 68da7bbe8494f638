"""How quantized weights lie on GPUs, against the layout written down in numpy; and what has no kernels."""

import numpy as np
import pytest
from tvm import relax

from llmc.codegen.gpu.quantized_layout import Layout, pack
from llmc.codegen.weights import Recipe, numpy_dtype
from llmc.ir.errors import CompileError
from llmc.ir.quantized import Format
from tests.codegen.conftest import Array
from tests.codegen.gpu.quantized_products import FORMATS, QuantizedWeight

PACKED = ["int8-g64", "int4", "int4-zp", "int4-row", "int3-zp", "mxfp4"]


def packed(weight):
    """The stored tensors, row slice by row slice, as a compile makes them."""
    format, shape = weight.format, weight.shape
    params = [relax.Var(n, relax.TensorType(list(s), d)) for n, (s, d) in format.parts(shape).items()]
    sources = {name: Array(part) for name, part in zip(format.parts(shape), weight.parts, strict=True)}
    found = []
    for i in range(len(params)):
        builder = relax.BlockBuilder()
        with builder.function("recipe", params):
            with builder.dataflow():
                out = builder.emit_output(pack(builder.emit, params, shape[-1], format, "cuda:sm_90")[i])
            builder.emit_func_output(out)
        recipe = builder.get()["recipe"].with_attr("llmc.sources", list(sources))
        found.append(np.concatenate(list(Recipe(recipe, sources).slices())))
    return found


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("shape", [(5, 64), (7, 192), (2, 3, 192)], ids=str)
def test_parts_as_stored(name, shape):
    weight = QuantizedWeight(FORMATS[name], shape, np.random.default_rng(0))
    layout = Layout(weight.format, shape[-1])
    for found, stored, (_, size, dtype) in zip(
        packed(weight), weight.stored, layout.tensors(shape[-2], shape[:-2]), strict=True
    ):
        assert found.shape == stored.shape == size and found.itemsize == numpy_dtype(dtype).itemsize
        assert found.tobytes() == stored.tobytes()


@pytest.mark.parametrize("name", ["int8", "int4", "int3"])
def test_a_code_by_its_number(name):
    weight = QuantizedWeight(FORMATS[name], (1, 96), np.random.default_rng(0))
    layout, row = Layout(weight.format, 96), weight.stored[0][0]
    assert [layout.code(k, lambda i: int(row[i])) for k in range(96)] == weight.codes[0].tolist()


@pytest.mark.parametrize(
    ("format", "depth", "what"),
    [
        (Format(2, 32, offset=2), 64, "expected codes of 3, 4 or 8 bits, found 2"),
        (Format(4, 4, offset=8), 64, "expected groups of a multiple of 8 that fill rows of 64, found groups of 4"),
        (Format(4, 32, offset=8), 80, "expected groups of a multiple of 8 that fill rows of 80, found groups of 32"),
        (Format(3, 24, offset=4), 96, "expected groups that divide or are multiples of 32"),
        (Format(8, 32, table="nf4"), 64, "with a value for each code, found 'nf4'"),
        (
            Format(4, 32, "float64", offset=8),
            64,
            "scales of float32, float16, bfloat16, e8m0, found 'float64'",
        ),
    ],
)
def test_formats_without_kernels_are_refused_by_name(format, depth, what):
    with pytest.raises(CompileError) as raised:
        Layout(format, depth, "metal").run()
    assert what in str(raised.value) and str(format) in str(raised.value) and "metal" in str(raised.value)
