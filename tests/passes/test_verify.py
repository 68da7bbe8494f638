"""Verifier: right passes go through, and a fault is named with its pass, its layer and its op."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir import ops, paging
from llmc.ir.errors import CompileError
from llmc.ir.ops import attributes_of, op_of
from llmc.ir.rewrite import Rewriter, op_name
from llmc.passes import manager, quantize_weights, schemes, verify
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE, Stage
from llmc.passes.weight_uses import weight_uses
from tests import textbook
from tests.serving import GOAL

WINDOW = 6


@pytest.fixture(scope="module")
def model():
    module = textbook.llama(window=WINDOW)
    arguments = textbook.arguments(module, 1)[2:]
    return module, dict(zip(map(str, module["main"].attrs["llmc.weights"]), arguments, strict=True))


@pytest.fixture(scope="module")
def verifier(model):
    return verify.Verifier(*model, GOAL)


class Lazy:
    def __init__(self, value):
        self.value = value

    def read(self, start=0, stop=None):
        return self.value[start:stop]


def test_the_whole_pipeline_is_verified(model):
    module, weights = model
    verifier = verify.Verifier(module, {name: Lazy(w) for name, w in weights.items()}, GOAL)
    manager.run(module, GOAL, on_pass=verifier.on_pass)


@dataclass(frozen=True)
class Fault:
    """A pass that does wrong: `change(rewriter, var, value)` returns another expression, or None."""

    change: object
    function: str = "main"
    name: str = "fault"

    def run(self, module, goal):
        change = self.change

        class Wrong(Rewriter):
            layer = -1

            def rewrite(self, var, value):
                self.layer += op_of(self.module, value) in ("attention", paging.PAGED_ATTENTION)
                new = change(self, var, value)
                return self.again(value) if new is None else new

        return Wrong(module, self.function).run()


def lost_window(at, var, call):
    if op_of(at.module, call) == "attention" and at.layer == 1:
        how = {k: v for k, v in attributes_of(at.module, call).items() if k in ("scale", "softcap", "chunk")}
        return ops.attention(at.builder, *(at.get(a) for a in call.args), **how)
    return None


def lost_scale(at, var, call):
    if op_of(at.module, call) == paging.PAGED_ATTENTION and at.layer == 0:
        func = paging.paged_attention(**{**paging.parameters(at.module[call.args[0]]), "scale": 1.0})
        return R.call_tir(at.builder.add_func(func, "wrong"), [at.get(a) for a in call.args[1].fields], call.ty)
    return None


def other_activation(at, var, call):
    if op_name(call) == "nn.silu" and at.layer == 0:
        return R.nn.gelu(at.get(call.args[0]))
    return None


def twice_the_logits(at, var, call):
    return R.multiply(at.emit(at.again(call)), relax.const(2.0, "float32")) if var.same_as(at.old.body.body) else None


FAULTS = {
    "window": (Fault(lost_window), 1, "attention", "the result of attention of layer 1 differs, its operands do not"),
    "scale": (Fault(lost_scale, "step"), 3, "paged_attention", "the result of attention of layer 0 differs, its oper"),
    "activation": (
        Fault(other_activation),
        1,
        "nn.gelu",
        r"layer 0 and these; .* \(nn.gelu, near weight layers.0",
    ),
    "head": (Fault(twice_the_logits), 1, "multiply", "lies behind the result of attention of layer 1; the first"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_located(model, verifier, fault):
    wrong, stages, op, message = FAULTS[fault]
    before = manager.run(model[0], GOAL, stages=PIPELINE[:stages]).module
    stage = Stage("faulty", (wrong,), lambda module: None)
    with pytest.raises(CompileError, match=message) as error:
        manager.run(before, GOAL, stages=(stage,), on_pass=verifier.on_pass)
    assert (error.value.stage, error.value.pass_name, error.value.op) == ("faulty", "fault", op)
    assert str(error.value).startswith(
        "fault changed what the program computes: expected the imported program's logits within 0.0001 of their spread"
    )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_cache_may_cost_what_its_rounding_does(model, kind):
    module, weights = model
    goal = replace(GOAL, kv_cache=kind)
    verifier = verify.Verifier(module, weights, goal)
    manager.run(module, goal, on_pass=verifier.on_pass)
    assert verifier.tolerance == verify.FLIPS[kind]


def other_scale(at, var, call):
    if op_of(at.module, call) != paging.PAGED_ATTENTION:
        return None
    func = paging.paged_attention(**{**paging.parameters(at.module[call.args[0]]), "scale": 0.01})
    return R.call_tir(at.builder.add_func(func, "wrong"), [at.get(a) for a in call.args[1].fields], call.ty)


def test_a_fault_behind_a_quantized_cache_is_seen(model):
    module, weights = model
    goal = replace(GOAL, kv_cache="int8")
    verifier = verify.Verifier(module, weights, goal)
    before = manager.run(module, goal, stages=PIPELINE[:3], on_pass=verifier.on_pass).module
    stage = Stage("faulty", (Fault(other_scale, "step"),), lambda module: None)
    with pytest.raises(CompileError, match="the result of attention of layer 0 differs, its operands do not"):
        manager.run(before, goal, stages=(stage,), on_pass=verifier.on_pass)


def test_nan_is_an_error():
    assert verify.difference(np.array([np.nan, 1.0]), np.array([1.0, 2.0])) == float("inf")


def test_lengths_cross_pages_and_windows():
    assert verify.telling_lengths(textbook.llama(window=WINDOW), Goal(page_size=4)) == [1, 7, 11, 13]
    assert verify.telling_lengths(textbook.llama(), Goal(page_size=16, max_context=20)) == [1, 7]


def test_the_plan_serves_every_token_side_by_side():
    lengths = {0: 1, 1: 7, 2: 11}
    steps = verify.plan(lengths)
    assert {s: sum(step.get(s, 0) for step in steps) for s in lengths} == lengths
    assert any(len(step) > 1 and set(step.values()) != {1} for step in steps)
    assert steps[0] == {0: 1}


def test_unchanged_modules_cost_nothing(model, verifier):
    assert verifier.on_pass(1, PIPELINE[0].passes[0], model[0], model[0]) is None


def quantized_weights(module, weights, goal):
    """Weights by name, and the parts of those that goal.schemes names."""
    found = dict(weights)
    for name, scheme in goal.schemes.items():
        found |= {f"{name}:{part}": p for part, p in scheme.encode(weights[name]).items()}
    return found


@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [
        ("int4-g16-zp", verify.TOLERANCE["float32"]),
        ("int4-g16-a8", verify.ROUNDED_FLIPS["int8"]),
        ("fp8-a8", verify.ROUNDED_FLIPS["fp8"]),
    ],
)
def test_a_quantized_program_is_verified_as_what_its_codes_stand_for(model, scheme, tolerance):
    module, weights = model
    names = [n for n, use in weight_uses(module).items() if use.roles]
    goal = replace(GOAL, schemes=dict.fromkeys(names, schemes.parse(scheme)))
    given = quantized_weights(module, weights, goal)
    verifier = verify.Verifier(module, given, goal)
    manager.run(module, goal, on_pass=verifier.on_pass)
    assert (verifier.typical == verify.TOLERANCE["float32"]) == scheme.endswith("a8")
    assert verifier.tolerance == tolerance


@pytest.mark.slow
def test_rounded_activations_beside_a_quantized_cache_are_verified(model):
    module, weights = model
    names = [n for n, use in weight_uses(module).items() if use.roles]
    goal = replace(GOAL, schemes=dict.fromkeys(names, schemes.parse("int4-g16-a8")), kv_cache="int8")
    verifier = verify.Verifier(module, quantized_weights(module, weights, goal), goal)
    manager.run(module, goal, on_pass=verifier.on_pass)
    assert verifier.typical == verify.TOLERANCE["float32"]


@pytest.mark.parametrize(("stirred", "moved"), [(0.0, False), (0.3, True)])
def test_what_a_stirred_program_moves_by_is_allowed(model, monkeypatch, stirred, moved):
    module, weights = model
    goal = replace(GOAL, schemes={"layers.0.down.weight": schemes.parse("int4-g16-a8")})
    monkeypatch.setitem(verify.STIRRED, "float32", stirred)
    verifier = verify.Verifier(module, quantized_weights(module, weights, goal), goal, lengths=[3])
    first, second = PIPELINE[:2]
    stages = (first, Stage("weights", second.passes[:2], first.form))
    manager.run(module, goal, stages=stages, on_pass=verifier.on_pass)
    assert verifier.typical == verify.TOLERANCE["float32"]  # activations are rounded, then
    assert (verifier.tolerance > verify.ROUNDED_FLIPS["int8"]) == moved


def test_most_short_sequences_have_the_tight_bound():
    verifier = verify.Verifier.__new__(verify.Verifier)
    verifier.tokens, verifier.short, verifier.spread = dict.fromkeys(range(4)), range(1, 4), 1.0
    verifier.wanted = {s: np.zeros((2, 3), "float32") for s in range(4)}

    def wrong(*errors):
        found = {s: np.full((2, 3), e, "float32") for s, e in enumerate(errors)}
        return verifier.wrong(found, 1e-2, 1e-4)

    assert wrong(5e-3, 5e-3, 0, 0) is None
    assert wrong(5e-3, 5e-3, 1e-3, 0) == (2, pytest.approx(1e-3), 1e-4)
    assert wrong(0, 2e-2, 0, 0) == (1, pytest.approx(2e-2), 1e-2)
    assert wrong(0, np.nan, 0, 0) == (1, np.inf, 1e-2)


def test_parts_that_are_read_wrongly_are_seen(model, monkeypatch):
    """A pass that takes the codes of zero for another: the fake-quantized program says so."""
    module, weights = model
    goal = replace(GOAL, schemes={"layers.0.down.weight": schemes.parse("int4-g16")})
    given = quantized_weights(module, weights, goal)
    right = quantize_weights.dequantize
    monkeypatch.setattr(
        quantize_weights, "dequantize", lambda bb, format, *parts: right(bb, replace(format, offset=7), *parts)
    )
    verifier = verify.Verifier(module, given, goal)
    with pytest.raises(CompileError, match="quantize_weights changed what the program computes") as error:
        manager.run(module, goal, on_pass=verifier.on_pass)
    assert (error.value.pass_name, error.value.op) == ("quantize_weights", "dequantize")


def test_a_fault_after_quantize_weights_is_found(model):
    module, weights = model
    goal = replace(GOAL, schemes={"layers.0.down.weight": schemes.parse("int4-g16")})
    verifier = verify.Verifier(module, quantized_weights(module, weights, goal), goal)
    *first, last = PIPELINE[1].passes
    stages = (PIPELINE[0], Stage("weights", (*first, Fault(other_activation), last), PIPELINE[1].form))
    with pytest.raises(CompileError, match="fault changed what the program computes") as error:
        manager.run(module, goal, stages=stages, on_pass=verifier.on_pass)
    assert error.value.pass_name == "fault"
