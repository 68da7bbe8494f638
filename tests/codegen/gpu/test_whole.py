"""A small llama lowered for a GPU, on the software device, strictly, against the plain loops that go with it; with its
weights quantized, against the textbook program over what the codes stand for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tests.codegen.conftest import Array
from tests.codegen.gpu.emission import target
from tests.codegen.ragged import Llama, tables

# Tokens that two sequences have, and get: prefill, then prefill beside decode.
BATCHES = ([(0, 5), (0, 3)], [(5, 1), (3, 2)])


def built(kind, model):
    """-> the model lowered; the software device's virtual machine; the packed weights."""
    from llmc.passes.goal import Goal

    sources = {name: Array(value) for name, value in model.weights.items()}
    return placed(kind, model.module, Goal(target=target(kind), dtype=model.dtype, page_size=4), sources)


def placed(kind, module, goal, sources):
    """`built`, of a module in the ragged form and what its weights are made of."""
    import tvm
    from tvm import relax

    from llmc import codegen
    from llmc.codegen.library import machine_code
    from llmc.codegen.software_device import device
    from llmc.codegen.weights import Recipe, numpy_dtype

    # First of all: TVM keeps the device of a kind that is there when it first asks, and that may be the HIP plugin's.
    device.install(kind, strict=True)
    lowered = codegen.lower(module, goal)
    executable, _ = machine_code(lowered.module, tvm.target.Target(goal.target.tvm(), host={"kind": "llvm"}))
    weights = {
        name: np.concatenate(list(Recipe(f, sources).slices())).view(numpy_dtype(str(f.ret_ty.dtype)))
        for name, f in lowered.recipes.items()
    }
    return lowered, relax.VirtualMachine(executable, tvm.device(kind, 0)), weights


def run(kind, dtype, cache=""):
    """-> for every step, (logits of the kernels, of the reference)."""
    import tvm

    from llmc.ir.evaluate import Reference

    model = Llama(layers=1, dtype=dtype, checkpoint="bfloat16", token_last=False, cache=cache)
    lowered, device, weights = built(kind, model)
    machines = [(device, tvm.device(kind, 0)), (Reference(lowered.reference).machine, tvm.cpu())]
    pools = [pool.numpy() for pool in model.pools()]
    found = [[] for _ in BATCHES]
    for machine, here in machines:

        def put(array, here=here):
            return tvm.runtime.tensor(np.ascontiguousarray(array), device=here)

        held = {f: [put(weights[n]) for n in lowered.weights[f]] for f in ("embed", "step")}
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


@pytest.mark.parametrize(
    "kind, cache",
    [
        ("cuda", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("cuda", "fp8"), ("rocm", "fp8"), ("metal", "int8"))
        ),
    ],
)
def test_a_step_over_a_quantized_cache(kind, cache, isolated):
    """float32: a number between two codes may become the other one, a step of 2**-7 or 2**-4 of one number of a key."""
    for kernels, plain in isolated(run, kind, "float32", cache, timeout=400):
        assert np.isfinite(kernels).all()
        assert np.abs(kernels - plain).max() <= {"int8": 1e-3, "fp8": 1e-2}[cache] * (plain.max() - plain.min())


# Prefill, prefill beside decode, decode: the tokens that two sequences have, and get.
STEPS = (*BATCHES, [(6, 1), (5, 1)])


def over_codes(kind, dtype, quantize):
    """-> of every sequence, (logits of the kernels over codes, of the float32 textbook program over the same codes)."""
    import tvm

    from llmc import quantization
    from llmc.codegen.weights import numpy_dtype
    from llmc.ir.evaluate import Reference
    from llmc.passes import manager
    from llmc.passes.goal import Goal
    from llmc.passes.pipeline import PIPELINE
    from tests.decoders import Decoder

    shape = dict(layers=1, hidden=64, head_dim=16, v_dim=16, intermediate=96, vocab=96, stored="bfloat16")
    model = Decoder(**shape, dtype=dtype)
    facts = SimpleNamespace(module=model.module)
    plan = quantization.plan(facts, quantization.parse(quantize), smallest=1, narrowest=1)
    assert len(plan.schemes) == 9  # q, k, v, o, gate, up, down, embedding, head
    sources = quantization.EncodedWeights({name: Array(value) for name, value in model.weights.items()}, plan)
    goal = Goal(target=target(kind), dtype=dtype, page_size=4, schemes=plan.schemes)
    lowered, machine, weights = placed(kind, manager.run(model.module, goal).module, goal, sources)

    def put(array):
        return tvm.runtime.tensor(np.ascontiguousarray(array), device=tvm.device(kind, 0))

    held = {f: [put(weights[name]) for name in lowered.weights[f]] for f in ("embed", "step")}
    [state] = json.loads(lowered.module["step"].attrs["llmc.state"])
    pools = [put(np.full((32, *t["shape"]), 9, numpy_dtype(t["dtype"]))) for t in state["tensors"]]
    sequences = (np.arange(14, dtype="int32") * 7 % 96).reshape(2, 7)
    found = [[], []]
    for batch in STEPS:
        positions, qo, *table = tables(batch)
        tokens = np.concatenate([s[start : start + new] for s, (start, new) in zip(sequences, batch, strict=True)])
        hidden = machine["embed"](put(tokens), held["embed"])
        rows = np.arange(qo[-1], dtype="int32")
        logits = machine["step"](hidden, *map(put, (positions, qo, rows, *table)), pools, held["step"]).numpy()
        for i in range(2):
            found[i].append(logits[qo[i] : qo[i + 1]])
    plain = manager.run(Decoder(**shape).module, Goal(schemes=plan.schemes), stages=PIPELINE[:2]).module
    parts = [sources[str(name)].read() for name in plain["main"].attrs["llmc.weights"]]
    reference = Reference(plain)
    expected = [reference(s, np.arange(7, dtype="int32"), *parts) for s in sequences]
    return [(np.concatenate(parts), e[: len(np.concatenate(parts))]) for parts, e in zip(found, expected, strict=True)]


# The kinds of decoding (integers, with zero points, in planes, tables, powers of two), of rounding, and of kernels.
CODES = [("cuda", "bfloat16", "int4"), ("metal", "float16", "w8a8")]
MORE_CODES = [
    ("cuda", "float32", "int4-g32-zp:head=nf4"),
    ("cuda", "float16", "mxfp4:head=fp8"),
    ("cuda", "bfloat16", "w8a8"),
    ("rocm", "float32", "int4-g32-a8"),
    ("rocm", "bfloat16", "int4"),
    ("rocm", "float16", "fp8"),
    ("rocm", "bfloat16", "nf4:head=int3-g32-zp"),
    ("metal", "float32", "fp8:head=int4-g16"),
    ("metal", "float16", "int4:head=mxfp4"),
    ("metal", "float16", "int3-g32"),
]


@pytest.mark.parametrize(
    "kind, dtype, quantize", [*CODES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CODES)]
)
def test_steps_over_codes(kind, dtype, quantize, isolated):
    """Bounds as above; of rounded activations a number between two codes may become the other one, 2**-7 of the
    largest beside it.
    """
    bound = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}[dtype]
    bound += 1e-2 if "a8" in quantize else 0
    for kernels, textbook in isolated(over_codes, kind, dtype, quantize, timeout=500):
        assert len(kernels) in (6, 7) and np.isfinite(kernels).all() and textbook.std() > 0.1
        assert np.abs(kernels - textbook).max() <= bound * (textbook.max() - textbook.min())


TOKENS = (np.arange(21, dtype="int32") * 11) % 96
# What a sequence gets in each step, beside others that are so long and get so many.
SCENES = {
    "alone, at once": [((0, 21), [])],
    "in a batch": [((0, 21), [(0, 6), (4, 1)])],
    "in pieces": [((0, 13), []), ((13, 5), [(3, 1), (0, 9)]), ((18, 3), [])],
    "token by token at last": [((0, 18), []), ((18, 1), []), ((19, 1), [(7, 1), (2, 1)]), ((20, 1), [(0, 12)])],
}


def scenes(kind, dtype, window):
    """-> of every scene, the sequence's logits [21, vocab]."""
    import tvm

    model = Llama(layers=1, dtype=dtype, checkpoint="bfloat16", token_last=False, window=window)
    lowered, machine, weights = built(kind, model)

    def put(array):
        return tvm.runtime.tensor(np.ascontiguousarray(array), device=tvm.device(kind, 0))

    assert "embed_invariant" not in lowered.weights  # it has no products
    held = {f: [put(weights[n]) for n in lowered.weights[f]] for f in ("embed", "step_invariant")}
    found = {}
    for name, steps in SCENES.items():
        pools = [put(pool.numpy()) for pool in model.pools()]
        rows = []
        for own, others in steps:
            positions, qo, *table = tables([own, *others])
            tokens = np.concatenate([TOKENS[own[0] : sum(own)], np.arange(qo[-1] - own[1], dtype="int32")])
            hidden = machine["embed"](put(tokens), held["embed"])
            given = (positions, qo, np.arange(qo[-1], dtype="int32"), *table)
            rows.append(machine["step_invariant"](hidden, *map(put, given), pools, held["step_invariant"]).numpy())
            rows[-1] = rows[-1][: own[1]]
        found[name] = np.concatenate(rows)
    return found


@pytest.mark.parametrize(("kind", "dtype", "window"),
                         [("cuda", "bfloat16", 0), ("rocm", "float16", 6), ("metal", "float32", 5)])  # fmt: skip
def test_a_sequence_has_the_same_bits_whatever_else_is_in_its_steps(kind, dtype, window, isolated):
    alone, *others = isolated(scenes, kind, dtype, window, timeout=400).values()
    assert np.isfinite(alone).all() and alone.std() > 0
    for found in others:
        assert found.tobytes() == alone.tobytes()
