"""The executor of a CPU: weights and pages are memory of the process, and tables are passed where they lie."""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Manifest, StateGroup, TargetEntry, Weights, check, inside
from ..dlpack import CPU, View
from ..executor import HostLogits, Table, aligned, aligned_copy
from ..libraries import ffi, function, open_library
from ..random_weights import RandomWeights
from ..weights import Spec

_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which not every Python names


class CpuExecutor(HostLogits):
    """An artifact's library on this machine's CPU.

    The page pools are reserved without being committed: memory is taken page by page as sequences grow into it.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: TargetEntry, pages: Sequence[int]):
        """Raises ArtifactError: a file is damaged or missing, or the library can't be opened or lacks a function."""
        self.groups, self.pages = target.state, tuple(pages)
        weights = check(folder, manifest, target)
        tvm_ffi = ffi()
        self._from_dlpack, self._convert = tvm_ffi.from_dlpack, tvm_ffi.convert
        # Allocator 1: memory of a step goes back to the C library. TVM's pool (2) keeps one block for every size it
        # has ever seen, and ragged steps have every size.
        machine = open_library(inside(folder, target.library), (CPU, 0, 1))
        self._keep: list[Any] = [machine, weights]
        self._arrays: dict[str, np.ndarray] = {}
        self._embed, self._step = function(machine, target, "embed"), function(machine, target, "step")
        self._embed_weights = self._bind(weights, target.functions["embed"].weights)
        self._step_weights = self._bind(weights, target.functions["step"].weights)
        groups = [self._reserve(group, count) for group, count in zip(target.state, pages, strict=True)]
        self._group_pages: Any = [self._convert(tensors) for tensors in groups]
        self._all_pages = self._convert([tensor for tensors in groups for tensor in tensors])
        self._copies: Any = [function(machine, target, f"copy_pages_{i}") for i in range(len(target.state))]
        self._first_row = aligned(1)

    def _view(self, array_or_address: Any, shape: Sequence[int], dtype: str) -> Any:
        view = View(array_or_address, shape, dtype)
        self._keep.append(view)
        return self._from_dlpack(view)

    def _bind(self, weights: Weights | RandomWeights, names: Sequence[str]) -> Any:
        arrays = [self._weight(weights, name) for name in names]
        return self._convert([self._view(a.ctypes.data, *weights.specs[n]) for a, n in zip(arrays, names, strict=True)])

    def _weight(self, weights: Weights | RandomWeights, name: str) -> np.ndarray:
        """A weight's memory, one for all functions that take it."""
        if name not in self._arrays:
            self._arrays[name] = aligned_copy(weights[name]) if isinstance(weights, RandomWeights) else weights[name]
        return self._arrays[name]

    def _reserve(self, group: StateGroup, pages: int) -> list[Any]:
        tensors = []
        for tensor in group.tensors:
            shape = (pages, *tensor.shape)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            memory = mmap.mmap(-1, max(Spec(shape, tensor.dtype).bytes, 1), flags=flags)
            self._keep.append(memory)
            tensors.append(self._view(ctypes.addressof(ctypes.c_char.from_buffer(memory)), shape, tensor.dtype))
        return tensors

    def embed(self, tokens: np.ndarray) -> Any:
        return self._embed(self._from_dlpack(tokens), self._embed_weights)

    def step(
        self, hidden: Any, positions: np.ndarray, qo_indptr: np.ndarray, logit_rows: np.ndarray, tables: Sequence[Table]
    ) -> np.ndarray:
        tensor = self._from_dlpack
        rows = len(logit_rows)  # compiled code takes no empty tensor: ask for a row then, and drop it
        logits = self._step(
            hidden,
            tensor(positions),
            tensor(qo_indptr),
            tensor(logit_rows if rows else self._first_row),
            *[tensor(array) for table in tables for array in table],
            self._all_pages,
            self._step_weights,
        )
        logits = np.from_dlpack(logits)
        return logits if rows else logits[:0]

    def copy_pages(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        pairs = aligned(len(source)), aligned(len(target))
        pairs[0][:], pairs[1][:] = source, target
        self._copies[group](self._from_dlpack(pairs[0]), self._from_dlpack(pairs[1]), self._group_pages[group])

    def close(self) -> None:
        self._embed_weights = self._step_weights = self._all_pages = self._group_pages = None
        self._embed = self._step = self._copies = None
        self._keep.clear()
        self._arrays.clear()


def available_bytes() -> int:
    """Memory that could be taken now without swapping, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
