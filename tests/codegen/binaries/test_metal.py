"""Metal's rules, each broken once."""

import pytest

from llmc import targets
from llmc.codegen.binaries.metal import check, kernels, shared_bytes
from llmc.ir.errors import CompileError

GOOD = """#include <metal_stdlib>
using namespace metal;
kernel void twice(  device float* A [[ buffer(0) ]],
  device float* B [[ buffer(1) ]],
  uint threadIdx [[thread_position_in_threadgroup]]
) {
  threadgroup float4 tile[64];  // INFINITY in a comment is no matter
  B[threadIdx] = A[threadIdx] * 2.0f;
}
"""
METAL = targets.parse("metal")[0]


def test_good_source_passes():
    check("twice", GOOD, METAL)
    assert shared_bytes(GOOD) == 1024
    assert kernels(f"// Function: a\n{GOOD}\n// Function: b\n{GOOD}\n") == {"a": GOOD, "b": GOOD}


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("A[threadIdx] * 2", "float(bfloat(A[threadIdx])) * 2", "'bfloat' in line 8: bfloat came with version 3.1"),
        ("* 2.0f", "- INFINITY", "'INFINITY' in line 8: fast math has no infinities"),
        ("* 2.0f", "* NAN", "'NAN' in line 8: fast math"),
        ("float4 tile", "float8 tile", "'float8' in line 7: a vector has at most 4 lanes"),
        ("* 2.0f", "* double(2)", "'double' in line 8: there is no double"),
        ("tile[64]", "tile[2049]", "32784 bytes of threadgroup memory, where there are 32768"),
        ("buffer(1)", "buffer(2)", r"every tensor in a buffer of its own, in order, found \[0, 2\]"),
        ("void twice", "void thrice", r"expected one kernel of that name, found \['thrice'\]"),
    ],
)
def test_every_rule(before, after, why):
    with pytest.raises(CompileError, match=f"Metal kernel twice: .*{why}"):
        check("twice", GOOD.replace(before, after), METAL)


def test_too_many_buffers():
    arguments = "".join(f"device float* x{i} [[ buffer({i}) ]],\n" for i in range(2, 32))
    with pytest.raises(CompileError, match="32 buffers, where there are 31"):
        check("twice", GOOD.replace("  uint threadIdx", f"{arguments}uint threadIdx"), METAL)
