"""Builds kernels and calls them on numpy arrays; imported by tests, and by the child processes that they start."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32}


def build(function, target):
    """A callable on numpy arrays; those that the kernel writes are written in place."""
    import tvm

    from llmc.codegen.library import passes

    name = function.attrs["global_symbol"]
    with passes("llvm"):
        module = tvm.compile(tvm.IRModule({name: function}), tvm.target.Target(target.llvm()))

    def call(*arrays):
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        module[name](*tensors)
        for array, tensor in zip(arrays, tensors, strict=True):
            array[...] = tensor.numpy()

    return call


def targets():
    """This machine's target, and AVX2 where it can run."""
    from llmc import targets as known

    here = known.detect()
    return [here, *known.parse("cpu:x86-64-v3")] if here.arch == "x86_64" else [here]


def normal(seed, shape, dtype="float32", scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(DTYPES[dtype])
