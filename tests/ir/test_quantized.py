"""What quantized weights mean: dequantize and round_activation against numpy, written down independently."""

import numpy as np
import pytest
from tvm import relax

from llmc.ir.driver import numpy_dtype
from llmc.ir.evaluate import evaluate
from llmc.ir.quantized import (
    TABLES,
    Format,
    activation_group,
    activation_kind,
    dequantize,
    format_of,
    round_activation,
)
from llmc.ir.rewrite import bindings

FORMATS = [
    Format(8, 0, "float16", offset=128),
    Format(4, 32, "float16", offset=8),
    Format(4, 64, "bfloat16", zeros=True),
    Format(3, 32, "float32", offset=4),
    Format(8, 16, "float32", table="e4m3"),
    Format(4, 32, "float32", table="nf4"),
    Format(4, 32, "e8m0", table="e2m1"),
]


def random_parts(format: Format, shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Codes, scales and zeros of a format; no code is a NaN."""
    import ml_dtypes

    rng = np.random.default_rng(seed)
    made = []
    for name, (extent, dtype) in format.parts(shape).items():
        if name == "scales" and format.scale != "e8m0":
            dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            made.append(rng.uniform(0.01, 0.1, extent).astype(dtype))
        elif name == "scales":
            made.append(rng.integers(110, 140, extent).astype("uint8"))
        else:
            made.append(rng.integers(0, 127 if format.table == "e4m3" else 2**format.bits, extent).astype("uint8"))
    return made


def program(shapes_and_dtypes, emit) -> relax.Function:
    bb = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(list(s), d)) for i, (s, d) in enumerate(shapes_and_dtypes)]
    with bb.function("main", params):
        bb.emit_func_output(emit(bb, *params))
    return bb.get()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 128)])
def test_dequantize_is_number_times_scale(format, shape):
    parts = random_parts(format, shape, 7)
    module = program(format.parts(shape).values(), lambda bb, *p: dequantize(bb, format, *p))
    call = next(b.value for b in bindings(module["main"]))
    assert format_of(module, call) == format
    found = evaluate(module, parts)
    wanted = np.zeros(shape)
    for at in np.ndindex(*shape):
        group = (*at[:-1], at[-1] // format.group if format.group else 0)
        code, scale = int(parts[0][at]), float(parts[1][group])
        if format.scale == "e8m0":
            scale = 2.0 ** (scale - 127)
        zero = int(parts[2][group]) if format.zeros else format.offset
        wanted[at] = (TABLES[format.table][code] if format.table else code - zero) * scale
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_tables_agree_with_the_formats_published():
    import ml_dtypes

    bytes_ = np.arange(256, dtype="uint8")
    np.testing.assert_array_equal(TABLES["e4m3"], bytes_.view(ml_dtypes.float8_e4m3fn).astype("float32"))
    np.testing.assert_array_equal(TABLES["e2m1"], bytes_[:16].view(ml_dtypes.float4_e2m1fn).astype("float32"))
    assert TABLES["nf4"][7] == 0.0 and len(TABLES["nf4"]) == 16


@pytest.mark.parametrize("group", [0, 32])
def test_round_activation_is_symmetric_rounding_of_each_token(group):
    x = np.random.default_rng(3).normal(size=(5, 96)).astype("float32")
    x[2] = 0
    x[3] *= 1e-31  # for the least scale, 1e-30 / 127
    x[4] *= 1e-38  # 127 / max|x| would be infinite
    module = program([(x.shape, "float32")], lambda bb, p: round_activation(bb, p, group=group))
    assert activation_group(module, next(b.value for b in bindings(module["main"]))) == group
    found = evaluate(module, [x])
    size = group or 96
    blocks = x.reshape(5, -1, size)
    most = np.abs(blocks).max(-1, keepdims=True)
    safe = np.maximum(most, np.float32(1e-30))
    q = np.rint(blocks * (np.float32(127) / safe))
    np.testing.assert_array_equal(found.reshape(blocks.shape), q * (safe * np.float32(1 / 127)))
    assert np.abs(q).max() == 127 and not found[[2, 4]].any() and 0 < np.abs(q[3]).max() < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [0, 32])
def test_round_activation_to_e4m3_takes_the_nearest_number(group, dtype):
    """Of every size: those that E4M3 has no normal number for, ties, the largest."""
    import ml_dtypes

    random = np.random.default_rng(4)
    x = (random.normal(size=(6, 96)) * 2.0 ** random.integers(-14, 3, (6, 96))).astype("float32")
    x[2] = 0
    x[3] = 448 * random.choice([-1, 1], 96)
    x[4, 1:17] = np.arange(16) * 2.0**-10  # multiples of half the least number, where the largest is 448
    x[4, 17:33] = (16 + np.arange(16)) * 8  # and of half of what is between 128 and 256
    x[4, ::48] = 448
    x = x.astype(numpy_dtype(dtype))
    module = program([(x.shape, dtype)], lambda bb, p: round_activation(bb, p, group=group, kind="fp8"))
    assert activation_kind(module, next(b.value for b in bindings(module["main"]))) == "fp8"
    blocks = x.astype("float32").reshape(6, -1, group or 96)
    safe = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(1e-30))
    q = (blocks * (np.float32(448) / safe)).astype(ml_dtypes.float8_e4m3fn).astype("float32")
    expected = (q * (safe * np.float32(1 / 448))).reshape(x.shape).astype(x.dtype)
    np.testing.assert_array_equal(np.asarray(evaluate(module, [x])).astype("float32"), expected.astype("float32"))


def test_activations_are_rounded_to_what_their_weights_are_made_of():
    assert Format(8, 0, table="e4m3").rounds == "fp8"
    assert {Format(8, 0).rounds, Format(4, 32, table="e2m1").rounds, Format(4, 32, table="nf4").rounds} == {"int8"}


def test_groups_that_do_not_fill_a_row_are_refused():
    with pytest.raises(ValueError, match="whole groups of 32, found rows of 40"):
        Format(4, 32).parts((8, 40))
    assert Format(4, 32).bits_per_weight(64) == 4.5
