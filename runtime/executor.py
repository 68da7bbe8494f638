"""Runs an artifact's compiled functions: what a step is given, and what every executor offers.

The executors themselves are in `devices`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .artifact import StateGroup
from .weights import ALIGNMENT, Spec


class Table(NamedTuple):
    """The page table of one group in one step, int32; lengths count the tokens this step appends.

    Sequence s has the pages kv_indices[kv_indptr[s]:kv_indptr[s+1]], and kv_last_page_len[s] tokens in the last.
    """

    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    kv_last_page_len: np.ndarray


class Draws(NamedTuple):
    """How the token of each row of logits is to be drawn, arrays [m]: see `Sampling`; uniforms are in [0, 1)."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniforms: np.ndarray


class Executor(Protocol):
    """The compiled functions of a model, called from one thread only. Page 0 of each group is scratch.

    samples: whether `sample` may be called; where logits are in this process's memory anyway, it may not.
    """

    @property
    def samples(self) -> bool: ...

    @property
    def groups(self) -> Sequence[StateGroup]:
        """The state groups, in the order of the tables."""

    @property
    def pages(self) -> Sequence[int]:
        """How many pages each group has, the scratch page included."""

    def embed(self, tokens: np.ndarray) -> Any:
        """tokens [n] i32 -> hidden [n, w], of whatever kind `step` takes."""

    def step(
        self, hidden: Any, positions: np.ndarray, qo_indptr: np.ndarray, logit_rows: np.ndarray, tables: Sequence[Table]
    ) -> Any:
        """positions [1, n], qo_indptr [b+1], logit_rows [m] i32, a table a group -> logits [m, vocab] float32, of
        whatever kind `sample` and `fetch` take; they hold until the next step."""

    def sample(self, logits: Any, draws: Draws) -> np.ndarray:
        """Logits of a step and how to draw from their rows -> tokens [m] i32, -1 where logits are no numbers."""

    def fetch(self, logits: Any) -> np.ndarray:
        """Logits of a step as an array [m, vocab] float32."""

    def copy_pages(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages within a group, in all its tensors. Sources and targets are disjoint."""

    def close(self) -> None:
        """Let go of pages and weights."""


class HostLogits:
    """The part of an executor whose logits are arrays of this process anyway: `runtime.sampler` draws from them."""

    samples = False

    def sample(self, logits: np.ndarray, draws: Draws) -> np.ndarray:
        raise NotImplementedError("logits are in this process's memory: runtime.sampler draws from them")

    def fetch(self, logits: np.ndarray) -> np.ndarray:
        return logits


def aligned(size: int) -> np.ndarray:
    """An int32 array [size] of zeros at a multiple of 64 bytes, as compiled code may expect of a tensor."""
    array = _aligned_bytes(size * 4).view(np.int32)
    array[:] = 0
    return array


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """The array, at a multiple of 64 bytes: a copy where it is not."""
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = _aligned_bytes(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _aligned_bytes(size: int) -> np.ndarray:
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def page_bytes(group: StateGroup) -> int:
    """Bytes of one page of a group, over all its tensors."""
    return sum(Spec(t.shape, t.dtype).bytes for t in group.tensors)
