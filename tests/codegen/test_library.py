"""A whole small model as a library, run as the runtime runs it."""

import numpy as np
import pytest

from llmc import codegen, targets
from llmc.codegen.library import MAX_STEP_TOKENS, _plan, library_name
from llmc.ir.evaluate import Reference
from tests.codegen import machine
from tests.codegen.ragged import Llama, tables

BATCH = [(0, 5), (0, 1), (0, 4)]


@pytest.fixture(scope="module")
def llama(compiled):
    model = Llama()
    return model, compiled(model)


def reference(model, batch=BATCH):
    """tokens, tables, rows and logits of a step over fresh sequences."""
    count = sum(new for _, new in batch)
    tokens = np.random.default_rng(3).integers(0, model.vocab, count).astype("int32")
    positions, *rest = tables(batch)
    rows = np.arange(count, dtype="int32")
    run = Reference(model.module)
    hidden = run(
        tokens, *(model.weights[str(n)] for n in model.module["embed"].attrs["llmc.weights"]), function="embed"
    )
    step = [positions, rest[0], rows, *rest[1:]]
    weights = [model.weights[str(n)] for n in model.module["step"].attrs["llmc.weights"]]
    return tokens, step, run(hidden, *step, *model.pools(), *weights, function="step")


def test_library_equals_reference_without_the_compiler(llama, isolated):
    model, built = llama
    tokens, step, expected = reference(model)
    pages = [p.numpy() for p in model.pools()]
    calls = [("embed", tokens), ("step", None, *step), ("copy_pages_0", np.int32([1, 2]), np.int32([5, 6]))]
    (_, logits, copied), compiler_loaded = isolated(machine.run, *built, pages, calls)
    # float32 sums of at most 48 terms of size 1 in another order
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
    assert not compiler_loaded
    assert all((p[[5, 6]] == p[[1, 2]]).all() for p in copied)


def test_bfloat16_weights_are_multiplied_exactly(compiled, isolated):
    model = Llama(layers=1, checkpoint="bfloat16", tied=False)
    built = compiled(model)
    tokens, step, expected = reference(model)
    calls = [("embed", tokens), ("step", None, *step)]
    (_, logits), _ = isolated(machine.run, *built, [p.numpy() for p in model.pools()], calls)
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


def test_chunks_and_batches_give_the_same_bits(llama, isolated):
    model, built = llama
    tokens = np.random.default_rng(3).integers(0, model.vocab, 10).astype("int32")
    pages = [p.numpy() for p in model.pools()]

    def step(*batch):
        positions, *rest = tables(list(batch))
        rows = np.arange(sum(new for _, new in batch), dtype="int32")
        return "step", None, positions, rest[0], rows, *rest[1:]

    calls = [("embed", tokens), step((0, 5), (0, 1), (0, 4))]
    calls += [("embed", tokens[:5]), step((0, 5))]
    calls += [("embed", tokens[:2]), step((0, 2)), ("embed", tokens[2:5]), step((2, 3))]
    results, _ = isolated(machine.run, *built, pages, calls)
    together, alone, first, second = results[1::2]
    assert (together[:5] == alone).all()
    assert (alone == np.concatenate([first, second])).all()


def test_memory_is_planned_for_the_longest_step(goal):
    facts, deeper = (_plan(codegen.lower(Llama(layers=n).module, goal).module)[1] for n in (3, 6))
    assert facts["max_step_tokens"] == MAX_STEP_TOKENS
    widest = (4 + 2 * 2) * 8 * 4 * MAX_STEP_TOKENS  # q, k and v together
    assert widest < facts["intermediate_bytes"] < 20 * widest
    assert deeper == facts  # layers use the same buffers one after the other


def test_kernels_don_t_grow_with_depth(goal):
    kernels = [codegen.lower(Llama(layers=n).module, goal).kernels for n in (2, 5)]
    assert [k["name"] for k in kernels[0]] == [k["name"] for k in kernels[1]]
    calls = [{k["name"]: k["calls"] for k in found} for found in kernels]
    assert calls[0]["silu_multiply"] == 2 and calls[1]["silu_multiply"] == 5
    # every kernel is named after what it does
    assert all(not name.startswith("fused") for name in calls[0])


def test_name_of_a_library():
    assert library_name(targets.parse("cpu:x86-64-v3")[0]) == "cpu-x86-64-v3-linux-x86_64.so"
