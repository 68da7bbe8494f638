"""The tables of a cache in 8 bits, on a small text and a short context."""

from llmc.bench import kv_cache
from tests.conftest import TINY_PYTHON


def short_attention():
    return kv_cache.attention(40, 4, 2, 16, layers=1, rounds=1)


def test_attention_is_timed_over_every_cache(isolated):
    rows = [line.split("|")[1].strip() for line in isolated(short_attention) if line.startswith("| ")][1:]
    assert rows == ["float32, float32", "bfloat16, bfloat16", "float32, int8", "float32, fp8"]


def test_quality_of_every_cache(monkeypatch, tiny_python):
    """All of one artifact here: no change."""
    monkeypatch.setattr(kv_cache.llmc, "compile", lambda *_, **__: tiny_python)
    rows = kv_cache.quality(str(TINY_PYTHON), (TINY_PYTHON / "heldout.txt").read_text()[:8000], 1024)[4:]
    assert [row.split("|")[1].strip() for row in rows] == ["float32", "int8", "fp8"]
    assert all("| +0.0000% | 0.0000 |" in row for row in rows)
