"""Machine code of quantized products: wide loads of codes, matrix instructions, no spills."""

import json
import subprocess
import sys

import pytest

from llmc.targets import toolchains

needs_tools = pytest.mark.skipif(
    bool(toolchains.missing("cuda")) or not toolchains.DISASSEMBLER.found, reason="needs llmc[cuda]"
)
FEW = (
    3  # of a product's kernels are for few rows, and read codes at memory's speed; the others multiply on matrix units
)
QUICK = [("cuda:sm_90", "int4", "bfloat16"), ("metal", "int4", "bfloat16")]
FORMATS = [("int4-zp", "float16"), ("int8", "bfloat16"), ("nf4", "float16"), ("fp8-g128", "bfloat16")]
SLOW = [
    ("rocm:gfx942", "int4", "bfloat16"),
    *((name, *how) for name in ("cuda:sm_90", "rocm:gfx942", "metal") for how in FORMATS),
]


def check(name, format, activation):
    command = [sys.executable, "-m", "tests.codegen.gpu.gates_of_kernel", name, format, "1024", "1024", activation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = list(json.loads(done.stdout).values())
    assert len(found) > FEW
    for i, kernel in enumerate(found):
        assert not kernel["spilled"]
        assert (kernel["matrix"] > 0) == (i >= FEW)
        assert kernel["wide_loads"] > 0 or i >= FEW
        assert (kernel["registers"] or 0) <= 224  # two blocks of 128 threads on a multiprocessor of NVIDIA's


@pytest.mark.parametrize(("name", "format", "activation"), QUICK)
@needs_tools
def test_gates(name, format, activation):
    check(name, format, activation)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format", "activation"), SLOW)
@needs_tools
def test_all_gates(name, format, activation):
    check(name, format, activation)
