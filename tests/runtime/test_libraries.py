"""Libraries are opened as they stand."""

import os

import numpy as np

CPU = (1, 0, 2)  # type, number, allocator


def opened_twice(folder):
    """What the function of a library gives, and of one that was put in its place in the same process."""
    import tvm
    from tvm import relax

    from llmc.runtime.libraries import ffi, open_library

    path, numbers = folder / "cpu.so", []
    for number in (1.0, 2.0):
        bb = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([3], "float32"))
        with bb.function("plus", [x]):
            bb.emit_func_output(bb.emit_te(lambda a, n=number: tvm.te.compute(a.shape, lambda i: a[i] + n), x))
        relax.build(bb.get(), tvm.target.Target("llvm")).export_library(str(folder / "new.so"))
        os.replace(folder / "new.so", path)
        found = open_library(path, CPU)["plus"](ffi().from_dlpack(np.zeros(3, "float32")))
        numbers.append(np.from_dlpack(found).tolist())
    return numbers


def test_a_library_in_another_ones_place_is_opened(isolated, tmp_path):
    assert isolated(opened_twice, tmp_path) == [[1.0] * 3, [2.0] * 3]
