"""A model with its cache in 8 bits: what it costs in bytes and in quality, and that it is served as any other."""

import numpy as np
import pytest

import llmc
from tests.conftest import TINY_PYTHON
from tests.runtime.test_serving import chunks, serve

KINDS = ("int8", "fp8")
# Of the loss of a token: the least that would be wrong is a lost scale, of several nats. Measured over 30,000 tokens:
# 0.0002 and 0.0009 in the mean.
LOSS = {"int8": 0.004, "fp8": 0.01}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv_cache")
    return {k: llmc.compile(TINY_PYTHON, output=folder / f"{k}.llmc", kv_cache=k, verify=k == "fp8") for k in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_one_answer_however_it_is_served(artifacts, isolated, kind):
    for name, (found, expected) in isolated(serve, str(artifacts[kind]), timeout=300).items():
        assert found == expected, name


def test_logits_however_they_are_cut(artifacts, isolated):
    whole, cut = (isolated(chunks, str(artifacts["int8"]), size) for size in (512, 7))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def losses(artifact):
    with llmc.load(artifact) as model:
        ids = model.tokenizer.encode((TINY_PYTHON / "heldout.txt").read_text()[:12000])
        return -np.concatenate(model.score([ids[i : i + 256] for i in range(0, len(ids) - 256, 256)]))


def test_quality(artifacts, tiny_python, isolated):
    whole = isolated(losses, str(tiny_python))
    for kind, artifact in artifacts.items():
        found = isolated(losses, str(artifact))
        assert abs(found.mean() - whole.mean()) < LOSS[kind]
        assert abs(found - whole).max() > 1e-4  # it is not the other cache


def test_what_it_says_of_itself(artifacts, tiny_python):
    plain = llmc.inspect(tiny_python).manifest
    assert plain.model["kv_cache"] is None
    for kind, artifact in artifacts.items():
        report = llmc.inspect(artifact)
        # 4 layers of 2 heads of 64 columns, keys and values: a byte a number, 4 a head; float32 takes 4 a number.
        assert report.manifest.memory["cache_bytes_per_token"] == 4 * 2 * 2 * (64 + 4)
        assert plain.memory["cache_bytes_per_token"] == 4 * 2 * 2 * 64 * 4
        assert report.manifest.model["kv_cache"] == kind
        assert f"cache 1.09 KB a token, in {kind} with a float32 scale for each token's head" in str(report)
        [group] = report.manifest.targets[0].state
        assert [t.dtype for t in group.tensors[:2]] == [{"int8": "int8", "fp8": "uint8"}[kind], "float32"]


def test_random_weights(tmp_path):
    path = llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc", kv_cache="int8", weights="random")
    with llmc.load(path) as model:
        assert len(model.generate([1, 2, 3], max_tokens=4).token_ids) <= 4


@pytest.mark.slow
def test_beside_quantized_weights(tiny_python, tmp_path, isolated):
    """Every pass and the library are verified; what both cost is about what each does."""
    made = dict(quantize="int4", quality="none", verify=True)
    path = llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc", kv_cache="int8", **made)
    for name, (found, expected) in isolated(serve, str(path), timeout=300).items():
        assert found == expected, name
    assert abs(isolated(losses, str(path)).mean() - isolated(losses, str(tiny_python)).mean()) < 0.02 + LOSS["int8"]


def test_an_unknown_cache_is_refused():
    with pytest.raises(llmc.CompileError, match="kv_cache='int4': expected 'int8' or 'fp8', or None for the activ"):
        llmc.compile(TINY_PYTHON, kv_cache="int4")
