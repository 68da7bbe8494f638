"""Row kernels of GPUs on the software device, strictly, against reference evaluation: every rule, every statement."""

import numpy as np
import pytest

from tests.codegen import test_fuse_rows
from tests.codegen.gpu.emission import target

SIZES = (1, 3)
# Of sine and cosine: machine._sine is within 2e-7 of angles of up to 2**22, and the case turns its rows by them.
TOLERANCE = {name: max(case[2], 1e-6 if case[2] else 0) for name, case in test_fuse_rows.CASES.items()}


def run_all(kind):
    """-> case -> for every size, (results in forward order, in reverse order, of the reference)."""
    import tvm
    from tvm import relax

    from llmc.codegen.backend import backend
    from llmc.codegen.fuse_rows import _Fuse
    from llmc.codegen.legalize import Legalize
    from llmc.codegen.library import machine_code
    from llmc.codegen.software_device import device
    from llmc.ir.evaluate import Reference
    from llmc.passes.goal import Goal

    device.install(kind, strict=True)  # first of all: TVM keeps the device of a kind that is there when it first asks
    facts = target(kind)
    module, kernels = test_fuse_rows.module(), {}
    for name in test_fuse_rows.CASES:
        module = _Fuse(module, name, backend(facts), kernels).run()
    module = Legalize().run(module, Goal(target=facts))
    executable, _ = machine_code(module, tvm.target.Target(facts.tvm(), host={"kind": "llvm"}))
    plain, here = Reference(test_fuse_rows.module()), tvm.device(kind, 0)
    there = Reference.__new__(Reference)
    there.machine = relax.VirtualMachine(executable, here)

    def listed(value):
        return [v.astype("float32") for v in (value if isinstance(value, tuple) else (value,))]

    found = {}
    for name in test_fuse_rows.CASES:
        found[name] = []
        for n in SIZES:
            data, results = test_fuse_rows.data(name, n), []
            for order in ("forward", "reverse"):
                device.configure(order=order)
                placed = [tvm.runtime.tensor(np.ascontiguousarray(array), device=here) for array in data]
                try:
                    results.append(listed(there(*placed, function=name)))
                except Exception as error:
                    raise (device.last_fault() or error) from None
            found[name].append((*results, listed(plain(*data, function=name))))
    return found


@pytest.fixture(
    scope="module",
    params=["cuda", pytest.param("rocm", marks=pytest.mark.slow), pytest.param("metal", marks=pytest.mark.slow)],
)
def results(request):
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(run_all, (request.param,)).get(timeout=580)


@pytest.mark.parametrize("name", test_fuse_rows.CASES)
def test_kernel_equals_reference(results, name):
    for forward, reverse, expected in results[name]:
        for a, b, e in zip(forward, reverse, expected, strict=True):
            assert a.shape == e.shape
            assert np.array_equal(a, b)
            assert np.abs(a - e).max() <= TOLERANCE[name] * max(np.abs(e).max(), 1)


@pytest.mark.parametrize("name", test_fuse_rows.CASES)
def test_a_row_is_the_same_bits_beside_others(results, name):
    rows = {"rows_asked_for": 0}.get(name, 1)
    (one, _, _), (many, _, _) = results[name]
    for a, b in zip(one, many, strict=True):
        assert (a[:rows] == b[: len(a)][:rows]).all()
