"""QuantizedTensor: floats to those who read it, parts to those who ask, whatever conversions do with it."""

import numpy as np
import pytest
import torch
from tvm import relax

from llmc.frontend.quantized import QuantizedTensor
from llmc.frontend.quantized.tensor import decode, regroup
from llmc.frontend.weights import Stored
from llmc.ir.evaluate import evaluate
from llmc.ir.quantized import Format, dequantize

ROWS, DEPTH = 12, 64


def quantized(seed=0, rows=ROWS, format=None, dtype="float32", **options):
    format = format or Format(4, 16, "float32", zeros=True)
    rng = np.random.default_rng(seed)
    parts = {
        "codes": rng.integers(0, 2**format.bits, (rows, DEPTH), "uint8"),
        "scales": rng.random((rows, format.groups(DEPTH)), "float32"),
        "zeros": rng.integers(0, 16, (rows, format.groups(DEPTH)), "uint8"),
    }
    if format.scale == "e8m0":
        parts["scales"] = rng.integers(120, 134, (rows, format.groups(DEPTH)), "uint8")
    parts = {name: Stored(parts[name]) for name in format.parts((rows, DEPTH))}
    if format.table == "e4m3":
        parts["codes"].array[(parts["codes"].array & 127) == 127] = 0  # NaN
    return QuantizedTensor(format, parts, dtype, **options)


@pytest.mark.parametrize(
    "format",
    [
        Format(4, 16, "float32", zeros=True),
        Format(8, 0, "float32", offset=128),
        Format(4, 32, "float32", table="nf4"),
        Format(4, 32, "e8m0", table="e2m1"),
        Format(8, 0, "float32", table="e4m3"),
    ],
    ids=str,
)
def test_it_stands_for_what_the_semantic_op_says(format):
    weight = quantized(format=format)
    bb = relax.BlockBuilder()
    inputs = [relax.Var(n, relax.TensorType(p.shape, p.dtype)) for n, p in weight.parts.items()]
    with bb.function("main", inputs):
        with bb.dataflow():
            out = bb.emit_output(dequantize(bb, format, *inputs))
        bb.emit_func_output(out)
    arrays = [p.read() for p in weight.parts.values()]
    want = evaluate(bb.get(), arrays)
    np.testing.assert_array_equal(weight.read(), want)
    np.testing.assert_array_equal(decode(format, *arrays), want)


CHAINS = {
    "stack": lambda *t: torch.stack(list(t)),
    "cat": lambda *t: torch.cat(list(t)),
    "gate-up": lambda *t: torch.cat([torch.stack(list(t)), torch.stack(list(t[::-1]))], dim=1),
    "chunk": lambda *t: torch.chunk(torch.cat(list(t)), 3, dim=0)[1],
    "rope": lambda a, b: a.view(2, 2, 3, DEPTH).transpose(1, 2).reshape(ROWS, DEPTH),
    "turned": lambda *t: torch.transpose(torch.stack(list(t)), 1, 2).contiguous(),
    "turned-joined": lambda a, b: torch.cat([torch.transpose(a, 0, 1), torch.transpose(b, 0, 1)], dim=1),
    "turned-back": lambda a, b: torch.transpose(torch.transpose(a, 0, 1), 0, 1),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_conversions_go_part_by_part(chain):
    a, b = quantized(1), quantized(2)
    want = CHAINS[chain](*(torch.from_numpy(t.read()) for t in (a, b))).numpy()
    got = CHAINS[chain](a, b)
    assert isinstance(got, QuantizedTensor) and got.shape == want.shape
    np.testing.assert_array_equal(got.read(), want)
    for at in range(0, len(want), 5):
        np.testing.assert_array_equal(got.read(at, at + 5), want[at : at + 5])
    logical = decode(got.format, *(part.read() for part in got.parts.values()))
    np.testing.assert_array_equal(logical.swapaxes(-1, -2) if got.turned else logical, want)


FLOATS = {
    "columns": lambda a, b: torch.cat([a, b], dim=1),
    "part of a row": lambda a, b: torch.chunk(a, 2, dim=1)[1],
    "flat": lambda a, b: a.reshape(ROWS * 2, DEPTH // 2),
}


@pytest.mark.parametrize("chain", FLOATS)
def test_what_parts_cannot_say_is_floats(chain):
    a, b = quantized(1), quantized(2)
    want = FLOATS[chain](*(torch.from_numpy(t.read()) for t in (a, b))).numpy()
    got = FLOATS[chain](a, b)
    assert not isinstance(got, QuantizedTensor)
    np.testing.assert_array_equal(got.read(1, 5), want[1:5])


def test_weights_of_other_formats_or_orders_are_joined_as_floats():
    a, other = quantized(1), quantized(2, format=Format(4, 32, "float32"))
    order = Stored(np.random.default_rng(0).permutation(DEPTH).astype("int32"))
    for b in (other, quantized(2, order=order)):
        for tensors in ((a, b), (b, a), (b, b)):
            got = torch.stack(list(tensors))
            assert isinstance(got, QuantizedTensor) == (b is other and tensors == (b, b))
            np.testing.assert_array_equal(got.read(), np.stack([t.read() for t in tensors]))


def test_an_order_says_which_input_a_column_belongs_to():
    order = np.random.default_rng(0).permutation(DEPTH).astype("int32")
    plain, ordered = quantized(3), quantized(3, order=Stored(order))
    x = np.random.default_rng(1).standard_normal((5, DEPTH)).astype("float32")
    np.testing.assert_allclose(x @ ordered.read().T, x[:, order] @ plain.read().T, rtol=1e-5, atol=1e-5)


def test_it_is_rounded_once_to_its_dtype():
    got = quantized(1, dtype="bfloat16")
    assert got.read().dtype.name == "bfloat16"
    np.testing.assert_array_equal(got.read(), quantized(1).read().astype(got.read().dtype))


def test_parts_that_do_not_fit_are_refused():
    weight = quantized()
    with pytest.raises(ValueError, match="expected the parts"):
        QuantizedTensor(Format(4, 32, "float32", zeros=True), weight.parts, "float32")
    with pytest.raises(ValueError, match=r"expected an order int32 \[64\], found int32 \[3\]"):
        quantized(order=Stored(np.zeros(3, "int32")))


def test_blocks_that_do_not_fill_a_row_become_smaller_groups():
    scales = np.arange(ROWS * 2, dtype="float32").reshape(ROWS, 2)
    same, group = regroup(Stored(scales), 32, 64)
    assert group == 32 and same.read() is not None and same.shape == (ROWS, 2)
    repeated, group = regroup(Stored(scales), 128, 192)  # blocks of 128 and 64
    assert group == 64
    np.testing.assert_array_equal(repeated.read(2, 4), scales[2:4][:, [0, 0, 1]])
    whole, group = regroup(Stored(scales[:, :1]), 128, 64)
    assert group == 0 and whole.shape == (ROWS, 1)
