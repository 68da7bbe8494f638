"""Kernels on the software device, in a child process that is kept: a crash or an endless loop costs only that."""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import DeviceFault

__all__ = ["COPIES", "ORDERS", "Unwritten", "check_all", "run", "run_text"]

ORDERS = ("forward", "reverse")
COPIES = ("late", "early")
PATIENCE = 20  # times its seconds of computing that a request may take, on a machine that others use too


@dataclass(frozen=True)
class Unwritten:
    """An argument that nothing has written: a kernel that reads it before it writes it is caught."""

    shape: tuple[int, ...]
    dtype: str


def run(
    kernel: Any,
    target: Any,
    args: Sequence[Any],
    *,
    strict: bool = True,
    order: str = "forward",
    copies: str = "late",
    edit: tuple[str, str, int | None] | None = None,
    timeout: float = 120,
) -> list[Any]:
    """Build a PrimFunc for a GPU target, call it once on the software device, -> all its arguments as they are then.

    kernel: with host code and launches, as tvm.compile takes it. target: a GpuTarget. args: arrays (bfloat16 as
    ml_dtypes has it), `Unwritten`, or numbers, in the order of the parameters, outputs included; they are not changed.
    strict: every access of memory is checked. order: lanes, warps and blocks run "forward" or in "reverse".
    copies: asynchronous ones land when they are waited for ("late") or at once ("early"). timeout: seconds of
    computing, to build and to run it.
    edit: (old, new, which) puts `new` for the occurrence of `old` of that number, from 0, in the emitted text, or for
    all of them if None: to plant a fault. ValueError if there is none.

    Raises DeviceFault: the kernel did what has no meaning on the device, crashed, or did not end in time.
    CompileError: it does not compile, or holds an instruction that the device does not know.
    """
    return _ask(kernel, target, args, strict, [(order, copies)], timeout, edit)


def check_all(kernel: Any, target: Any, args: Sequence[Any], *, timeout: float = 300) -> list[Any]:
    """`run`, strictly, in both orders and, where there are asynchronous copies, with both timings.

    Raises DeviceFault, too, where results differ in any bit (fault "order").
    """
    return _ask(kernel, target, args, True, [(order, c) for order in ORDERS for c in COPIES], timeout)


def run_text(
    text: str,
    name: str,
    target: Any,
    args: Sequence[Any],
    *,
    blocks: Sequence[int],
    threads: Sequence[int],
    dynamic_shared: int = 0,
    offsets: Sequence[int] = (),
    order: str = "forward",
    copies: str = "late",
    timeout: float = 120,
) -> list[Any]:
    """`run`, strictly, for one kernel that is device text already, as the emitters of the target's kind write it.

    args: arrays and `Unwritten` for its pointers, numbers for the rest, in the order of its parameters. blocks,
    threads: of the launch, along x, y, z. offsets: bytes into its buffer at which each pointer begins, 0 by default.
    """
    sizes = {"blockIdx": tuple(blocks), "threadIdx": tuple(threads)}
    request = {"text": text, "sizes": sizes, "dynamic_shared": dynamic_shared, "offsets": list(offsets)}
    return _request(request, name, target, args, True, [(order, copies)], timeout)


def _ask(kernel, target, args, strict, settings, timeout, edit=None) -> list[Any]:
    import tvm

    name = str(kernel.attrs["global_symbol"])
    return _request({"kernel": tvm.ir.save_json(kernel), "edit": edit}, name, target, args, strict, settings, timeout)


def _request(what: dict, name, target, args, strict, settings, timeout) -> list[Any]:
    how = {"name": name, "target": target.tvm(), "args": list(args), "strict": strict, "settings": settings}
    request = what | how | {"seconds": timeout}
    with _lock:
        return _worker().ask(request, name, timeout)


_lock = threading.Lock()
_current: list[_Worker] = []


def _worker() -> _Worker:
    if not _current or not _current[0].usable():
        _current[:] = [_Worker()]
    return _current[0]


# tvm_ffi imports torch where it finds it, which takes longer than all the rest.
_START = """
import sys
sys.modules["torch"] = None
from llmc.codegen.software_device.worker import main
main()
"""


class _Worker:
    """The child process: takes pickled requests on its standard input, answers on its standard output."""

    def __init__(self):
        command = [sys.executable, "-c", _START]
        environment = {**os.environ, "TVM_NUM_THREADS": "1"}
        self.owner = os.getpid()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(self.stop)

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def stop(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            atexit.unregister(self.stop)

    def ask(self, request: dict, name: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + PATIENCE * timeout
        try:
            send(self.process.stdin, request)
            answer = self._receive(deadline)
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            if code == -signal.SIGPROF:
                raise _late(name, timeout) from None
            raise DeviceFault(f"crash: kernel {name} ended its process (exit {code})", "crash", name) from None
        except TimeoutError:
            self.stop()
            raise _late(name, timeout) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _receive(self, deadline: float) -> Any:
        pipe = self.process.stdout
        assert pipe is not None

        def read(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError
                part = os.read(pipe.fileno(), min(size - len(data), 1 << 20))
                if not part:
                    raise EOFError
                data += part
            return bytes(data)

        (size,) = struct.unpack("<Q", read(8))
        return pickle.loads(read(size))


def _late(name: str, timeout: float) -> DeviceFault:
    return DeviceFault(f"time: kernel {name} did not end within {timeout} s of computing", "time", name)


def send(pipe, message: Any) -> None:
    """Write a message: its length in 8 bytes, then its pickle."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def same_bits(one: Any, other: Any) -> bool:
    """Whether two results agree in every bit."""
    if not isinstance(one, np.ndarray):
        return bool(one == other)
    return one.shape == other.shape and one.tobytes() == other.tobytes()
