"""CUDA C++ on the software device: what is right runs, and every planted fault is told by its name and line."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.codegen import software_device as device
from llmc.ir.errors import CompileError
from tests.codegen.software_device import kernels as K

SM80 = K.target("cuda:sm_80")
ZEROS = np.zeros(64, np.float32)
TEXTS = Path(__file__).parent / "texts"


def run_text(text, *args, blocks=1, threads=64, **options):
    return device.run_text(text, "planted", SM80, args, blocks=[blocks], threads=[threads], **options)


def run(body, *args, text=None, shared="__shared__ alignas(16) float s[64];", parameters="float* x, float* y", **how):
    """The kernel of a body; the body's first line is line 3 of the text."""
    head = f'extern "C" __global__ void __launch_bounds__(64) planted({parameters}) {{\n  {shared}\n'
    return run_text(text or f"{head}{body}\n}}\n", *(args or (ZEROS, ZEROS)), **how)


def fault(body, *args, **options):
    with pytest.raises(device.DeviceFault) as caught:
        run(body, *args, **options)
    return caught.value


def test_a_compiled_kernel_runs():
    x = np.arange(128, dtype=np.float32)
    result = device.check_all(K.copy(), SM80, [x, device.Unwritten((128,), "float32")])
    np.testing.assert_array_equal(result[1], x)


def test_an_access_out_of_bounds_in_a_compiled_kernel():
    with pytest.raises(device.DeviceFault) as caught:
        device.run(K.copy(reach=1), SM80, [np.zeros(128, np.float32)] * 2)
    found = caught.value
    assert (found.fault, found.kernel, found.block, found.thread) == ("bounds", "planted_kernel", (1, 0, 0), (63, 0, 0))
    assert "reads 4 bytes at offset 512 of x" in str(found)
    assert found.text.startswith("y_ptr[") and found.line > 1


def test_shared_memory_and_barriers():
    x = np.arange(64, dtype=np.float32)
    result = device.check_all(K.reverse(), SM80, [x, ZEROS])
    np.testing.assert_array_equal(result[1], x[::-1])


def test_out_of_bounds_write_names_the_line():
    found = fault("  float v = x[threadIdx.x];\n  y[threadIdx.x + 1] = v;")
    assert (found.fault, found.line, found.thread) == ("bounds", 4, (63, 0, 0))


def test_out_of_bounds_does_not_reach_another_tensor():
    found = fault("  y[(float*)x - y] = 1;\n  y[1 << 20] = 0;")
    assert (found.fault, found.line) == ("bounds", 4)


def test_tensors_lie_too_far_apart_for_a_stray_offset():
    far = "  long apart = (char*)x - (char*)y;\n  y[threadIdx.x] = (float)((apart < 0 ? -apart : apart) >> 20);"
    assert run(far)[1].min() >= 256


def test_shared_memory_is_bounded():
    assert fault("  *(s + threadIdx.x + 1) = 0;").fault == "bounds"
    assert fault("  s[threadIdx.x + 1] = 0;").fault in ("index", "bounds")


def test_registers_are_bounded():
    found = fault("  float r[4];\n  r[threadIdx.x] = 1;\n  y[threadIdx.x] = r[threadIdx.x & 3];")
    assert (found.fault, found.line) == ("index", 4)


def test_missing_barrier():
    body = "  s[threadIdx.x] = x[threadIdx.x];\n  {}\n  y[threadIdx.x] = s[63 - threadIdx.x];"
    run(body.format("__syncthreads();"))
    found = fault(body.format("__syncwarp();"), order="reverse")
    assert found.fault == "uninitialised" or found.fault == "race"
    twice = "  s[threadIdx.x] = 0;\n  __syncthreads();\n" + body.format(";")
    found = fault(twice)
    assert (found.fault, found.line, found.thread) == ("race", 5, (32, 0, 0))
    assert "which thread (31, 0, 0) of block (0, 0, 0) at line 7 (y[threadIdx.x] = s[63 - threadIdx.x];) read" in str(
        found
    )


def test_a_warp_barrier_orders_its_warp_only():
    body = "  s[threadIdx.x] = 0;\n  __syncthreads();\n  s[threadIdx.x] = x[0];\n"
    body += "  __syncwarp();\n  y[threadIdx.x] = s[threadIdx.x ^ {}];"
    run(body.format(1))
    assert fault(body.format(32)).fault == "race"


def test_shuffles_order_no_memory():
    body = (
        "  s[threadIdx.x] = 0;\n  __syncthreads();\n  s[threadIdx.x] = x[0];\n"
        "  float v = __shfl_xor_sync(0xffffffff, 1.0f, 1);\n  y[threadIdx.x] = s[threadIdx.x ^ 1] + v;"
    )
    assert fault(body).fault == "race"


def test_writing_what_others_still_read():
    body = "  s[threadIdx.x] = 0;\n  __syncthreads();\n  float v = s[63 - threadIdx.x];\n  s[threadIdx.x] = v;"
    found = fault(body)
    assert (found.fault, found.line) == ("race", 5)
    assert "at line 6 (s[threadIdx.x] = v;) wrote" in str(found)


def test_blocks_that_meet_in_memory():
    assert fault("  y[threadIdx.x] = 1;", blocks=2).fault == "race"
    assert (
        fault("  if (blockIdx.x == 0) y[threadIdx.x] = 1; else x[threadIdx.x] = y[threadIdx.x];", blocks=2).fault
        == "race"
    )
    found = fault("  if (blockIdx.x == 2) y[threadIdx.x] = 1; else if (y[threadIdx.x]) s[0] = 0;", blocks=3)
    assert found.fault == "race" and "of block (" in str(found)


def test_atomics_may_meet_and_plain_accesses_may_not():
    result = run("  atomicAdd(y, x[threadIdx.x]);", np.ones(64, np.float32), np.zeros(1, np.float32), blocks=3)
    assert result[1][0] == 192
    assert fault("  if (threadIdx.x) atomicAdd(y, 1.0f); else y[0] = 1;").fault == "race"


def test_reading_what_nothing_wrote():
    found = fault("  y[threadIdx.x] = s[threadIdx.x];")
    assert (found.fault, found.line) == ("uninitialised", 3) and "of s (256 bytes)" in str(found)
    found = fault("  y[threadIdx.x] += 1;", ZEROS, device.Unwritten((64,), "float32"))
    assert found.fault == "uninitialised"


def test_shared_memory_is_new_for_every_block():
    body = "  if (blockIdx.x == 0) s[threadIdx.x] = 1;\n  else y[threadIdx.x] = s[threadIdx.x];"
    found = fault(body, blocks=2)
    assert (found.fault, found.block) == ("uninitialised", (1, 0, 0))


def test_a_barrier_that_not_all_reach():
    found = fault("  if (threadIdx.x < 40) __syncthreads();")
    assert (found.fault, found.line) == ("barrier", 3) and "has ended" in str(found)
    found = fault("  if (threadIdx.x < 40) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }")
    assert found.fault == "barrier" and "waits elsewhere" in str(found)


def test_shuffles():
    body = "  float v = __shfl_down_sync(0xffffffff, x[threadIdx.x], 3);\n"
    body += "  y[threadIdx.x] = v + __shfl_xor_sync(0xffffffff, x[threadIdx.x], 16);"
    x = np.arange(64, dtype=np.float32)
    lane = np.arange(64) % 32
    down = np.where(lane + 3 < 32, x + 3, x)
    np.testing.assert_array_equal(run(body, x, ZEROS)[1], down + x[np.arange(64) ^ 16])


def test_shuffles_out_of_range_or_with_lanes_that_take_no_part():
    found = fault("  y[threadIdx.x] = __shfl_sync(0xffffffff, 1.0f, 32);")
    assert (found.fault, found.line) == ("shuffle", 3)
    shuffle = "  if ({}) y[threadIdx.x] = __shfl_sync({}, 1.0f, {});"
    assert fault(shuffle.format("threadIdx.x & 1", "~0u", 1) + " else __syncthreads();").fault == "lanes"
    assert fault(shuffle.format("threadIdx.x & 1", "~0u", 2)).fault == "shuffle"
    assert fault(shuffle.format("threadIdx.x < 8", "0xf0", 4)).fault == "lanes"
    run("  if (threadIdx.x < 8) y[threadIdx.x] = __shfl_sync(0xff, 1.0f, 4);")


def test_misaligned_vectors():
    found = fault("  float2 v = *(float2*)(x + 1);\n  y[threadIdx.x] = v.x + v.y;")
    assert (found.fault, found.line) == ("alignment", 3)


COPY = (TEXTS / "copy_async.cu").read_text()
WAIT = 'asm volatile("cp.async.wait_group 0;" ::: "memory");'


@pytest.mark.parametrize("copies", ["late", "early"])
def test_asynchronous_copies(copies):
    x = np.arange(64, dtype=np.float32) + 1
    result = run_text(COPY, x, ZEROS, copies=copies)
    np.testing.assert_array_equal(result[1], x[::-1])
    half = COPY.replace('"r"(16)', '"r"(8)')
    filled = run_text(half, x, ZEROS, copies=copies)[1][::-1].reshape(16, 4)
    np.testing.assert_array_equal(filled, np.where(np.arange(4) < 2, x.reshape(16, 4), 0))


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("wait", [";", WAIT.replace("group 0", "group 1")])
def test_missing_wait(copies, wait):
    found = fault(None, ZEROS, ZEROS, text=COPY.replace(WAIT, wait), copies=copies)
    assert (found.fault, found.line, found.thread) == ("copy", 9, (0, 0, 0))
    assert "thread (15, 0, 0) of block (0, 0, 0) at line 5" in str(found) and "has not waited for" in str(found)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_matrix_unit(dtype):
    """One m16n8k16 product, its operands by ldmatrix: A [16, 16], B [8, 16] (its columns), D [16, 8]."""
    text = (TEXTS / "mma.cu").read_text()
    if dtype != np.float16:
        text = text.replace("f32.f16.f16.f32", "f32.bf16.bf16.f32")
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(dtype) for s in ((16, 16), (8, 16)))
    y = run_text(text, x, w, device.Unwritten((16, 8), "float32"), threads=32)[2]
    np.testing.assert_allclose(y, x.astype(np.float32) @ w.astype(np.float32).T, rtol=1e-5, atol=1e-5)
    half = text.replace("__syncthreads();", "__syncthreads();\n  if (l >= 16) return;")
    found = fault(None, x, w, y, text=half, threads=32)
    assert found.fault == "lanes" and "every lane of the warp" in str(found)


@pytest.mark.parametrize("dtype", ["s8", "e4m3"])
def test_matrix_unit_of_bytes(dtype):
    """One m16n8k32 product: A [16, 32], B [8, 32] (its columns), D [16, 8], each lane's words as PTX ISA draws them."""
    number = "int" if dtype == "s8" else "float"
    text = (TEXTS / "mma_bytes.cu").read_text().replace("NUMBER", number)
    text = text.replace("KINDS", {"s8": "s32.s8.s8.s32", "e4m3": "f32.e4m3.e4m3.f32"}[dtype])
    text = text.replace("LETTER", "r" if dtype == "s8" else "f")
    codes = np.random.default_rng(0).integers(0, 256, (24, 32)).astype(np.uint8)
    codes[codes & 127 == 127] ^= 1
    numbers = codes.view(np.int8 if dtype == "s8" else ml_dtypes.float8_e4m3fn).astype(np.float64)
    given = [codes[:16], codes[16:], device.Unwritten((16, 8), "int32" if dtype == "s8" else "float32")]
    y = run_text(text, *given, threads=32)[2]
    x, w = numbers[:16], numbers[16:]
    assert (abs(y - (x @ w.T + 1)) <= (0 if dtype == "s8" else 33 * 2.0**-24) * (abs(x) @ abs(w).T + 1)).all()
    half = text.replace("// HERE", "if (l >= 16) return;")
    assert fault(None, *given, text=half, threads=32).fault == "lanes"


def test_dynamic_shared_memory():
    body = "  d[threadIdx.x] = x[threadIdx.x];\n  __syncthreads();\n  y[threadIdx.x] = d[threadIdx.x ^ 1];"
    shared = "extern __shared__ __align__(128) float d[];"
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(run(body, x, ZEROS, shared=shared, dynamic_shared=256)[1], x[np.arange(64) ^ 1])
    found = fault(body, x, ZEROS, shared=shared, dynamic_shared=252)
    assert found.fault == "bounds" and "dynamic shared memory (252 bytes)" in str(found)


def test_a_result_that_depends_on_the_order():
    def body(_, x, y):
        with K.launch(1, 64) as (_b, t):
            K.T.evaluate(K.T.call_extern("float32", "atomicAdd", y.ptr_to([0]), x[t]))

    x = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 10.0 ** np.arange(-3, 5).repeat(8)
    kernel = K.kernel([("x", (64,), "float32"), ("y", (1,), "float32")], body)
    with pytest.raises(device.DeviceFault, match="argument 1 differs between") as caught:
        device.check_all(kernel, SM80, [x.astype(np.float32), np.zeros(1, np.float32)])
    assert caught.value.fault == "order"


def test_a_launch_no_device_takes():
    assert fault("  y[0] = 1;", threads=2048).fault == "launch"
    assert fault("  y[0] = 1;", blocks=0).fault == "launch"


def test_an_unknown_instruction_is_refused():
    with pytest.raises(CompileError, match=r"does not know the PTX instruction 'wgmma\.fence\.sync\.aligned'"):
        run('  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");')


def test_text_that_does_not_compile():
    with pytest.raises(CompileError, match="could not compile what was emitted"):
        run("  y[0] = nonsense;")


def test_an_endless_loop_and_a_crash_cost_only_their_process():
    found = fault("  while (((volatile float*)x)[0] == 0) {}", timeout=5)
    assert found.fault == "time"
    assert run("  y[threadIdx.x] = 2;")[1][0] == 2
