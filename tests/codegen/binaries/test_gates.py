"""What is read from machine code, from code objects and from Metal's source."""

import pytest

from llmc import targets
from llmc.codegen.binaries import cuda, gates, rocm
from llmc.codegen.binaries.device_code import DeviceCode
from llmc.codegen.binaries.gates import Resources, occupancy, resources, table
from llmc.codegen.binaries.msgpack import unpack
from llmc.ir.errors import CompileError
from llmc.targets import toolchains
from tests.codegen.binaries.test_metal import GOOD

needs_tools = pytest.mark.skipif(
    bool(toolchains.missing("cuda")) or not toolchains.DISASSEMBLER.found, reason="needs llmc[cuda]"
)

SOURCE = """
extern "C" __global__ void __launch_bounds__(128) copy(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void __launch_bounds__(32) multiply(const unsigned* x, float* y) {
  const unsigned* a = x + threadIdx.x;
  float4 c = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
  y[threadIdx.x] = c.x + c.y + c.z + c.w;
}
extern "C" __global__ void __launch_bounds__(256) spill(float* y, int n) {
  float local[64] = {0};
  for (int i = 0; i < 64; ++i) local[(n * i) & 63] += y[i];
  y[threadIdx.x] = local[threadIdx.x & 63];
}
extern "C" __global__ void __launch_bounds__(64) turn(float* y) {
  __shared__ float s[512];
  for (int i = threadIdx.x; i < 512; i += 64) s[i] = y[i];
  __syncthreads();
  y[threadIdx.x] = s[511 - threadIdx.x];
}
"""


@needs_tools
def test_cubins():
    [target] = targets.parse("cuda:sm_80", "linux-x86_64")
    binary = cuda.compile(SOURCE, "sm_80")
    threads = {name: int(count) for count, name in cuda.BOUNDS.findall(SOURCE)}
    found = resources(DeviceCode({}, [binary], cuda.kernels(binary), threads), target)
    assert list(found) == ["copy", "multiply", "spill", "turn"]
    assert found["copy"].wide_loads == 1 and found["copy"].matrix == 0 and found["copy"].spilled == 0
    assert found["multiply"].matrix == 1 and found["multiply"].threads == 32
    assert found["spill"].spilled == 256
    assert found["turn"].shared >= 2048 and found["turn"].occupancy == 1.0
    assert found["copy"].occupancy == 1.0 and found["multiply"].occupancy == 0.5  # 32 blocks of 32 threads


def test_metal():
    [target] = targets.parse("metal")
    text = GOOD.replace("B[threadIdx] =", "*(threadgroup float4*)(tile) = *(device float4*)(A);\n  B[threadIdx] =")
    text = text.replace("}\n", "  simdgroup_multiply_accumulate(d, a, b, c);\n}\n")
    found = resources(DeviceCode({}, [], {"twice": text.encode()}), target)
    assert found == {"twice": Resources(None, None, 1024, None, 1, 1, None)}


def test_occupancy_of_known_cases():
    cuda_target = targets.parse("cuda:sm_90", "linux-x86_64")[0]
    assert occupancy(cuda_target, 32, 0, 256) == 1.0
    assert occupancy(cuda_target, 255, 0, 128) == 0.125  # 2 blocks of 4 warps, of 64
    assert occupancy(cuda_target, 32, 100 << 10, 256) == 0.25  # two blocks by shared memory
    cdna, rdna = targets.parse("rocm", "linux-x86_64")
    assert occupancy(cdna, 64, 0, 256) == 1.0 and occupancy(cdna, 65, 0, 256) == 7 / 8
    assert occupancy(cdna, 512, 0, 256) == 1 / 8
    assert occupancy(rdna, 96, 0, 256) == 1.0 and occupancy(rdna, 256, 0, 256) == 0.25
    assert occupancy(cdna, 32, 32 << 10, 256) == 0.25


def test_table_is_for_people():
    found = {"matmul": Resources(63, 0, 9728, 256, 64, 16, 0.5), "twice": Resources(None, None, 0, None, 0, 0, None)}
    lines = table(found).splitlines()
    assert lines[0].startswith("kernel  registers  spilled  shared  threads  occupancy  matrix  16-byte loads")
    assert lines[1].split() == ["matmul", "63", "0", "9728", "256", "50%", "64", "16"]
    assert lines[2].split() == ["twice", "0", "0", "0"]


def test_missing_tools_are_named(monkeypatch):
    [target] = targets.parse("cuda:sm_80", "linux-x86_64")
    monkeypatch.setattr(toolchains, "locate", lambda module, path: None)
    with pytest.raises(CompileError, match=r"needs cuobjdump, which is not installed: pip install 'llmc\[cuda\]'"):
        gates.resources(DeviceCode({}, [b"x"], {}), target)


def test_blocks_that_would_not_be_launched_are_refused():
    [target] = targets.parse("rocm:gfx942", "linux-x86_64")
    rocm.check_block_sizes({"small": 256}, target)
    with pytest.raises(CompileError, match="kernel large has blocks of 512 threads; rocm:gfx942 has 256 at most"):
        rocm.check_block_sizes({"large": 512}, target)


def test_message_pack():
    data = b"\x83\xa1a\x93\x01\xff\xcd\x01\x00\xa1b\xc3\xd9\x01c\xdc\x00\x01\xc0"
    assert unpack(data) == {"a": [1, -1, 256], "b": True, "c": [None]}
    assert unpack(b"\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00") == 1.0 and unpack(b"\xc4\x02ab") == b"ab"
    assert unpack(b"\xde\x00\x01\xa1k\xce\x00\x01\x00\x00") == {"k": 65536}
    with pytest.raises(ValueError, match="unexpected type 0xc1 at byte 0"):
        unpack(b"\xc1")
