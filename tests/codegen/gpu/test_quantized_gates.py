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
ROUNDED = [("int8", 0), ("int4", 32), ("int4-g128-zp", 0), ("int8-g64", 64)]  # products of codes
FORMATS = [("int4-zp", "float16"), ("int8", "bfloat16"), ("nf4", "float16"), ("fp8-g128", "bfloat16")]
SLOW = [
    ("rocm:gfx942", "int4", "bfloat16"),
    *((name, *how) for name in ("cuda:sm_90", "rocm:gfx942", "metal") for how in FORMATS),
]


def check(name, format, activation, rounded=None):
    shape = ["1024", "1024", activation] + ([] if rounded is None else [str(rounded)])
    command = [sys.executable, "-m", "tests.codegen.gpu.gates_of_kernel", name, format, *shape]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = list(json.loads(done.stdout).values())
    if rounded is not None:  # the kernels that round x come first, before those for few rows and before the others
        assert not (found[0]["matrix"] or found[0]["spilled"] or found[FEW + 1]["matrix"] or found[FEW + 1]["spilled"])
        del found[FEW + 1], found[0]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cuda:sm_80", "cuda:sm_90", "rocm:gfx90a", "rocm:gfx942", "rocm:gfx1100", "rocm:gfx1201"]
)
@pytest.mark.parametrize(("format", "rounded"), ROUNDED)
@needs_tools
def test_gates_of_codes(name, format, rounded):
    check(name, format, "bfloat16", rounded)
