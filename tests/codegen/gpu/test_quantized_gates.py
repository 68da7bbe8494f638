"""Machine code of quantized products: wide loads of codes, matrix instructions, no spills."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from llmc.codegen.binaries.gates import Resources, table
from llmc.targets import toolchains

needs_tools = pytest.mark.skipif(
    bool(toolchains.missing("cuda")) or not toolchains.DISASSEMBLER.found, reason="needs llmc[cuda]"
)
FEW = (
    3  # of a product's kernels are for few rows, and read codes at memory's speed; the others multiply on matrix units
)
# Whose table is held against a golden file.
TARGETS = [
    "cuda:sm_90",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("rocm:gfx942", "rocm:gfx1100")),
    "metal",
]
GIVEN = 8  # registers of a thread are given out by so many
ROUNDED = [("int8", 0), ("int4", 32), ("int4-g128-zp", 0), ("int8-g64", 64), ("fp8", 0)]  # products of codes
FORMATS = [("int4-zp", "float16"), ("int8", "bfloat16"), ("nf4", "float16"), ("fp8-g128", "bfloat16")]
SLOW = [(name, *how) for name in ("cuda:sm_90", "rocm:gfx942", "metal") for how in FORMATS]


def multiplies_codes(name, format):
    """Integers everywhere, E4M3 numbers where the matrix unit has them."""
    return not format.startswith("fp8") or name == "cuda:sm_90"


def check(name, format, activation, rounded=None):
    """-> kernel -> what it takes."""
    # Products of codes take more steps than nvcc unrolls whole: of four it spills 16 bytes where there are zero points.
    shape = ["1024", "1024", activation] if rounded is None else ["1024", "4096", activation, str(rounded)]
    command = [sys.executable, "-m", "tests.codegen.gpu.gates_of_kernel", name, format, *shape]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    resources = json.loads(done.stdout)
    found = list(resources.values())
    if rounded is not None:  # the kernels that round x come first, before those for few rows; and before the others
        # where those multiply codes
        for i in (FEW + 1, 0) if multiplies_codes(name, format) else (0,):
            assert not (found[i]["matrix"] or found[i]["spilled"])
            del found[i]
    assert len(found) > FEW
    for i, kernel in enumerate(found):
        assert not kernel["spilled"]
        assert (kernel["matrix"] > 0) == (i >= FEW)
        assert kernel["wide_loads"] > 0 or i >= FEW
        # Two blocks of 128 threads on a multiprocessor of NVIDIA's; RDNA gives every thread of a block so many.
        assert (kernel["registers"] or 0) <= (256 if name.startswith("rocm:gfx1") else 224)
    return {kernel: Resources(**each) for kernel, each in resources.items()}


@pytest.mark.parametrize("name", TARGETS)
@needs_tools
def test_gates(name, golden):
    found = check(name, "int4", "bfloat16")
    given = {k: replace(r, registers=r.registers and -(-r.registers // GIVEN) * GIVEN) for k, r in found.items()}
    golden(f"int4-{name.replace(':', '-')}.txt", table(given))


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
