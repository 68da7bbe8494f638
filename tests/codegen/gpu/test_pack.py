"""Weights of GPUs are stored rows, padded to whole 16 bytes."""

import pytest

from llmc.codegen.gpu.pack import row_elements


@pytest.mark.parametrize(
    ("depth", "dtype", "elements"),
    [(64, "bfloat16", 64), (7, "float16", 8), (9, "bfloat16", 16), (7, "float32", 8), (8, "float32", 8)],
)
def test_rows_are_whole_units_of_16_bytes(depth, dtype, elements):
    assert row_elements(depth, dtype) == elements


def test_pack_pads_rows_with_zeros_and_leaves_whole_ones_alone():
    import numpy as np
    from tvm import relax

    from llmc.codegen.gpu.pack import pack
    from llmc.ir.evaluate import evaluate

    for depth in (8, 5):
        builder = relax.BlockBuilder()
        w = relax.Var("w", relax.TensorType([2, 3, depth], "float16"))
        with builder.function("main", [w]):
            packed = pack(builder.emit, w, 3, depth, "float16")
            assert (packed is w) == (depth == 8)
            builder.emit_func_output(packed)
        values = np.arange(6 * depth).reshape(2, 3, depth).astype("float16")
        found = evaluate(builder.get(), [values])
        np.testing.assert_array_equal(np.asarray(found), np.pad(values, [(0, 0), (0, 0), (0, 8 - depth)]))
