"""The executor of a GPU: weights and pages lie in the device's memory, tables are sent there at every step."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..artifact import Manifest, TargetEntry, check, inside
from ..dlpack import CPU, View
from ..errors import ArtifactError, RequestError
from ..executor import Draws, Table, aligned, aligned_copy, page_bytes
from ..libraries import ffi, function, open_library, open_runtime
from ..weights import DTYPES, Spec
from . import drivers, graphs, pages_of, token_bytes

__all__ = ["GpuExecutor", "open_backend"]

DEVICE_TYPES = {"cuda": 2, "metal": 8, "rocm": 10}  # DLDeviceType
POOLED = 2  # TVM's allocator that keeps buffers: those of a step have the same sizes every time
TOTAL_MEMORY, FREE_MEMORY = 14, 15  # tvm/runtime/device_api.h, DeviceAttrKind
SHARE = 0.9  # of the free memory that is taken where nobody says how much
APART = 256  # bytes between tables that are sent together: what drivers align tensors to
PLUGINS = "llmc.runtime_backends"


def open_backend(kind: str) -> None:
    """Make TVM's runtime know a kind of device: its own library, or a plugin of the entry-point group.

    Raises ArtifactError: there is none, or it can't be opened here.
    """
    tvm_ffi = ffi()
    if tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is not None:
        return
    plugins = [p for p in entry_points(group=PLUGINS) if p.name == kind]
    if plugins:
        plugins[0].load()()
    elif kind == "rocm":
        raise ArtifactError("no HIP runtime for TVM is installed: pip install 'llmc[rocm-runtime]'")
    else:
        if kind == "cuda":
            _open_cudart()
        try:
            open_runtime(f"libtvm_runtime_{kind}")
        except OSError as error:
            raise ArtifactError(f"TVM's {kind} runtime can't be opened: {error}") from error
    if tvm_ffi.get_global_func(f"device_api.{kind}", allow_missing=True) is None:
        raise ArtifactError(f"TVM's {kind} runtime was opened and brings no device of that kind")


def _open_cudart() -> None:
    """libcudart.so.13 of the package nvidia-cuda-runtime, where there is one; else the loader looks for its own."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(folder) / "cu13" / "lib" / "libcudart.so.13"
        if library.exists():
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class GpuExecutor:
    """An artifact's library on one of this machine's GPUs.

    Weights are sent once, and one that several functions take is there once. The page pools are set aside when the
    executor is made. What a step needs travels in one piece where the driver lets tensors begin anywhere in memory.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: TargetEntry,
        *,
        cache_tokens: int | None = None,
        device: int = 0,
        batch_invariant: bool = False,
        machine: Any = None,
        driver: graphs.CudaDriver | None = None,
    ):
        """batch_invariant: run the functions whose sums are in one order, whatever else is in the step. machine: the
        library's functions by name, if somebody else has opened it; driver: of CUDA's graphs, None: there are none.

        Raises ArtifactError: damaged, a library that can't be opened, a model too large for the device's memory;
        RequestError: no device of that number, or batch_invariant where the library has no such functions.
        """
        self.groups = target.state
        uses = {f: chosen(target, f, batch_invariant) for f in ("embed", "step")}
        weights = check(folder, manifest, target)
        self._device = (DEVICE_TYPES[target.kind], device)
        if machine is None:
            there = len(drivers.cards(target.kind))
            if not 0 <= device < there:
                raise RequestError(f"device: expected one of 0 … {there - 1}, found {device!r}")
            open_backend(target.kind)
            machine = open_library(inside(folder, target.library), self.devices)
            driver = graphs.CudaDriver() if target.kind == "cuda" and graphs.wanted() else None
        else:
            machine["vm_initialization"](*self.devices)
        self._runtime = _Runtime(self._device, views=target.kind != "metal")
        names = list(dict.fromkeys(name for f in uses.values() for name in target.functions[f].weights))
        specs = {name: Spec(*weights.specs[name]) for name in names}
        longest, vocabulary = (int(manifest.model[fact]) for fact in ("max_context", "vocab_size"))
        needed = {
            "weights": sum(spec.bytes for spec in specs.values()),
            "a step": int(manifest.memory.get("intermediate_bytes", 0)),
        }
        if driver is not None:
            needed["CUDA graphs"] = graphs.needed_bytes(self.groups, longest, vocabulary)
        self.pages = tuple(self._fit(manifest, target, needed, cache_tokens))
        held = {name: self._runtime.send(weights[name], specs[name]) for name in names}
        convert = ffi().convert
        self._weights: Any = {
            f: convert([held[name] for name in target.functions[use].weights]) for f, use in uses.items()
        }
        pools = [
            [self._runtime.empty((count, *t.shape), t.dtype) for t in group.tensors]
            for group, count in zip(target.state, self.pages, strict=True)
        ]
        self._group_pages: Any = [convert(tensors) for tensors in pools]
        self._all_pages: Any = convert([tensor for tensors in pools for tensor in tensors])
        self._embed, self._step = (function(machine, target, use) for use in uses.values())
        self._copies: Any = [function(machine, target, f"copy_pages_{i}") for i in range(len(target.state))]
        self._sample: Any = function(machine, target, "sample") if "sample" in target.functions else None
        self._machine = machine
        self._graphs: graphs.Graphs | None = None
        if driver is not None:
            self._graphs = graphs.Graphs(self._runtime, driver, self.groups, longest, self._decode)
        self._first_row = aligned(1)

    @property
    def devices(self) -> tuple[int, ...]:
        """For the virtual machine: the GPU with buffers kept, the CPU with buffers given back."""
        return (*self._device, POOLED, CPU, 0, 1)

    def _fit(
        self, manifest: Manifest, target: TargetEntry, needed: dict[str, int], cache_tokens: int | None
    ) -> list[int]:
        """Pages of each group, such that all that is predicted fits the device's free memory."""
        free, total = self._runtime.memory()
        each = token_bytes(target.state)
        if cache_tokens is None:
            if free is None:
                raise ArtifactError(
                    f"{target.target}: the driver does not tell how much memory is free: give cache_tokens"
                )
            # One page of every group is scratch.
            left = SHARE * free - sum(needed.values()) - sum(map(page_bytes, target.state))
            cache_tokens = max(int(left / each), target.state[0].page_size)
        pages = pages_of(target.state, cache_tokens)
        cache = sum(page_bytes(g) * count for g, count in zip(target.state, pages, strict=True))
        needed = needed | {f"a cache of {cache_tokens} tokens": cache}
        if free is not None and sum(needed.values()) > free:
            parts = " + ".join(f"{gigabytes(size)} for {what}" for what, size in needed.items())
            raise ArtifactError(
                f"{manifest.name} does not fit the device's memory: {parts} = {gigabytes(sum(needed.values()))}, "
                f"free: {gigabytes(free)} of {gigabytes(total or free)}; lower cache_tokens, or use a smaller model"
            )
        return pages

    def embed(self, tokens: np.ndarray) -> Any:
        if self._graphs is not None and not self._graphs.refused:
            return Tokens(tokens)  # a graph embeds them itself
        return self._embedded(tokens)

    def _embedded(self, tokens: np.ndarray) -> Any:
        return self._embed(*self._runtime.place("embed", [tokens]), self._weights["embed"])

    def step(
        self, hidden: Any, positions: np.ndarray, qo_indptr: np.ndarray, logit_rows: np.ndarray, tables: Sequence[Table]
    ) -> tuple[Any, int]:
        """-> the device's tensor, and how many of its rows were asked for."""
        if isinstance(hidden, Tokens):
            assert self._graphs is not None
            logits = self._graphs.step(hidden.tokens, positions, qo_indptr, logit_rows, tables)
            if logits is not None:
                return logits, len(logit_rows)
            hidden = self._embedded(hidden.tokens)
        rows = len(logit_rows)  # compiled code takes no empty tensor: ask for a row then, and drop it
        asked = logit_rows if rows else self._first_row
        placed = self._runtime.place(
            "step", [positions, qo_indptr, asked, *(array for table in tables for array in table)]
        )
        return self._step(hidden, *placed, self._all_pages, self._weights["step"]), rows

    def _decode(self, tensors: Sequence[Any]) -> Any:
        """The launches of a decoding step, over tensors of the device -> logits."""
        tokens, *rest = tensors
        hidden = self._embed(tokens, self._weights["embed"])
        return self._step(hidden, *rest, self._all_pages, self._weights["step"])

    def fetch(self, logits: tuple[Any, int]) -> np.ndarray:
        tensor, rows = logits
        return self._runtime.fetch(tensor)[:rows]

    @property
    def samples(self) -> bool:
        return self._sample is not None

    def sample(self, logits: tuple[Any, int], draws: Draws) -> np.ndarray:
        tensor, rows = logits
        if not rows:
            return np.empty(0, np.int32)
        placed = self._runtime.place("sample", list(draws))
        return self._runtime.fetch(self._sample(tensor, *placed))

    def copy_pages(self, group: int, source: Sequence[int], target: Sequence[int]) -> None:
        pairs = aligned(len(source)), aligned(len(target))
        pairs[0][:], pairs[1][:] = source, target
        self._copies[group](*self._runtime.place("copy_pages", pairs), self._group_pages[group])

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._weights = self._all_pages = self._group_pages = None
        self._embed = self._step = self._sample = self._copies = self._machine = None
        self._runtime.close()


class Tokens(NamedTuple):
    """What `embed` gives where a graph may take the whole step."""

    tokens: np.ndarray


class _Runtime:
    """Memory and streams of one device, by the functions that TVM's runtime registers.

    views: a tensor may begin anywhere in a piece of memory; otherwise every tensor has a piece of its own (Metal, whose
    memory is named by handles).
    """

    def __init__(self, device: tuple[int, int], *, views: bool):
        tvm_ffi = ffi()
        self.ffi, self.device, self.views = tvm_ffi, device, views
        find = tvm_ffi.get_global_func
        self._allocate = find("runtime.TVMTensorAllocWithScope")
        self._from_bytes, self._to_bytes = find("runtime.TVMTensorCopyFromBytes"), find("runtime.TVMTensorCopyToBytes")
        self._attribute = find("runtime.GetDeviceAttr")
        self._pieces: dict[str, list[tuple[Any, int]]] = {}  # of tables: tensor, its bytes
        self._sent: dict[str, list[View]] = {}

    def memory(self) -> tuple[int | None, int | None]:
        """Free and total bytes of the device; None where its driver does not tell."""
        free, total = (self._attribute(*self.device, kind) for kind in (FREE_MEMORY, TOTAL_MEMORY))
        return free or total or None, total or None

    def empty(self, shape: Iterable[int], dtype: str) -> Any:
        """A tensor that nothing has written."""
        device = self.ffi.Device(*self.device)
        return self._allocate(self.ffi.Shape(tuple(shape)), self.ffi.dtype(dtype), device, None)

    def send(self, array: np.ndarray, spec: Spec) -> Any:
        """A tensor with an array's bytes."""
        tensor = self.empty(spec.shape, spec.dtype)
        self._copy(tensor, np.ascontiguousarray(array))
        return tensor

    def _copy(self, tensor: Any, array: np.ndarray) -> None:
        self._from_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def place(self, use: str, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Arrays of int32 or float32 as tensors of the device, until the next call for the same use."""
        arrays = [aligned_copy(a) for a in arrays]
        ends = np.cumsum([-(-max(a.nbytes, 1) // APART) * APART for a in arrays])
        if not self.views:
            return [self._alone(f"{use} {i}", a) for i, a in enumerate(arrays)]
        piece = self._piece(use, int(ends[-1]))
        whole = aligned(int(ends[-1]) // 4)
        views = []
        for array, end in zip(arrays, [0, *ends[:-1]], strict=True):
            whole[end // 4 : end // 4 + array.size] = array.reshape(-1).view(np.int32)
            views.append(View(piece.data_ptr() + int(end), array.shape, array.dtype.name, self.device))
        self._copy_part(piece, whole)
        self._sent[use] = views
        return [self.ffi.from_dlpack(view) for view in views]

    def _alone(self, use: str, array: np.ndarray) -> Any:
        piece = self._piece(use, max(array.nbytes, 4))
        self._copy_part(piece, array)
        view = View(piece.data_ptr(), array.shape, array.dtype.name, self.device)
        self._sent[use] = [view]
        return self.ffi.from_dlpack(view)

    def _piece(self, use: str, size: int) -> Any:
        """Memory of at least `size` bytes that a use keeps from step to step."""
        held = self._pieces.get(use)
        if held is None or held[0][1] < size:
            held = self._pieces[use] = [(self.empty((max(size // 2, 1024),), "int32"), 4 * max(size // 2, 1024))]
        return held[0][0]

    def _copy_part(self, piece: Any, array: np.ndarray) -> None:
        """The array to the beginning of a piece."""
        view = View(piece.data_ptr(), (array.size,), array.dtype.name, self.device)
        self._copy(self.ffi.from_dlpack(view), np.ascontiguousarray(array))

    def write(self, tensor: Any, start: int, array: np.ndarray) -> None:
        """An array of int32 to a tensor of int32, from its element `start` on."""
        view = View(tensor.data_ptr() + 4 * start, (array.size,), "int32", self.device)
        self._copy(self.ffi.from_dlpack(view), array)

    def open_stream(self) -> int:
        """A new stream, to which this thread's launches go from now on."""
        device, find = self.ffi.Device(*self.device), self.ffi.get_global_func
        stream = find("runtime.Device_StreamCreate")(device)
        find("runtime.Device_SetStream")(device, stream)
        return stream

    def wait(self, stream: int) -> None:
        """Until all that was put on a stream is done."""
        self.ffi.get_global_func("runtime.Device_StreamSync")(self.ffi.Device(*self.device), stream)

    def close_stream(self, stream: int) -> None:
        device, find = self.ffi.Device(*self.device), self.ffi.get_global_func
        find("runtime.Device_SetStream")(device, 0)
        find("runtime.Device_StreamFree")(device, stream)

    def fetch(self, tensor: Any) -> np.ndarray:
        """A tensor's numbers; waits for what computes them."""
        shape, dtype = tuple(int(d) for d in tensor.shape), str(tensor.dtype)
        array = np.empty(shape, DTYPES[dtype][1])
        self._to_bytes(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def close(self) -> None:
        self._pieces.clear()
        self._sent.clear()


def chosen(target: TargetEntry, function: str, batch_invariant: bool) -> str:
    """The function of a library that is to run. Raises RequestError: its sums depend on what else is in the step."""
    if not batch_invariant:
        return function
    if "step_invariant" not in target.functions:
        raise RequestError(
            f"batch_invariant: {target.target} has kernels that sum in an order that depends on the number of rows, "
            "and no others; leave it out, compile the model again with this llmc, or load the artifact's cpu target"
        )
    return f"{function}_invariant" if f"{function}_invariant" in target.functions else function


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
