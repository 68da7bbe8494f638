"""Lazy tensors, files and transformers' conversions of them."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llmc.frontend.weights import Stored, convert, open_checkpoint, open_safetensors
from llmc.ir.errors import SourceError


def lazy(*shape, start=0):
    array = np.arange(start, start + np.prod(shape), dtype="float32").reshape(shape)
    return Stored(array), torch.from_numpy(array)


CHAINS = {
    "stack": lambda *t: torch.stack(list(t)),
    "stack-1": lambda *t: torch.stack(list(t), dim=1),
    "cat": lambda *t: torch.cat(list(t)),
    "cat-1": lambda *t: torch.cat(list(t), dim=1),
    "stacked-joined": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "stacked-turned": lambda a, b: torch.transpose(torch.stack([a, b]), 1, 2).contiguous(),
    "turned": lambda a, b: torch.transpose(torch.cat([a, b]), 0, 1),
    "chunk": lambda a, b: torch.chunk(torch.cat([a, b]), 2, dim=0)[1],
    "chunk-1": lambda a, b: torch.chunk(torch.stack([a, b]), 3, dim=2)[1],
    "split": lambda a, b: torch.split(a, [1, 3], dim=0)[1],
    "unstack": lambda a, b: torch.chunk(torch.stack([a, b]), 2)[1].squeeze(0),
    "interleave": lambda a, b: torch.cat([a, b]).reshape([2, 4, 6]).transpose(0, 1).reshape((8, 6)).contiguous(),
    "rope": lambda a, b: a.view(2, 1, 2, 6).transpose(1, 2).reshape(4, 6),
    "flat": lambda a, b: torch.stack([a, b]).reshape(16, 3),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_lazy_tensor_is_what_pytorch_would_have_made(chain):
    (a, ta), (b, tb) = lazy(4, 6), lazy(4, 6, start=100)
    want, got = CHAINS[chain](ta, tb).numpy(), CHAINS[chain](a, b)
    assert got.shape == want.shape and got.dtype == "float32"
    np.testing.assert_array_equal(got.read(), want)
    for at in range(len(want)):
        np.testing.assert_array_equal(got.read(at, at + 2), want[at : at + 2])
    assert got.read(1, 1).shape == (0, *want.shape[1:])


def test_a_stored_tensor_is_read_without_a_copy(tmp_path):
    save_file({"a": np.ones((4, 6), ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    tensor = open_safetensors(tmp_path / "model.safetensors")["a"]
    assert (tensor.shape, tensor.dtype) == ((4, 6), "bfloat16")
    assert tensor.read(1, 3).base is not None and not tensor.read(1, 3).flags.owndata


def header(path, entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("entries", "data", "length", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", None, "found bytes 0 to 8 of 4"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", None, "expected 12 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"12345678", None, "a: expected"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678", None, "found bytes that are none"),
        (["a"], b"", None, "found bytes that are none"),
        ({}, b"", 1 << 40, "expected a safetensors header of 1099511627776 bytes"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries, data, length, message):
    with pytest.raises(SourceError, match=message):
        open_safetensors(header(tmp_path / "model.safetensors", entries, data, length))


def test_a_file_cut_short_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(SourceError, match="cut short"):
        open_safetensors(tmp_path / "model.safetensors")


def test_a_tensor_of_a_dtype_that_is_not_read_is_refused_when_it_is_read(tmp_path):
    path = header(tmp_path / "a.safetensors", {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"1234")
    with pytest.raises(SourceError, match=r"a: expected one of .* found dtype F4"):
        open_safetensors(path)["a"].read()


@pytest.mark.parametrize(("kind", "dtype"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("I8", "int8")])
def test_tensors_of_8_bits_are_read(tmp_path, kind, dtype):
    path = header(tmp_path / "a.safetensors", {"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}, b"1234")
    tensor = open_safetensors(path)["a"]
    assert tensor.dtype == dtype and tensor.nbytes == 4
    np.testing.assert_array_equal(tensor.read().view("uint8"), list(b"1234"))


def test_an_index_is_followed(tmp_path):
    save_file({"a": np.zeros(2, "float32")}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(2, "float32")}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def place(**names):
        index.write_text(json.dumps({"weight_map": names}))
        return open_checkpoint(tmp_path)

    assert sorted(place(a="one.safetensors", b="two.safetensors")) == ["a", "b"]
    with pytest.raises(SourceError, match=r"expected c in two\.safetensors, found no such tensor"):
        place(c="two.safetensors")
    with pytest.raises(SourceError, match=r"three\.safetensors: expected a file of weights, found none"):
        place(a="three.safetensors")
    for outside in ("../one.safetensors", "/tmp/one.safetensors"):
        with pytest.raises(SourceError, match="expected shards inside the folder, found the path"):
            place(a=outside)
    index.write_text("[]")
    with pytest.raises(SourceError, match="expected an index with a weight_map"):
        open_checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"expected model\.safetensors or .* found neither$"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="pickled weights, which llmc never loads"):
        open_checkpoint(tmp_path)


def test_published_experts_are_joined_as_transformers_joins_them(tmp_path, make_model):
    model = make_model("mixtral")
    model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path)
    assert any(".experts.3." in name for name in stored)  # published one by one
    weights, unused = convert(model, stored)
    assert unused == []
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(weights[name].read(), value.numpy())
        np.testing.assert_array_equal(weights[name].read(1, 3), value[1:3].numpy())


class Doubled:
    """A conversion that asks for what no lazy tensor can do."""

    supports_many_to_many = False

    def convert(self, input_dict, target_patterns, **_):
        return {target_patterns[0]: next(iter(input_dict.values()))[0].double()}


def test_an_unknown_conversion_is_refused_by_name(tmp_path, make_model, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    model = make_model("llama")
    model.save_pretrained(tmp_path)
    conversions = [WeightConverter("embed_tokens.weight", "embed_tokens.weight", operations=[Doubled()])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_: conversions)
    with pytest.raises(SourceError, match=r"conversion Doubled needs Tensor\.double, which llmc does not know"):
        convert(model, open_checkpoint(tmp_path))
