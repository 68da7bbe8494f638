"""Runs a built library as the runtime does, in a process without the compiler: for `isolated`."""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np


class Machine:
    """A library and its weights. Arguments are numpy arrays, pages stay in the machine from call to call."""

    def __init__(self, library, weights_file, weights, pages):
        import tvm_ffi

        from llmc.runtime.artifact import Weights

        self.ffi, self.kept = tvm_ffi, []
        lib = Path(importlib.util.find_spec("tvm").submodule_search_locations[0]) / "lib"
        for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so"):
            ctypes.CDLL(str(lib / name), ctypes.RTLD_GLOBAL)
        self.vm = tvm_ffi.load_module(str(library))["vm_load_executable"]()
        self.vm["vm_initialization"](1, 0, 2, 1, 0, 2)
        file = Weights(weights_file)
        tensors = {n: self.tensor(file[n], file.specs[n].dtype) for n in file}
        self.weights = {f: [tensors[n] for n in names] for f, names in weights.items()}
        self.pages = [self.tensor(p) for p in pages]

    def tensor(self, array, dtype=None):
        """A copy that is aligned as the runtime's memory is."""
        from llmc.runtime.dlpack import View

        dtype = dtype or str(array.dtype)
        space = np.empty(array.nbytes + 64, np.uint8)
        start = -space.ctypes.data % 64
        copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        view = View(copy.ctypes.data, copy.shape, dtype)
        self.kept += [copy, view]
        return self.ffi.from_dlpack(view)

    def embed(self, tokens):
        return np.from_dlpack(self.vm["embed"](self.tensor(tokens), self.weights["embed"]))

    def step(self, hidden, *tables):
        args = [self.tensor(a) for a in (hidden, *tables)]
        return np.from_dlpack(self.vm["step"](*args, self.pages, self.weights["step"])).copy()


def run(library, weights_file, weights, pages, calls):
    """calls: [("embed", tokens), ("step", hidden or None, *tables), ("copy_pages_0", from, to)], in any order.

    -> results, and whether the compiler was loaded. A hidden of None is the result of the last embed.
    """
    machine, results, hidden = Machine(library, weights_file, weights, pages), [], None
    for name, *args in calls:
        if name == "embed":
            hidden = machine.embed(*args)
            results.append(hidden.copy())
        elif name == "step":
            results.append(machine.step(hidden if args[0] is None else args[0], *args[1:]))
        else:
            machine.vm[name](*map(machine.tensor, args), machine.pages)
            results.append([np.from_dlpack(p).copy() for p in machine.pages])
    return results, "tvm" in sys.modules
