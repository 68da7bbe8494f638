"""A model in numpy that lives in the page pool alone, so that every paging mistake changes its answers.

Integers mod a prime, so it is exact whatever the batch. Three layers, one a group: full attention, a window, chunks. A
layer writes a value a token into its pages and sums the visible ones, each times its position; the next layer's value
is mixed from that sum, so what one page holds reaches every later token.
"""

import threading
from dataclasses import dataclass, field

import numpy as np

from llmc.runtime.artifact import Manifest, StateGroup, StateTensor, WeightsEntry
from llmc.runtime.engine import Engine
from llmc.runtime.model import Model

PRIME = 1_000_003
VOCAB = 260
PAGE = 4


def group(layer, window=0, chunk=0, page_size=PAGE):
    return StateGroup("paged", page_size, window, chunk, (layer,), (StateTensor(f"v_{layer}", (page_size,), "int64"),))


GROUPS = (group(0), group(1, window=6), group(2, chunk=10))


def first_visible(group, position):
    """Written here again, so that the runtime's own is checked."""
    candidates = [0]
    if group.window:
        candidates.append(position - group.window + 1)
    if group.chunk:
        candidates.append(position - position % group.chunk)
    return max(candidates)


def attend(values, positions):
    return int((values * (positions + 1)).sum() % PRIME)


def mix(value, attended):
    return (value * 31 + attended * 17 + 7) % PRIME


_SPREAD = (np.arange(1, VOCAB + 1, dtype=np.int64) * 7919) % PRIME


def logits_of(state):
    return ((state * _SPREAD) % PRIME % 1009 / 100).astype(np.float32)


def reference_logits(tokens, groups=GROUPS):
    """Logits [n, vocab] of a sequence by itself, without pages."""
    values = [np.zeros(len(tokens), np.int64) for _ in groups]
    rows = []
    for p, token in enumerate(tokens):
        x = int(token) * 13 + p + 1
        for g, one in enumerate(groups):
            values[g][p] = x
            j = np.arange(first_visible(one, p), p + 1)
            x = mix(x, attend(values[g][j], j))
        rows.append(logits_of(x))
    return np.stack(rows)


@dataclass
class FakeExecutor:
    """An Executor. pages: of each group, the scratch page included."""

    pages: tuple[int, ...]
    groups: tuple[StateGroup, ...] = GROUPS
    steps: list = field(default_factory=list)  # (tokens, sequences) of each
    copied: int = 0
    fail_at: int | None = None  # raise in this step
    hold: threading.Event | None = None  # each step waits for it
    closed: bool = False
    samples: bool = False  # it draws tokens too: those of the best logit

    def __post_init__(self):
        # A page that was never written is full of what no token is.
        self.pools = [
            np.full((n, g.page_size), 424_242, np.int64) for n, g in zip(self.pages, self.groups, strict=True)
        ]
        self.thread = None
        self.fetched = 0

    def embed(self, tokens):
        assert self.thread in (None, threading.get_ident()), "compiled code was called from two threads"
        self.thread = threading.get_ident()
        assert tokens.dtype == np.int32
        return tokens.astype(np.int64) * 13 + 1

    def step(self, hidden, positions, qo_indptr, logit_rows, tables):
        if self.hold is not None:
            assert self.hold.wait(30)
        self.steps.append((len(hidden), len(qo_indptr) - 1))
        if self.fail_at == len(self.steps):
            raise RuntimeError("the step went wrong")
        arrays = [positions, qo_indptr, logit_rows, *(a for t in tables for a in t)]
        assert all(a.dtype == np.int32 and a.ctypes.data % 64 == 0 for a in arrays)
        assert positions.shape == (1, len(hidden)) and qo_indptr[0] == 0 and qo_indptr[-1] == len(hidden)
        x = hidden + positions[0]
        for g, group in enumerate(self.groups):
            x = self._layer(g, group, x, positions[0], qo_indptr, tables[g])
        return (
            np.stack([logits_of(int(x[r])) for r in logit_rows])
            if len(logit_rows)
            else np.zeros((0, VOCAB), np.float32)
        )

    def fetch(self, logits):
        self.fetched += 1
        return logits

    def sample(self, logits, draws):
        """Whatever is drawn by whom, the token is told from its number: the best, moved by the share."""
        assert all(len(column) == len(logits) for column in draws)
        best = logits.argmax(1)
        return np.where(draws.temperature == 0, best, (best + (draws.uniforms * VOCAB).astype(int)) % VOCAB).astype(
            "i4"
        )

    def _layer(self, g, group, x, positions, qo_indptr, table):
        pool, size, lengths = self.pools[g], group.page_size, []
        for s in range(len(qo_indptr) - 1):  # every sequence appends before any attends, as compiled code does
            mine = table.kv_indices[table.kv_indptr[s] : table.kv_indptr[s + 1]]
            length = (len(mine) - 1) * size + int(table.kv_last_page_len[s])
            assert 1 <= table.kv_last_page_len[s] <= size
            lengths.append((mine, length))
            rows = range(qo_indptr[s], qo_indptr[s + 1])
            for i, row in enumerate(rows):
                p = length - len(rows) + i
                assert positions[row] == p, "a position does not agree with the cache's length"
                assert mine[p // size] != 0, "a token is written to the scratch page"
                pool[mine[p // size], p % size] = x[row]
        out = np.empty_like(x)
        for s, (mine, _) in enumerate(lengths):
            for row in range(qo_indptr[s], qo_indptr[s + 1]):
                p = int(positions[row])
                j = np.arange(first_visible(group, p), p + 1)
                assert (mine[j // size] != 0).all(), "a visible token's page was given away"
                out[row] = mix(int(x[row]), attend(pool[mine[j // size], j % size], j))
        return out

    def copy_pages(self, group, source, target):
        assert not set(source) & set(target) and 0 not in target
        self.copied += len(source)
        self.pools[group][list(target)] = self.pools[group][list(source)]

    def close(self):
        self.closed = True


def fake_model(cache_tokens=4096, *, groups=GROUPS, context=400, tokenizer=None, eos=(), engine=None, **executor):
    """A Model on a FakeExecutor."""
    pages = tuple(-(-cache_tokens // g.page_size) + 1 for g in groups)
    manifest = Manifest(
        name="fake",
        model={"vocab_size": VOCAB, "max_context": context},
        targets=(),
        weights=WeightsEntry("weights.safetensors", "", {}),
    )
    runs = Engine(FakeExecutor(pages, groups, **executor), **(engine or {}))
    return Model(manifest, runs, tokenizer, tuple(eos))
