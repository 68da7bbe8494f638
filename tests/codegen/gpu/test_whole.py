"""A small llama lowered for a GPU, on the software device, strictly, against the plain loops that go with it."""

import numpy as np
import pytest

from tests.codegen.conftest import Array
from tests.codegen.gpu.emission import target
from tests.codegen.ragged import Llama, tables

# Tokens that two sequences have, and get: prefill, then prefill beside decode.
BATCHES = ([(0, 5), (0, 3)], [(5, 1), (3, 2)])


def run(kind, dtype):
    """-> for every step, (logits of the kernels, of the reference); and what functions are left in the module."""
    import tvm
    from tvm import relax

    from llmc import codegen
    from llmc.codegen.library import machine_code
    from llmc.codegen.software_device import device
    from llmc.codegen.weights import Recipe, numpy_dtype
    from llmc.ir.evaluate import Reference
    from llmc.passes.goal import Goal

    facts = target(kind)
    model = Llama(layers=1, dtype=dtype, checkpoint="bfloat16", token_last=False)
    lowered = codegen.lower(model.module, Goal(target=facts, dtype=dtype, page_size=4))
    device.install(kind, strict=True)
    executable, _ = machine_code(lowered.module, tvm.target.Target(facts.tvm(), host={"kind": "llvm"}))
    machines = [
        (relax.VirtualMachine(executable, tvm.device(kind, 0)), tvm.device(kind, 0)),
        (Reference(lowered.reference).machine, tvm.cpu()),
    ]
    sources = {name: Array(value) for name, value in model.weights.items()}
    weights = {
        name: np.concatenate(list(Recipe(f, sources).slices())).view(numpy_dtype(str(f.ret_ty.dtype)))
        for name, f in lowered.recipes.items()
    }
    pools = [pool.numpy() for pool in model.pools()]
    found = [[] for _ in BATCHES]
    for machine, here in machines:

        def put(array, here=here):
            return tvm.runtime.tensor(np.ascontiguousarray(array), device=here)

        held = {f: [put(weights[n]) for n in names] for f, names in lowered.weights.items() if f != "sample"}
        pages = [put(pool) for pool in pools]
        for step, batch in enumerate(BATCHES):
            positions, qo, *table = tables(batch)
            rows = np.arange(qo[-1], dtype="int32")
            tokens = (np.arange(qo[-1], dtype="int32") * 7 + step) % 96
            hidden = machine["embed"](put(tokens), held["embed"])
            arguments = (positions, qo, rows, *table)
            found[step].append(machine["step"](hidden, *map(put, arguments), pages, held["step"]).numpy())
    return found


@pytest.mark.parametrize(
    "kind", ["cuda", pytest.param("rocm", marks=pytest.mark.slow), pytest.param("metal", marks=pytest.mark.slow)]
)
# float32: other orders of sums. Half precision: a layer rounds a dozen values, at other places than the plain loops do.
@pytest.mark.parametrize(
    "dtype, bound", [("float32", 1e-5), ("bfloat16", 4e-2), pytest.param("float16", 5e-3, marks=pytest.mark.slow)]
)
def test_a_step_is_what_the_plain_loops_compute(kind, dtype, bound, isolated):
    for kernels, plain in isolated(run, kind, dtype, timeout=400):
        assert np.isfinite(kernels).all()
        assert np.abs(kernels - plain).max() <= bound * (plain.max() - plain.min())
