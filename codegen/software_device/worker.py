"""The child process of run.py: compiles kernels and runs them, one request after another."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import signal
import struct
import sys
import traceback
from typing import Any

import numpy as np
import tvm_ffi

from llmc.ir.errors import CompileError

from . import device
from .entry import Kernel, Parameter
from .faults import DeviceFault
from .run import Unwritten, same_bits, send

_LIMIT = 64  # compiled kernels that are kept


class Worker:
    """Builds and calls kernels; keeps what it has built."""

    def __init__(self):
        self.installed: dict[str, bool] = {}
        self.built: dict[str, tuple[Any, str]] = {}

    def answer(self, request: dict) -> list[Any]:
        function, text = self.load(request) if "text" in request else self.build(request)
        settings = request["settings"]
        if len(settings) > 1 and "cp.async" not in text:
            settings = [s for s in settings if s[1] == settings[0][1]]
        first: list[Any] = []
        for order, copies in settings:
            device.configure(order=order, copies=copies)
            results = self.call(function, request["target"]["kind"], request["args"])
            first = first or results
            for index, (one, other) in enumerate(zip(first, results, strict=True)):
                if not same_bits(one, other):
                    raise DeviceFault(
                        f"order: kernel {request['name']}: argument {index} differs between {settings[0]} and "
                        f"{(order, copies)}; its result depends on what runs first",
                        "order",
                        request["name"],
                    )
        return first

    def build(self, request: dict) -> tuple[Any, str]:
        import tvm

        from ..library import passes

        target, strict = request["target"], request["strict"]
        key = hashlib.sha256(f"{request['kernel']} {target} {strict} {request['edit']}".encode()).hexdigest()
        if key not in self.built:
            self.install(target["kind"], strict)
            device.edit_text(request["edit"])
            with passes(target["kind"]):
                module = tvm.IRModule({request["name"]: tvm.ir.load_json(request["kernel"])})
                compiled = tvm.compile(module, tvm.target.Target(target, host={"kind": "llvm"}))
            while len(self.built) >= _LIMIT:
                self.built.pop(next(iter(self.built)))
            self.built[key] = compiled[request["name"]], device.emitted()
        return self.built[key]

    def load(self, request: dict) -> tuple[Any, str]:
        """A kernel of a text, called as host code would."""
        name, target, args, text = (request[k] for k in ("name", "target", "args", "text"))
        self.install(target["kind"], request["strict"])

        def dtype(arg: Any) -> str:
            return (
                "handle" if isinstance(arg, np.ndarray | Unwritten) else "int64" if isinstance(arg, int) else "float32"
            )

        sizes = {
            f"{index}.{axis}": n for index, s in request["sizes"].items() for axis, n in zip("xyz", s, strict=False)
        }
        if request["dynamic_shared"]:
            sizes["tirx.use_dyn_shared_memory"] = request["dynamic_shared"]
        parameters = tuple(Parameter(f"argument {i}", dtype(arg)) for i, arg in enumerate(args))
        kernel = Kernel(name, parameters, tuple(sizes), target["thread_warp_size"])
        module = tvm_ffi.load_module(str(device.load_kernels(target["kind"], text, [kernel], strict=request["strict"])))

        def call(*placed: Any) -> None:
            offsets = [*request["offsets"], *(0 for _ in placed)]
            module[name](*(pointer(p, offset) for p, offset in zip(placed, offsets, strict=False)), *sizes.values())

        def pointer(arg: Any, offset: int) -> Any:
            return ctypes.c_void_p(arg.data_ptr() + offset) if hasattr(arg, "data_ptr") else arg

        return call, text

    def install(self, kind: str, strict: bool) -> None:
        if self.installed.get(kind) != strict:
            device.install(kind, strict=strict)
            self.installed[kind] = strict

    def call(self, function: Any, kind: str, args: list[Any]) -> list[Any]:
        import tvm

        here = tvm.device(kind, 0)

        def put(arg: Any) -> Any:
            if isinstance(arg, Unwritten):
                return tvm.runtime.empty(arg.shape, arg.dtype, device=here)
            return tvm.runtime.tensor(arg, device=here) if isinstance(arg, np.ndarray) else arg

        placed = [put(arg) for arg in args]
        try:
            function(*placed)
        except Exception:
            fault = device.last_fault()
            if fault is not None:
                raise fault from None
            raise
        return [arg.numpy() if isinstance(arg, tvm.runtime.Tensor) else arg for arg in placed]


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker()
    while header := requests.read(8):
        request = pickle.loads(requests.read(struct.unpack("<Q", header)[0]))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # of this process: past them, it ends
        try:
            reply: Any = worker.answer(request)
        except (DeviceFault, CompileError) as error:
            reply = error
        except Exception:
            reply = RuntimeError(f"on the software device, {request['name']}:\n{traceback.format_exc()}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            send(answers, reply)
        except (pickle.PicklingError, TypeError):
            send(answers, RuntimeError(str(reply)))
