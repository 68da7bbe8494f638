"""The judge of the sweep, and the ways in which it runs a model, on an executor made of numpy."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from llmc.bench import comparison
from llmc.runtime.executor import HostLogits


def rows(*values):
    return [np.array([[v, 0.0]], np.float32) for v in values]


def test_error_is_the_largest_in_units_of_the_spread():
    assert comparison.error(rows(1.0, 2.5), rows(1.0, 2.0), 0.25) == 2.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_never_passes(value):
    found = comparison.error(rows(1.0, value), rows(1.0, value), 1.0)
    assert found is None
    assert comparison.verdict({"ragged": found}) == "wrong"


def test_a_missing_row_never_passes():
    assert comparison.error(rows(1.0), rows(1.0, 2.0), 1.0) is None


def test_verdict():
    assert comparison.verdict({"ragged": 1e-4, "decode": 0.0}) == "pass"
    assert comparison.verdict({"ragged": 0.0, "decode": 1.1e-4}) == "wrong"


@pytest.mark.parametrize(
    ("position", "window", "chunk", "first"),
    [(20, 0, 0, 0), (20, 9, 0, 12), (3, 9, 0, 0), (20, 0, 8, 16), (7, 0, 8, 0)],
)
def test_first_visible(position, window, chunk, first):
    assert comparison.first_visible(position, window, chunk) == first


@dataclass
class Group:
    page_size: int = 4
    window: int = 0
    chunk: int = 0


class Paged(HostLogits):
    """Logits: the sum of all tokens that a row sees, read back through the page tables."""

    def __init__(self, group):
        self.groups, self.pages = [group], [40]
        self.cache = np.full((40, group.page_size), np.nan)
        self.cache[0] = 1e9  # scratch: whoever reads it is wrong
        self.steps = []

    def embed(self, tokens):
        return tokens

    def step(self, hidden, positions, qo_indptr, logit_rows, tables):
        group, table = self.groups[0], tables[0]
        out = []
        for s in range(len(qo_indptr) - 1):
            pages = table.kv_indices[table.kv_indptr[s] : table.kv_indptr[s + 1]]
            length = (len(pages) - 1) * group.page_size + table.kv_last_page_len[s]
            new = range(qo_indptr[s], qo_indptr[s + 1])
            assert positions[0, new].tolist() == list(range(length - len(new), length))
            for row in new:
                position = positions[0, row]
                self.cache[pages[position // group.page_size], position % group.page_size] = hidden[row]
            for row in new:
                seen = range(
                    comparison.first_visible(positions[0, row], group.window, group.chunk), positions[0, row] + 1
                )
                out.append([sum(self.cache[pages[p // group.page_size], p % group.page_size] for p in seen), 0.0])
        self.steps.append(np.diff(qo_indptr).tolist())
        return np.array(out, np.float32)[logit_rows]


def wanted(ids, group):
    return [
        np.array([[sum(t[comparison.first_visible(i, group.window, group.chunk) : i + 1]), 0.0] for i in range(len(t))])
        for t in ids
    ]


@pytest.mark.parametrize("way", [comparison.chunked, comparison.decoded])
@pytest.mark.parametrize("group", [Group(), Group(window=5), Group(chunk=4), Group(chunk=6)])
def test_ways_serve_every_token_once(way, group):
    ids = [np.arange(1, n + 1) for n in (1, 2, 9, 14)]
    executor = Paged(group)
    sequences = comparison.Sequences(executor)
    got = way(sequences, ids)
    assert comparison.error(got, wanted(ids, group), 1.0) < 1e-6
    assert sum(map(sum, executor.steps)) == 26
    assert any(len(step) > 1 for step in executor.steps)
    held = [page for pages in sequences.tables[0].values() for page in pages if page]
    assert len(set(held)) == len(held)
    assert sorted(held + sequences.free[0]) == list(range(1, 40))


def test_decoding_ends_with_single_tokens():
    executor = Paged(Group())
    comparison.decoded(comparison.Sequences(executor), [np.arange(9), np.arange(4)])
    assert executor.steps == [[4, 2], [1, 1], [1, 1], [1], [1], [1]]


def test_a_model_is_written_anew_when_its_config_changes(monkeypatch, tmp_path):
    folder = comparison.model_folder("llama", tmp_path)
    written = (folder / "facts.json").stat().st_mtime_ns
    assert comparison.model_folder("llama", tmp_path) == folder
    assert (folder / "facts.json").stat().st_mtime_ns == written
    monkeypatch.setitem(comparison.configs.OWN, "llama", {"hidden_size": 48})
    comparison.model_folder("llama", tmp_path)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 48
