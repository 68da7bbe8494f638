"""Runs an artifact's compiled functions: binds weights and pages once, passes the tables of a step.

TVM's small runtime libraries are opened by hand and its compiler never is: `import tvm` is not needed, nor done.
"""

import ctypes
import importlib.util
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .artifact import Manifest, RandomWeights, StateGroup, TargetEntry, check, inside
from .dlpack import View
from .errors import ArtifactError
from .weights import ALIGNMENT, DTYPES, Weights

_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which not every Python names


class Table(NamedTuple):
    """The page table of one group in one step, int32; lengths count the tokens this step appends.

    Sequence s has the pages kv_indices[kv_indptr[s]:kv_indptr[s+1]], and kv_last_page_len[s] tokens in the last.
    """

    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    kv_last_page_len: np.ndarray


class Executor(Protocol):
    """The compiled functions of a model, called from one thread only. Page 0 of each group is scratch."""

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
    ) -> np.ndarray:
        """positions [1, n], qo_indptr [b+1], logit_rows [m] i32, a table a group -> logits [m, vocab] float32."""

    def copy_pages(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages within a group, in all its tensors. Sources and targets are disjoint."""

    def close(self) -> None:
        """Let go of pages and weights."""


def aligned(size: int) -> np.ndarray:
    """An int32 array [size] at a multiple of 64 bytes, as compiled code may expect of a tensor."""
    raw = np.zeros(size * 4 + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * 4].view(np.int32)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """The array, at a multiple of 64 bytes: a copy where it is not."""
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def page_bytes(group: StateGroup) -> int:
    """Bytes of one page of a group, over all its tensors."""
    sizes = (int(np.prod(t.shape)) * np.dtype(DTYPES[t.dtype][1]).itemsize for t in group.tensors)
    return sum(sizes)


class CpuExecutor:
    """An artifact's library on this machine's CPU.

    The page pools are reserved without being committed: memory is taken page by page as sequences grow into it.
    """

    def __init__(self, folder: Path, manifest: Manifest, target: TargetEntry, pages: Sequence[int]):
        """Raises ArtifactError: a file is damaged or missing, or the library can't be opened or lacks a function."""
        self.groups, self.pages = target.state, tuple(pages)
        weights = check(folder, manifest, target)
        machine, self._from_dlpack, self._convert = _open(inside(folder, target.library).resolve())
        self._keep: list[Any] = [machine, weights]
        self._arrays: dict[str, np.ndarray] = {}
        self._embed, self._step = _function(machine, target, "embed"), _function(machine, target, "step")
        self._embed_weights = self._bind(weights, target.functions["embed"].weights)
        self._step_weights = self._bind(weights, target.functions["step"].weights)
        groups = [self._reserve(group, count) for group, count in zip(target.state, pages, strict=True)]
        self._group_pages: Any = [self._convert(tensors) for tensors in groups]
        self._all_pages = self._convert([tensor for tensors in groups for tensor in tensors])
        self._copies: Any = [_function(machine, target, f"copy_pages_{i}") for i in range(len(target.state))]
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
            size = int(np.prod(shape)) * np.dtype(DTYPES[tensor.dtype][1]).itemsize
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            memory = mmap.mmap(-1, max(size, 1), flags=flags)
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


def _function(machine: Any, target: TargetEntry, name: str) -> Any:
    try:
        return machine[name]
    except (AttributeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{target.library}: expected a function {name!r}, found none; compile it again") from error


def _open(library: Path) -> tuple[Any, Any, Any]:
    """-> the library's functions by name, tvm_ffi.from_dlpack, tvm_ffi.convert."""
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))  # read once, when the pool starts; TVM's default is half
    with _Without("torch"):
        import tvm_ffi  # here, so that `import llmc` stays quick

    for name in ("libtvm_runtime", "libtvm_runtime_extra"):
        ctypes.CDLL(str(_runtime_folder() / f"{name}{library.suffix}"), ctypes.RTLD_GLOBAL)
    try:
        machine = tvm_ffi.load_module(str(library))["vm_load_executable"]()
    except (AttributeError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{library}: expected a library made by llmc, could not open it: {error}") from error
    # Device 1 (CPU) 0, allocator 1: memory of a step goes back to the C library. TVM's pool (2) keeps one block for
    # every size it has ever seen, and ragged steps have every size.
    machine["vm_initialization"](1, 0, 1)
    return machine, tvm_ffi.from_dlpack, tvm_ffi.convert


class _Without:
    """In this block, this thread finds no package of that name unless it is loaded already.

    tvm_ffi imports torch wherever it is installed, which takes seconds; nothing here needs it.
    """

    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path=None, target=None):
        if name == self._package and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is not wanted here", name=name)

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        sys.meta_path.insert(0, self)

    def __exit__(self, *_) -> None:
        sys.meta_path.remove(self)


def _runtime_folder() -> Path:
    spec = importlib.util.find_spec("tvm")  # finds, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError("expected TVM's runtime libraries, found no package `tvm`; install apache-tvm")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that could be taken now without swapping, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
