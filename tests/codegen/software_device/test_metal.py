"""The Metal shading language on the software device: what is right runs, and every planted fault is told."""

import numpy as np
import pytest

from llmc.codegen import software_device as device
from llmc.ir.errors import CompileError
from tests.codegen.software_device import kernels as K

METAL = K.target("metal")
ZEROS = np.zeros(64, np.float32)
HEAD = """#include <metal_stdlib>
using namespace metal;
kernel void planted(device float* x [[ buffer(0) ]], device float* y [[ buffer(1) ]],
  uint blockIdx [[threadgroup_position_in_grid]], uint threadIdx [[thread_position_in_threadgroup]]) {
  threadgroup float s[64];
"""


def run(body, *args, text=None, blocks=1, threads=64, **options):
    """The kernel of a body, whose first line is line 6 of the text."""
    text = text or f"{HEAD}{body}\n}}\n"
    args = args or (ZEROS, ZEROS)
    return device.run_text(text, "planted", METAL, args, blocks=[blocks], threads=[threads], **options)


def fault(body, *args, **options):
    with pytest.raises(device.DeviceFault) as caught:
        run(body, *args, **options)
    return caught.value


def test_a_compiled_kernel_runs():
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(device.check_all(K.reverse(), METAL, [x, ZEROS])[1], x[::-1])


def test_a_compiled_kernel_with_scalars():
    def body(symbols, x, y):
        n = symbols["n"]
        with K.launch(K.T.Cast("int32", (n + 31) // 32), 32) as (b, t), K.T.If(b * 32 + t < n), K.T.Then():
            K.T.buffer_store(y, x[b * 32 + t] + K.T.Cast("float32", n), [b * 32 + t])

    kernel = K.kernel([("x", ("n",), "float32"), ("y", ("n",), "float32")], body)
    x = np.arange(37, dtype=np.float32)
    np.testing.assert_array_equal(device.check_all(kernel, METAL, [x, device.Unwritten((37,), "float32")])[1], x + 37)


def test_out_of_bounds():
    found = fault("  float v = x[threadIdx];\n  y[threadIdx + 1] = v;")
    assert (found.fault, found.line, found.thread) == ("bounds", 7, (63, 0, 0))
    assert fault("  s[threadIdx + 1] = 0;").fault == "bounds"


def test_missing_barrier():
    body = "  s[threadIdx] = 0;\n  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    body += "  s[threadIdx] = x[threadIdx];\n  {}\n  y[threadIdx] = s[threadIdx ^ 32];"
    run(body.format("threadgroup_barrier(mem_flags::mem_threadgroup);"))
    for nothing in (";", "simdgroup_barrier(mem_flags::mem_threadgroup);"):
        found = fault(body.format(nothing))
        assert (found.fault, found.line, found.thread) == ("race", 8, (32, 0, 0))
    found = fault(body.format("threadgroup_barrier(mem_flags::mem_none);"))
    assert (found.fault, found.line, found.thread) == ("race", 10, (0, 0, 0))


def test_a_barrier_orders_only_the_memory_that_it_names():
    body = "  y[threadIdx] = 1;\n  threadgroup_barrier(mem_flags::{});\n  x[threadIdx] = y[63 - threadIdx];"
    run(body.format("mem_device"))
    assert fault(body.format("mem_threadgroup")).fault == "race"


def test_a_barrier_that_not_all_reach():
    found = fault("  if (threadIdx < 40) threadgroup_barrier(mem_flags::mem_threadgroup);")
    assert (found.fault, found.line) == ("barrier", 6)


def test_reading_what_nothing_wrote():
    found = fault("  y[threadIdx] = s[threadIdx];")
    assert (found.fault, found.line) == ("uninitialised", 6)


def test_shuffles():
    body = "  y[threadIdx] = simd_shuffle_xor(x[threadIdx], (ushort)16) + simd_shuffle_down(x[threadIdx], (ushort)3);"
    x = np.arange(64, dtype=np.float32)
    down = np.where(np.arange(64) % 32 + 3 < 32, x + 3, x)
    np.testing.assert_array_equal(run(body, x, ZEROS)[1], x[np.arange(64) ^ 16] + down)
    assert fault("  y[threadIdx] = simd_shuffle(x[threadIdx], (ushort)32);").fault == "shuffle"
    assert fault("  if (threadIdx & 1) y[threadIdx] = simd_shuffle(1.0f, (ushort)2);").fault == "shuffle"


def test_vectors():
    body = """  if (threadIdx < 16) {
    float4 v = *(device float4*)(x + threadIdx * 4);
    ushort4 u = ushort4((ushort)1, (ushort)2, (ushort)3, (ushort)4);
    half4 h = half4(2.5h);
    *(device float4*)(y + threadIdx * 4) = v * float4(u) + ((float4)h) + as_type<float4>(uint4((uint)0));
  }"""
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(run(body, x, ZEROS)[1], x * np.tile([1, 2, 3, 4], 16) + 2.5)
    assert fault("  float4 v = *(device float4*)(x + 2);\n  y[threadIdx] = v.x;").fault == "alignment"


def test_simdgroup_matrices():
    body = """  simdgroup_half8x8 a, b;
  simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(a, x, 8, 0, false);
  simdgroup_load(b, w, 8, 0, true);
  simdgroup_multiply_accumulate(c, a, b, c);
  simdgroup_store(c, y, 8, 0, false);"""
    head = HEAD.replace(
        "device float* x [[ buffer(0) ]]", "device half* x [[ buffer(0) ]], device half* w [[ buffer(1) ]]"
    )
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((8, 8)).astype(np.float16) for _ in range(2))
    y = run(None, x, w, device.Unwritten((8, 8), "float32"), text=f"{head}{body}\n}}\n", threads=32)[2]
    np.testing.assert_allclose(y, 1 + x.astype(np.float32) @ w.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    found = fault(None, x, w, y, text=f"{head}{body}\n}}\n", threads=16)
    assert found.fault == "lanes"


def test_buffers_are_bound_whole():
    """TVM's Metal runtime binds every buffer at offset 0."""
    found = fault(None, ZEROS, ZEROS, text=HEAD + "}\n", offsets=[0, 64])
    assert found.fault == "binding" and "it points into a buffer" in str(found)


def test_a_declaration_that_is_not_understood():
    with pytest.raises(CompileError, match="does not understand this declaration: threadgroup float t;"):
        run("  threadgroup float t;")
