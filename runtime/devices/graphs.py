"""CUDA graphs: the launches of a decoding step, recorded once for a number of sequences, later started as one.

A graph keeps every address and every grid that it was recorded with. So tables lie in memory of their own, at places
that the number of sequences alone decides, and are written there before a graph starts; a step of fewer sequences than
a graph has is filled up with ones that write to the scratch page; and logits are copied to memory of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..artifact import StateGroup
from ..dlpack import View
from ..executor import Table, aligned

__all__ = ["CudaDriver", "GraphError", "Graphs", "needed_bytes", "wanted"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # sequences for which there is a graph
APART = 256 // 4  # int32 numbers between arrays: what drivers align tensors to
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do breaks no recording
WARM = 2  # runs of every size before the first is recorded
DEFAULT_STREAM = None  # what plain launches go to

# launch(tokens [n], positions [1, n], qo_indptr [n+1], logit_rows [n], tables…), tensors of the device -> logits [n, v]
Launch = Callable[[Sequence[Any]], Any]


class GraphError(RuntimeError):
    """The driver refused something."""


def wanted() -> bool:
    """LLMC_CUDA_GRAPHS=0 says that there are to be no graphs."""
    return os.environ.get("LLMC_CUDA_GRAPHS", "1") != "0"


def needed_bytes(groups: Sequence[StateGroup], max_context: int, vocabulary: int) -> int:
    """Memory of the device that graphs set aside: tables and logits of the most sequences. What the driver keeps of
    a recording, it does not tell.
    """
    tables = _layout(_pages(groups, max_context), BUCKETS[-1])[-1][1]
    return 4 * (tables + BUCKETS[-1] * vocabulary)


def _pages(groups: Sequence[StateGroup], max_context: int) -> list[int]:
    """Of each group, the pages of the longest sequence."""
    return [-(-max_context // group.page_size) for group in groups]


def _layout(pages: Sequence[int], bucket: int) -> list[tuple[tuple[int, ...], int]]:
    """Shape and end of every array, in numbers of 4 bytes: those of fixed size first, then each group's pages."""
    fixed = [(bucket,), (1, bucket), (bucket + 1,), (bucket,)]
    fixed += [shape for _ in pages for shape in ((bucket + 1,), (bucket,))]
    places, end = [], 0
    for shape in [*fixed, *((bucket * count,) for count in pages)]:
        end += -(-int(np.prod(shape)) // APART) * APART
        places.append((shape, end))
    return places


class CudaDriver:
    """The functions of NVIDIA's driver that graphs need (CUDA Driver API, "Graph Management"). Raises GraphError."""

    def __init__(self, library: ctypes.CDLL | None = None):
        """library: NVIDIA's, by default. OSError: there is none."""
        self._library = library or ctypes.CDLL("libcuda.so.1")

    def begin(self, stream: int) -> None:
        """From now on this thread's launches on a stream are recorded, and not run."""
        self._call("cuStreamBeginCapture_v2", _handle(stream), THREAD_LOCAL)

    def end(self, stream: int) -> int:
        """What was recorded, ready to start."""
        graph, started = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", _handle(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(started), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return started.value or 0

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Bytes of the device's memory, in the order of the stream."""
        self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size),
                   _handle(stream))  # fmt: skip

    def start(self, graph: int) -> None:
        self._call("cuGraphLaunch", _handle(graph), DEFAULT_STREAM)

    def drop(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", _handle(graph))

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(error, ctypes.byref(text))
            raise GraphError(f"{name}: {(text.value or b'unknown error').decode()} ({error})")


def _handle(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


class Graphs:
    """The graphs of one executor, recorded at its first decoding step.

    They are recorded on a thread and a stream of their own. TVM keeps workspaces by thread and frees one that is too
    small for a larger: what a graph holds must never be freed, and this thread runs nothing but these steps, each of
    them WARM times before the first is recorded, so that its workspaces have grown as far as they will. All other
    memory of a step has one size whatever the step brings, and is there after the first.

    The first time that a graph starts, its logits are compared with those of plain launches over the same tables, bit
    by bit. Where they differ, or where the driver refuses something, there are no graphs from then on, with a warning.
    """

    def __init__(
        self, runtime: Any, driver: CudaDriver, groups: Sequence[StateGroup], max_context: int, launch: Launch
    ):
        """runtime: of the device's memory (`gpu._Runtime`). max_context: tokens of the longest sequence."""
        self._runtime, self._driver, self._launch = runtime, driver, launch
        self._pages = _pages(groups, max_context)
        self._places = {bucket: _layout(self._pages, bucket) for bucket in BUCKETS}
        self._tables = aligned(self._places[BUCKETS[-1]][-1][1])  # as they are sent
        self._graphs: dict[int, int] = {}
        self._right: set[int] = set()  # whose logits were compared
        self._thread: ThreadPoolExecutor | None = None
        self._stream = self._vocabulary = 0
        self._piece: Any = None  # the tables on the device
        self._inputs: dict[int, list[Any]] = {}
        self._logits: Any = None
        self._kept: list[View] = []  # for as long as tensors are made of them
        self._view_of_logits: View | None = None
        self.refused = ""  # why there are no graphs

    def step(
        self, tokens: np.ndarray, positions: np.ndarray, qo_indptr: np.ndarray, logit_rows: np.ndarray,
        tables: Sequence[Table],
    ) -> Any:  # fmt: skip
        """Logits [n, vocab] on the device, until the next step; None: no graph does this step."""
        count = len(tokens)
        if self.refused or not 0 < count <= BUCKETS[-1] or len(qo_indptr) != count + 1 or len(logit_rows) != count:
            return None
        if qo_indptr[1] != 1 or (np.diff(qo_indptr) != 1).any() or (np.diff(logit_rows) != 1).any():
            return None
        bucket = next(b for b in BUCKETS if b >= count)
        if any(len(t.kv_indices) > count * pages for t, pages in zip(tables, self._pages, strict=True)):
            return None
        try:
            if not self._graphs:
                self._record()
            self._send(bucket, tokens, positions, tables)
            self._driver.start(self._graphs[bucket])
            if bucket not in self._right and not self._compare(bucket):
                return None
        except Exception as error:  # whatever it was: plain launches do the same, and tell if it was not the graph
            self._refuse(f"{type(error).__name__}: {error}")
            return None
        return self._rows(count)

    def _rows(self, count: int) -> Any:
        """The first logits, until the next call."""
        shape = (count, self._vocabulary)
        self._view_of_logits = View(self._logits.data_ptr(), shape, "float32", self._runtime.device)
        return self._runtime.ffi.from_dlpack(self._view_of_logits)

    def _send(self, bucket: int, tokens: Any, positions: Any, tables: Sequence[Table]) -> None:
        """Tables to their places, filled up with sequences of one token on the scratch page."""
        count = len(tokens)
        arrays = self._arrays(bucket)
        arrays[0][:count], arrays[0][count:] = tokens, 0
        arrays[1][0, :count], arrays[1][0, count:] = positions[0], 0
        arrays[2][:] = np.arange(bucket + 1)
        arrays[3][:] = np.arange(bucket)
        used = []
        for g, table in enumerate(tables):
            indptr, last, indices = arrays[4 + 2 * g], arrays[5 + 2 * g], arrays[4 + 2 * len(tables) + g]
            pages = len(table.kv_indices)
            indptr[: count + 1], indptr[count + 1 :] = table.kv_indptr, pages + 1 + np.arange(bucket - count)
            last[:count], last[count:] = table.kv_last_page_len, 1
            indices[:pages], indices[pages : pages + bucket - count] = table.kv_indices, 0
            used.append(pages + bucket - count)
        places = self._places[bucket]
        start = 0
        for g, pages in enumerate(used):  # the fixed part travels with the first group's pages
            begin = places[len(places) - len(used) + g - 1][1]
            self._runtime.write(self._piece, start, self._tables[start : begin + pages])
            if g + 1 < len(used):
                start = places[len(places) - len(used) + g][1]

    def _arrays(self, bucket: int) -> list[np.ndarray]:
        """The tables of a size, on this side."""
        start, arrays = 0, []
        for shape, end in self._places[bucket]:
            arrays.append(self._tables[start : start + int(np.prod(shape))].reshape(shape))
            start = end
        return arrays

    def _tensors(self, bucket: int) -> list[Any]:
        """The tables of a size, on the device: as `launch` takes them."""
        start, tensors = 0, []
        for shape, end in self._places[bucket]:
            self._kept.append(View(self._piece.data_ptr() + 4 * start, shape, "int32", self._runtime.device))
            tensors.append(self._runtime.ffi.from_dlpack(self._kept[-1]))
            start = end
        groups = len(self._pages)
        head, small, pages = tensors[:4], tensors[4 : 4 + 2 * groups], tensors[4 + 2 * groups :]
        return [*head, *(t for g in range(groups) for t in (small[2 * g], pages[g], small[2 * g + 1]))]

    def _record(self) -> None:
        """Record every size."""
        runtime = self._runtime
        self._piece = runtime.empty((len(self._tables),), "int32")
        self._inputs = {bucket: self._tensors(bucket) for bucket in BUCKETS}
        nothing = [Table(np.zeros(1, np.int32), *2 * (np.zeros(0, np.int32),)) for _ in self._pages]
        none = np.zeros(0, np.int32)

        def plain() -> None:
            self._stream = runtime.open_stream()
            for _ in range(WARM):
                for bucket in reversed(BUCKETS):
                    self._send(bucket, none, none.reshape(1, 0), nothing)
                    logits = self._launch(self._inputs[bucket])
                    runtime.wait(self._stream)
            self._vocabulary = int(logits.shape[1])

        self._on_thread(plain)
        self._logits = runtime.empty((BUCKETS[-1], self._vocabulary), "float32")
        self._on_thread(self._record_all)

    def _record_all(self) -> None:
        driver, stream = self._driver, self._stream
        for bucket in BUCKETS:
            driver.begin(stream)
            try:
                logits = self._launch(self._inputs[bucket])
                driver.copy(self._logits.data_ptr(), logits.data_ptr(), 4 * bucket * self._vocabulary, stream)
                del logits
            except BaseException:
                with contextlib.suppress(GraphError):  # the first error tells more; but the recording must end
                    driver.drop(driver.end(stream))
                raise
            self._graphs[bucket] = driver.end(stream)

    def _compare(self, bucket: int) -> bool:
        """Whether plain launches over the same tables give the same logits, bit by bit."""
        runtime = self._runtime
        found = runtime.fetch(self._rows(bucket))

        def plain() -> np.ndarray:
            logits = self._launch(self._inputs[bucket])
            runtime.wait(self._stream)
            return runtime.fetch(logits)

        expected = self._on_thread(plain)
        if found.tobytes() == expected.tobytes():
            self._right.add(bucket)
            return True
        differing = int((found.view(np.int32) != expected.view(np.int32)).sum())
        self._refuse(f"the graph of {bucket} sequences gives other logits than plain launches ({differing} differ)")
        return False

    def _on_thread(self, work: Callable[[], Any]) -> Any:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmc-graphs")
        return self._thread.submit(work).result()

    def _refuse(self, why: str) -> None:
        self.refused = why
        warnings.warn(f"decoding goes on without CUDA graphs: {why}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        """Let go of the graphs, then of what they were recorded with."""
        for graph in self._graphs.values():
            self._driver.drop(graph)
        self._graphs.clear()
        if self._thread is not None:
            if self._stream:
                with contextlib.suppress(RuntimeError):  # an interpreter that ends lets no thread begin anything
                    self._on_thread(lambda: self._runtime.close_stream(self._stream))
            self._thread.shutdown()
        self._inputs.clear()
        self._launch = self._logits = self._piece = None  # type: ignore[assignment]
