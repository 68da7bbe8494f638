"""Small kernels for the software device's tests."""

from functools import cache

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc import targets


@cache
def target(name):
    return targets.parse(name)[0]


def kernel(params, body, name="planted"):
    """A PrimFunc. params: (name, shape, dtype), a str in a shape is a symbol. body(symbols, *buffers) emits it."""
    symbols: dict = {}
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.is_scheduled": True})
        buffers = []
        for label, shape, dtype in params:
            sizes = [symbols.setdefault(d, T.int64()) if isinstance(d, str) else T.int64(d) for d in shape]
            buffers.append(T.arg(label, T.buffer(tuple(sizes), dtype)))
        body(symbols, *buffers)
    return builder.get()


def launch(blocks, threads):
    """`with launch(4, 32) as (block, thread):` along x."""
    return _Launch(blocks, threads)


class _Launch:
    def __init__(self, blocks, threads):
        self.frames = T.launch_thread("blockIdx.x", blocks), T.launch_thread("threadIdx.x", threads)

    def __enter__(self):
        return tuple(frame.__enter__() for frame in self.frames)

    def __exit__(self, *error):
        for frame in reversed(self.frames):
            frame.__exit__(*error)


def barrier():
    T.evaluate(T.tvm_storage_sync("shared"))


def copy(reach=0, blocks=2, threads=64, n=128):
    """y[i] = x[i + reach]"""

    def body(_, x, y):
        with launch(blocks, threads) as (b, t):
            i = b * threads + t
            T.buffer_store(y, x[i + reach], [i])

    return kernel([("x", (n,), "float32"), ("y", (n,), "float32")], body)


def reverse():
    """y = x reversed through shared memory."""

    def body(_, x, y):
        with launch(1, 64) as (_b, t):
            s = T.alloc_buffer((64,), "float32", scope="shared")
            T.buffer_store(s, x[t], [t])
            barrier()
            T.buffer_store(y, s[63 - t], [t])

    return kernel([("x", (64,), "float32"), ("y", (64,), "float32")], body)
