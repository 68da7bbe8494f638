"""Exports a library with a kernel for gfx942, as the compiler does."""

import subprocess
import sys
import tempfile
from pathlib import Path

import tvm
import tvm_ffi
from tvm.script import tirx as T


@T.prim_func(s_tir=True)
def scale(a: T.handle, b: T.handle, factor: T.float32):
    rows = T.int64()
    columns = T.int64()
    A = T.match_buffer(a, (rows, columns), "float32")
    B = T.match_buffer(b, (rows, columns), "float32")
    for by in T.thread_binding(rows, thread="blockIdx.y"):
        for bx in T.thread_binding((columns + T.int64(127)) // T.int64(128), thread="blockIdx.x"):
            for tx in T.thread_binding(T.int64(128), thread="threadIdx.x"):
                with T.sblock("scale"):
                    T.where(bx * T.int64(128) + tx < columns)
                    i = T.axis.spatial(rows, by)
                    j = T.axis.spatial(columns, bx * T.int64(128) + tx)
                    B[i, j] = A[i, j] * factor


def link(code: bytes) -> bytearray:
    with tempfile.TemporaryDirectory() as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.hsaco"
        made.write_bytes(bytes(code))
        subprocess.run(
            [sys.executable, "-m", "ziglang", "ld.lld", "--no-undefined", "-shared", str(made), "-o", str(linked)],
            check=True,
        )
        return bytearray(linked.read_bytes())


def export(file: str) -> list[str]:
    """Write the library -> the kinds of its modules."""
    tvm_ffi.register_global_func("tvm_callback_rocm_bitcode_path", lambda *_: [], override=True)
    tvm_ffi.register_global_func("tvm_callback_rocm_link", link, override=True)
    target = tvm.target.Target(
        {"kind": "rocm", "mcpu": "gfx942", "max_num_threads": 1024, "thread_warp_size": 64}, host="llvm"
    )
    built = tvm.compile(tvm.IRModule({"scale": scale}), target=target)
    built.export_library(file)
    return [module.kind for module in built.mod.imports]
