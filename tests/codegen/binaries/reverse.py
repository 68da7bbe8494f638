"""A program in the kernels form that is small, and still has shared memory and a barrier: it turns rows around."""

from types import SimpleNamespace

import tvm
from tvm import relax
from tvm.script import tirx as T

WIDTH = 256


@T.prim_func(s_tir=True)
def reverse(a: T.handle, b: T.handle):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    n = T.int64()
    A = T.match_buffer(a, (n, 256), "float32")
    B = T.match_buffer(b, (n, 256), "float32")
    row = T.launch_thread("blockIdx.x", n)
    lane = T.launch_thread("threadIdx.x", 256)
    shared = T.alloc_buffer((256,), "float32", scope="shared")
    shared[lane] = A[row, lane]
    T.tvm_storage_sync("shared")
    B[row, lane] = shared[255 - lane] * T.float32(2)


def program(kernel=reverse) -> SimpleNamespace:
    """main(x [n, 256] float32) -> y, as `codegen.build` takes it."""
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    kernels = builder.add_func(kernel, "reverse")
    x = relax.Var("x", relax.TensorType((n, WIDTH), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.call_tir(kernels, [x], relax.TensorType((n, WIDTH), "float32")))
        builder.emit_func_output(y)
    return SimpleNamespace(module=builder.get(), reference=None)
