"""Faults planted in the text of a real product kernel, after the emitter: each is caught, in every language."""

import ml_dtypes
import numpy as np
import pytest

from llmc.codegen.gpu.matmul import matmul
from llmc.codegen.software_device import DeviceFault, Unwritten, run
from tests.codegen.software_device import kernels as K

ROWS, COLUMNS, DEPTH = 70, 128, 160
TARGETS = {"cuda": "cuda:sm_80", "metal": "metal", "rocm": "rocm:gfx942", "rocm, 32 lanes": "rocm:gfx1100"}
BARRIERS = {
    "cuda": "__syncthreads();",
    "metal": "threadgroup_barrier(mem_flags::mem_threadgroup);",
    "rocm": "tail call void @llvm.amdgcn.s.barrier()",
}


def product(kind, edit=None, strict=True, **options):
    target = K.target(TARGETS[kind])
    kernel = matmul(target, COLUMNS, DEPTH, weight="bfloat16", activation="bfloat16")
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((ROWS, DEPTH), (COLUMNS, DEPTH)))
    y = run(kernel, target, [x, w, Unwritten((ROWS, COLUMNS), "bfloat16")], edit=edit, strict=strict, **options)[2]
    truth = x.astype(np.float64) @ w.astype(np.float64).T
    return np.abs(y.astype(np.float64) - truth).max() / np.abs(truth).max()


def fault(kind, *edit, **options):
    with pytest.raises(DeviceFault) as caught:
        product(kind, edit, **options)
    return caught.value


@pytest.mark.parametrize("kind", TARGETS)
def test_missing_barriers(kind):
    old = BARRIERS[kind.split(",")[0]]
    found = fault(kind, old, ";" if old.endswith(";") else "", None)
    assert found.fault in ("race", "uninitialised") and found.line > 0


@pytest.mark.parametrize("kind", ["rocm"])
@pytest.mark.parametrize("order", ["release", "acquire"])
def test_barriers_that_do_not_wait_for_writes(kind, order):
    """TVM's own barrier, as it was before fences were put round it."""
    assert fault(kind, f'fence syncscope("workgroup") {order}', "", None).fault == "race"


@pytest.mark.parametrize("copies", ["late", "early"])
def test_missing_waits(copies):
    found = fault("cuda", "cp.async.wait_group ", "cp.async.wait_group 9", None, copies=copies)
    assert found.fault == "copy" and "has not waited for" in str(found)


def test_nothing_planted_and_without_checks():
    assert product("cuda") < 4e-3
    assert product("cuda", strict=False) < 4e-3


def test_an_edit_that_finds_nothing():
    with pytest.raises(RuntimeError, match="expected more than 0 of 'nowhere' in the emitted text, found 0"):
        product("cuda", ("nowhere", "", None))
