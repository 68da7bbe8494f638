"""What the tests do on a card that is a stand-in, each in a child process: a runtime without the compiler."""

import ctypes
import importlib.util
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROCM = 10  # DLPack's kDLROCM


class Card:
    """TVM's runtime with the device "rocm", and the exported kernels; `files`: a folder with what the tests built."""

    def __init__(self, files: str):
        sys.modules["torch"] = None  # tvm_ffi imports it wherever it is installed, which takes seconds
        import tvm_ffi

        from llmc.runtime import hip

        self.ffi = tvm_ffi
        folder = Path(importlib.util.find_spec("tvm").submodule_search_locations[0]) / "lib"
        for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so"):
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
        hip.load()
        hip.load()  # again: nothing happens
        self.files = files

    def call(self, name, *arguments):
        return self.ffi.get_global_func(f"runtime.{name}")(*arguments)

    def device(self, index=0):
        return self.ffi.device("rocm", index)

    def new(self, shape, index=0):
        shape, dtype = self.ffi.Shape(shape), self.ffi.dtype("float32")
        return self.call("TVMTensorAllocWithScope", shape, dtype, self.device(index), None)

    def put(self, array, index=0):
        tensor = self.new(array.shape, index)
        self.call("TVMTensorCopyFromTo", self.ffi.from_dlpack(array), tensor)
        return tensor

    def get(self, tensor):
        array = np.zeros(tuple(tensor.shape), np.float32)
        self.call("TVMTensorCopyFromTo", tensor, self.ffi.from_dlpack(array))
        return array

    def kernels(self):
        return self.ffi.load_module(f"{self.files}/scale.so", keep_module_alive=False)


def run(scene, files, **environment):
    """-> (what the scene returned, or the type and text of the error it raised; calls of HIP; was TVM imported?)"""
    log = f"{files}/log-{os.getpid()}"
    defaults = {"LLMC_HIP_LIBRARY": f"{files}/libamdhip64.so", "HIP_STAND_IN_KERNELS": f"{files}/kernels.so"}
    os.environ.update(defaults | {"HIP_STAND_IN_LOG": log} | environment)
    try:
        found = globals()[scene](Card(files))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    text = Path(log).read_text() if Path(log).exists() else ""
    return found, text.splitlines(), "tvm" in sys.modules


def facts(card):
    return [card.call("GetDeviceAttr", ROCM, 0, kind) for kind in range(16)], [
        card.call("GetDeviceAttr", ROCM, device, 0) for device in (1, 2)
    ]


def launch(card):
    numbers = np.arange(3 * 200, dtype=np.float32).reshape(3, 200)
    source, target = card.put(numbers), card.new((3, 200))
    kernels = card.kernels()
    kernels["scale"](source, target, 2.5)
    kernels["scale"](source, target, 2.5)
    kind = kernels.imports[0].kind
    right = bool((card.get(target) == numbers * np.float32(2.5)).all())
    del source, target, kernels
    return right, kind


def empty_grid(card):
    card.kernels()["scale"](card.new((0, 200)), card.new((0, 200)), 2.5)


def streams(card):
    """What is launched on a stream is done when the stream is waited for; another stream waits for an event."""
    device = card.device()
    numbers = np.arange(4, dtype=np.float32).reshape(1, 4)
    source, target, kernels = card.put(numbers), card.put(np.zeros((1, 4), np.float32)), card.kernels()
    first, second = (card.call("Device_StreamCreate", device) for _ in range(2))
    card.call("Device_SetStream", device, first)
    kernels["scale"](source, target, 2.0)
    before = card.get(target).tolist()
    card.call("Device_StreamSyncFromTo", device, first, second)
    card.call("Device_StreamSync", device, second)
    card.call("Device_SetStream", device, 0)
    after = card.get(target).tolist()
    card.call("Device_StreamFree", device, first)
    card.call("Device_StreamFree", device, second)
    return before, after


def two_cards(card):
    numbers = np.arange(8, dtype=np.float32).reshape(2, 4)
    here, there = card.put(numbers), card.new((2, 4), 1)
    card.call("TVMTensorCopyFromTo", here, there)
    return card.get(there).tolist() == numbers.tolist()


def many_threads(card):
    """Each thread has a workspace of its own; kernels may be launched from several."""
    numbers = np.ones((1, 64), np.float32)
    kernels, results = card.kernels(), []

    def work(factor):
        target = card.new((1, 64))
        kernels["scale"](card.put(numbers), target, factor)
        results.append(float(card.get(target).sum()))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


def workspace(card):
    """Scratch is kept from call to call -> were the same bytes given again, and others to another thread?"""
    runtime = ctypes.CDLL(None)
    runtime.TVMBackendAllocWorkspace.restype = ctypes.c_void_p
    runtime.TVMBackendAllocWorkspace.argtypes = (*[ctypes.c_int] * 2, ctypes.c_uint64, *[ctypes.c_int] * 2)
    runtime.TVMBackendFreeWorkspace.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    found = []

    def use():
        memory = runtime.TVMBackendAllocWorkspace(ROCM, 0, 10000, 2, 32)  # of float32
        found.append(memory)
        runtime.TVMBackendFreeWorkspace(ROCM, 0, memory)

    use()
    use()
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    # What belongs to a thread is given back by its destructors, which the system runs after Python's end of it.
    deadline = time.monotonic() + 10
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return found[0] == found[1]


def damaged(card):
    load = card.ffi.get_global_func("ffi.Module.load_from_bytes.hip")
    problems = []
    for data in (b"", (5).to_bytes(8, "little") + b"hsa", (3).to_bytes(8, "little") + b"ptx"):
        try:
            load(data)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    return problems


def wrong_count(card):
    card.kernels().imports[0]["scale_kernel"](1)


def exists(card):
    return card.call("GetDeviceAttr", ROCM, 0, 0)


def allocate(card):
    card.new((1 << 28,))


def third_card(card):
    card.new((4,), 2)
