"""The weights file: laid out for mapping, ordinary safetensors to everyone else, damage named."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from llmc.runtime.errors import ArtifactError
from llmc.runtime.weights import ALIGNMENT, HEADER_UNIT, Weights, WeightsWriter


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "odd": rng.standard_normal((3, 5)).astype(np.float32),
        "bf16": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "ids": np.arange(9, dtype=np.int32),
        "packed": rng.integers(0, 65535, (2, 3, 4)).astype(np.uint16),
        "half": rng.standard_normal((1, 1)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(3.5).reshape(()),
    }


def write(path, tensors):
    with WeightsWriter(path, {n: (a.shape, str(a.dtype)) for n, a in tensors.items()}) as writer:
        for name, array in tensors.items():
            target = writer[name]
            target[...] = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
    return writer.entry


def test_what_was_written_is_read(tmp_path, tensors):
    entry = write(tmp_path / "w.safetensors", tensors)
    weights = Weights(tmp_path / "w.safetensors")
    assert list(weights) == list(tensors)
    for name, array in tensors.items():
        assert weights.specs[name] == (array.shape, str(array.dtype))
        assert weights[name].tobytes() == array.tobytes()
        assert entry["tensors"][name] == weights.sha256(name) == hashlib.sha256(array.tobytes()).hexdigest()
        assert weights[name].size == 0 or weights[name].ctypes.data % ALIGNMENT == 0
    assert weights.header_sha256 == entry["header_sha256"]
    assert len(weights.header) % HEADER_UNIT == 0


def test_it_is_ordinary_safetensors(tmp_path, tensors):
    write(tmp_path / "w.safetensors", tensors)
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("odd"), tensors["odd"])
        np.testing.assert_array_equal(file.get_tensor("ids"), tensors["ids"])


def test_reserved_names_and_unknown_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'__metadata__' is reserved"):
        WeightsWriter(tmp_path / "w", {"__metadata__": ((1,), "float32")})
    with pytest.raises(ValueError, match=r"expected a dtype of .*bfloat16.*, found 'complex64'"):
        WeightsWriter(tmp_path / "w", {"a": ((1,), "complex64")})


def test_an_error_while_writing_comes_through(tmp_path):
    with pytest.raises(KeyError), WeightsWriter(tmp_path / "w", {"a": ((1,), "float32")}) as writer:
        writer["b"]


def damaged(path, change):
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["odd"].update(shape=[1 << 40, 5]),
        lambda h: h["odd"].update(shape=[-3, -5]),
        lambda h: h["odd"].update(data_offsets=[0, 1 << 50]),
        lambda h: h["odd"].update(data_offsets=[-60, 0]),
        lambda h: h["odd"].update(dtype="F128"),
        lambda h: h["odd"].pop("shape"),
        lambda h: h["odd"].update(shape="3x5"),
        lambda h: h["odd"].update(data_offsets=[0]),
        lambda h: [1, 2],
    ],
)
def test_a_lying_header_is_refused(tmp_path, tensors, change):
    path = tmp_path / "w.safetensors"
    write(path, tensors)
    damaged(path, change)
    with pytest.raises(ArtifactError, match=r"w.safetensors: damaged: .*compile it again"):
        Weights(path)


@pytest.mark.parametrize("size", [0, 5, 100, HEADER_UNIT, HEADER_UNIT + 10])
def test_a_truncated_file_is_refused(tmp_path, tensors, size):
    path = tmp_path / "w.safetensors"
    write(path, tensors)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match="damaged"):
        Weights(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="found nothing there"):
        Weights(tmp_path / "none")
