"""This machine's read bandwidth, measured with what every machine has: the C library's memchr on all cores.

memchr for a byte that does not occur reads every cache line once, in order, with the widest loads of the machine.
ctypes releases the interpreter lock, so threads read side by side. The buffer is far larger than the caches.
"""

import ctypes
import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_MADV_HUGEPAGE = 14  # linux/mman.h


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ReadProbe:
    """A buffer of `nbytes`, and how fast it can be read by `threads` threads, in bytes a second."""

    def __init__(self, nbytes: int = 1 << 30, threads: int | None = None):
        self.threads = threads or cores()
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes)
        if hasattr(self._map, "madvise"):
            self._map.madvise(_MADV_HUGEPAGE)
        buffer = np.frombuffer(self._map, np.uint8)
        buffer[:] = 1
        self._address = buffer.ctypes.data
        self._memchr = ctypes.CDLL(None).memchr
        self._memchr.restype = ctypes.c_void_p
        self._memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._pool = ThreadPoolExecutor(self.threads)

    def read(self) -> float:
        """Bytes a second of one read of the whole buffer."""
        # Many chunks: a core slowed by another process takes fewer of them.
        chunk = 1 << 24
        started = time.perf_counter()
        work = [
            self._pool.submit(self._memchr, self._address + at, 0, min(chunk, self.nbytes - at))
            for at in range(0, self.nbytes, chunk)
        ]
        for part in work:
            part.result()
        return self.nbytes / (time.perf_counter() - started)

    def median(self, repeats: int = 5) -> float:
        self.read()
        return statistics.median(self.read() for _ in range(repeats))


if __name__ == "__main__":
    print(f"{ReadProbe().median() / 1e9:.1f} GB/s on {cores()} cores")
