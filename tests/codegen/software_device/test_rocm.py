"""AMDGPU's LLVM IR on the software device: what is right runs, and every planted fault is told."""

import ml_dtypes
import numpy as np
import pytest

from llmc.codegen import software_device as device
from llmc.ir.errors import CompileError
from tests.codegen.software_device import kernels as K

GFX942, GFX1100, GFX1201 = (K.target(f"rocm:{arch}") for arch in ("gfx942", "gfx1100", "gfx1201"))
ZEROS = np.zeros(128, np.float32)
HEAD = """@s = private unnamed_addr addrspace(3) global [128 x float] undef, align 16
define dllexport amdgpu_kernel void @planted(ptr addrspace(1) noalias %x, ptr addrspace(1) noalias %y) #0 {
entry:
  %t = tail call i32 @llvm.amdgcn.workitem.id.x()
  %xt = getelementptr inbounds float, ptr addrspace(1) %x, i32 %t
  %yt = getelementptr inbounds float, ptr addrspace(1) %y, i32 %t
  %st = getelementptr inbounds float, ptr addrspace(3) @s, i32 %t
  %other = xor i32 %t, 64
  %so = getelementptr inbounds float, ptr addrspace(3) @s, i32 %other
"""
FENCE = 'fence syncscope("{}") {}'
RELEASE, ACQUIRE = FENCE.format("workgroup", "release"), FENCE.format("workgroup", "acquire")
BARRIER = f"{RELEASE}\ncall void @llvm.amdgcn.s.barrier()\n{ACQUIRE}"


def run(body, *args, target=GFX942, text=None, blocks=1, threads=128, **options):
    """The kernel of a body, whose first line is line 10 of the text."""
    text = text or f"{HEAD}{body}\n  ret void\n}}\n"
    args = args or (ZEROS, ZEROS)
    return device.run_text(text, "planted", target, args, blocks=[blocks], threads=[threads], **options)


def fault(body, *args, **options):
    with pytest.raises(device.DeviceFault) as caught:
        run(body, *args, **options)
    return caught.value


@pytest.mark.parametrize("target", [GFX942, GFX1100], ids=lambda t: t.arch)
def test_a_compiled_kernel_runs(target):
    """TVM's automatic barriers count, too, and are fenced as the real build's are."""
    x = np.arange(64, dtype=np.float32)
    np.testing.assert_array_equal(device.check_all(K.reverse(), target, [x, np.zeros_like(x)])[1], x[::-1])


def test_out_of_bounds_in_a_compiled_kernel():
    with pytest.raises(device.DeviceFault) as caught:
        device.run(K.copy(reach=1), GFX942, [ZEROS, ZEROS])
    assert (caught.value.fault, caught.value.thread) == ("bounds", (63, 0, 0))
    assert "load float" in caught.value.text


def test_out_of_bounds():
    body = "  %v = load float, ptr addrspace(1) %xt, align 4\n"
    body += "  %up = getelementptr float, ptr addrspace(1) %yt, i64 1\n  store float %v, ptr addrspace(1) %up, align 4"
    found = fault(body)
    assert (found.fault, found.line, found.thread) == ("bounds", 12, (127, 0, 0))
    body = "  %up = getelementptr float, ptr addrspace(3) %st, i32 1\n  store float 0.0, ptr addrspace(3) %up, align 4"
    assert fault(body).fault == "bounds"


EXCHANGE = """  store float 0.000000e+00, ptr addrspace(3) %st, align 4
{first}
  %v = load float, ptr addrspace(1) %xt, align 4
  store float %v, ptr addrspace(3) %st, align 4
{second}
  %o = load float, ptr addrspace(3) %so, align 4
  store float %o, ptr addrspace(1) %yt, align 4"""


def test_barriers():
    x = np.arange(128, dtype=np.float32)
    result = run(EXCHANGE.format(first=BARRIER, second=BARRIER), x, ZEROS)[1]
    np.testing.assert_array_equal(result, x[np.arange(128) ^ 64])


@pytest.mark.parametrize("second", ["", "call void @llvm.amdgcn.s.barrier()", "call void @llvm.amdgcn.wave.barrier()"])
def test_a_barrier_that_is_missing_or_waits_for_no_writes(second):
    """A bare s_barrier does not wait for what was written to shared memory."""
    found = fault(EXCHANGE.format(first=BARRIER, second=second))
    assert found.fault == "race" and "no barrier that both pass" in str(found)


def test_a_wave_does_not_run_in_step():
    """Lanes of one wave exchange values in shared memory: with fences round the wave's barrier, or not at all."""
    near = EXCHANGE.replace("%so,", "%near,")
    near = "  %one = xor i32 %t, 1\n  %near = getelementptr inbounds float, ptr addrspace(3) @s, i32 %one\n" + near
    fences = [FENCE.format("wavefront", order) for order in ("release", "acquire")]
    wave = f"{fences[0]}\ncall void @llvm.amdgcn.wave.barrier()\n{fences[1]}"
    run(near.format(first=wave, second=wave))
    assert fault(near.format(first=wave, second="call void @llvm.amdgcn.wave.barrier()")).fault == "race"
    assert fault(near.format(first=wave, second="")).fault == "race"


def test_reading_what_nothing_wrote():
    body = "  %o = load float, ptr addrspace(3) %so, align 4\n  store float %o, ptr addrspace(1) %yt, align 4"
    found = fault(body)
    assert (found.fault, found.line) == ("uninitialised", 10)


def test_a_barrier_that_not_all_reach():
    body = f"  %few = icmp ult i32 %t, 40\n  br i1 %few, label %in, label %out\nin:\n{BARRIER}\n  br label %out\nout:"
    found = fault(body)
    assert (found.fault, found.line) == ("barrier", 14)


PERMUTE = """  %v = load i32, ptr addrspace(1) %xt, align 4
  %lane = {lane}
  %from = shl i32 %lane, 2
  %o = tail call i32 @llvm.amdgcn.ds.bpermute(i32 %from, i32 %v)
  store i32 %o, ptr addrspace(1) %yt, align 4"""


@pytest.mark.parametrize("target", [GFX942, GFX1100], ids=lambda t: t.arch)
def test_permutes(target):
    lane = f"and i32 %t, {target.warp - 1}"
    body = (
        PERMUTE.format(lane=lane)
        .replace("%lane, 2", "%near, 2")
        .replace("  %from", "  %near = xor i32 %lane, 3\n  %from")
    )
    x = np.arange(128, dtype=np.float32)
    np.testing.assert_array_equal(run(body, x, ZEROS, target=target)[1], x[np.arange(128) ^ 3])
    found = fault(PERMUTE.format(lane=f"add i32 0, {target.warp}"), target=target)
    assert (found.fault, found.line) == ("shuffle", 13)


def test_permutes_of_lanes_that_take_no_part():
    guarded = PERMUTE.format(lane="add i32 0, 1").replace(
        "  %lane", "  br i1 %odd, label %in, label %out\nin:\n  %lane"
    )
    found = fault("  %bit = trunc i32 %t to i1\n  %odd = xor i1 %bit, true\n" + guarded + "\n  br label %out\nout:")
    assert found.fault == "shuffle"


UNITS = {
    "mfma": (GFX942, 64, 4, 4, lambda lane, j: lane // 16 * 4 + j, lambda lane, j: lane // 16 * 4 + j),
    "wmma11": (GFX1100, 32, 16, 8, lambda lane, j: j, lambda lane, j: 2 * j + lane // 16),
    "wmma12": (GFX1201, 32, 8, 8, lambda lane, j: lane // 16 * 8 + j, lambda lane, j: lane // 16 * 8 + j),
}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("unit", UNITS)
def test_matrix_units(unit, dtype):
    """A lane's operands lie one behind the other in x: a, b; its sums in y. Layouts as the ISA manuals draw them."""
    target, lanes, count, sums, depth, row = UNITS[unit]
    element = "half" if dtype == np.float16 else "i16"
    name = "mfma.f32.16x16x16f16" if unit == "mfma" else "wmma.f32.16x16x16.f16"
    name = name if dtype == np.float16 else name.replace("16f16", "16bf16.1k").replace(".f16", ".bf16")
    extra = ", i32 0, i32 0, i32 0" if unit == "mfma" else ""
    vector, result = f"<{count} x {element}>", f"<{sums} x float>"
    text = f"""define amdgpu_kernel void @planted(ptr addrspace(1) %x, ptr addrspace(1) %y) {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %xt = getelementptr [{2 * count} x {element}], ptr addrspace(1) %x, i32 %t
  %a = load {vector}, ptr addrspace(1) %xt, align 4
  %xb = getelementptr {element}, ptr addrspace(1) %xt, i32 {count}
  %b = load {vector}, ptr addrspace(1) %xb, align 4
  %d = call {result} @llvm.amdgcn.{name}({vector} %a, {vector} %b, {result} splat (float 1.0){extra})
  %yt = getelementptr {result}, ptr addrspace(1) %y, i32 %t
  store {result} %d, ptr addrspace(1) %yt, align 4
  ret void
}}
"""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((16, 16)).astype(dtype) for _ in range(2))
    x = np.zeros((lanes, 2, count), dtype)
    for lane in range(lanes):
        for j in range(count):
            x[lane, 0, j], x[lane, 1, j] = a[lane % 16, depth(lane, j)], b[depth(lane, j), lane % 16]
    y = run(None, x, device.Unwritten((lanes, sums), "float32"), text=text, threads=lanes, target=target)[1]
    expected = 1 + a.astype(np.float32) @ b.astype(np.float32)
    for lane in range(lanes):
        for j in range(sums):
            assert abs(y[lane, j] - expected[row(lane, j), lane % 16]) < 1e-4
    found = fault(None, x, y, text=text, threads=lanes // 2, target=target)
    assert found.fault == "lanes"


BYTES = {  # name, target, lanes, bytes of an operand, sums, depth of a product, first depth and row of a lane's
    "mfma 16": ("mfma.i32.16x16x16i8", K.target("rocm:gfx90a"), 64, 4, 4, 16, UNITS["mfma"][4], UNITS["mfma"][5]),
    "mfma 32": ("mfma.i32.16x16x32.i8", GFX942, 64, 8, 4, 32, lambda lane, j: lane // 16 * 8 + j, UNITS["mfma"][5]),
    "wmma11": ("wmma.i32.16x16x16.iu8.v8i32.v4i32", GFX1100, 32, 16, 8, 16, *UNITS["wmma11"][4:]),
    "wmma12": ("wmma.i32.16x16x16.iu8.v8i32.v2i32", GFX1201, 32, 8, 8, 16, *UNITS["wmma12"][4:]),
}


def bytes_product(unit):
    """Text of a wave's product of bytes, and what `BYTES` says of it."""
    name, target, lanes, size, sums, *rest = BYTES[unit]
    operand = {4: "i32", 8: "i64"}[size] if unit.startswith("mfma") else f"<{size // 4} x i32>"
    result = f"<{sums} x i32>"
    given = f"{operand} %a, {operand} %b, {result} splat (i32 1), i32 0, i32 0, i32 0"
    if unit.startswith("wmma"):
        given = f"i1 true, {operand} %a, i1 true, {operand} %b, {result} splat (i32 1), i1 false"
    text = f"""define amdgpu_kernel void @planted(ptr addrspace(1) %x, ptr addrspace(1) %y) {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %xt = getelementptr [{2 * size} x i8], ptr addrspace(1) %x, i32 %t
  %a = load {operand}, ptr addrspace(1) %xt, align 4
  %xb = getelementptr i8, ptr addrspace(1) %xt, i32 {size}
  %b = load {operand}, ptr addrspace(1) %xb, align 4
  %d = call {result} @llvm.amdgcn.{name}({given})
  %yt = getelementptr {result}, ptr addrspace(1) %y, i32 %t
  store {result} %d, ptr addrspace(1) %yt, align 4
  ret void
}}
"""
    return text, target, lanes, size, sums, *rest


@pytest.mark.parametrize("unit", BYTES)
def test_matrix_units_of_bytes(unit):
    text, target, lanes, size, sums, deep, depth, row = bytes_product(unit)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (16, deep)).astype(np.int8), rng.integers(-128, 128, (deep, 16)).astype(np.int8)
    x = np.zeros((lanes, 2, size), np.int8)
    for lane in range(lanes):
        for j in range(size):
            x[lane, 0, j], x[lane, 1, j] = a[lane % 16, depth(lane, j)], b[depth(lane, j), lane % 16]
    y = run(None, x, device.Unwritten((lanes, sums), "int32"), text=text, threads=lanes, target=target)[1]
    expected = 1 + a.astype(np.int64) @ b.astype(np.int64)
    assert all(y[t, j] == expected[row(t, j), t % 16] for t in range(lanes) for j in range(sums))
    assert fault(None, x, y, text=text, threads=lanes // 2, target=target).fault == "lanes"
    flag = ("i1 true, <", "i1 false, <") if unit.startswith("wmma") else ("i32 0)", "i32 1)")
    with pytest.raises(CompileError, match="with modifiers"):
        run(None, x, y, text=text.replace(*flag), threads=lanes, target=target)
    if unit == "wmma11":
        x[20, 0, 3] ^= 1
        found = fault(None, x, y, text=text, threads=lanes, target=target)
        assert found.fault == "lanes" and "hold the same rows" in str(found)


def test_lanes_of_a_wmma_that_should_agree():
    text = """define amdgpu_kernel void @planted(ptr addrspace(1) %x, ptr addrspace(1) %y) {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %h = uitofp i32 %t to half
  %a = insertelement <16 x half> zeroinitializer, half %h, i32 0
  %d = call SUMS @llvm.amdgcn.wmma.f32.16x16x16.f16(<16 x half> %a, <16 x half> %a, SUMS zeroinitializer)
  %yt = getelementptr <8 x float>, ptr addrspace(1) %y, i32 %t
  store <8 x float> %d, ptr addrspace(1) %yt, align 4
  ret void
}
""".replace("SUMS", "<8 x float>")
    found = fault(None, ZEROS, np.zeros((32, 8), np.float32), text=text, threads=32, target=GFX1100)
    assert found.fault == "lanes" and "hold the same rows" in str(found)


def test_an_unknown_instruction_is_refused():
    with pytest.raises(CompileError, match=r"\(line 10\): llvm\.amdgcn\.ds\.swizzle"):
        run("  %v = call i32 @llvm.amdgcn.ds.swizzle(i32 %t, i32 0)")
