"""PageAttention: many sequences from paged caches give what each gives alone from the textbook."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm.relax import op as R

from llmc.ir import paging
from llmc.ir.driver import Driver, state_of
from llmc.ir.ops import op_of
from llmc.ir.rewrite import Rewriter
from llmc.ir.text import text
from llmc.passes.page_attention import PageAttention
from tests import decoders, serving
from tests.serving import GOAL, TOLERANCE

KINDS = {
    "causal": {},
    "window": {"windows": (5, 5)},
    "window and full": {"windows": (4, 0)},
    "chunk and full": {"chunks": (6, 0)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "one head, wider values": {"kv_heads": 1, "v_dim": 12},
}


def paged(decoder, goal=GOAL):
    module = PageAttention().run(decoder.module, goal)
    tvm.relax.analysis.well_formed(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_serving_equals_the_textbook(kind):
    decoder = decoders.Decoder(**KINDS[kind])
    assert serving.error_of(paged(decoder), decoder) < TOLERANCE


def test_alone_equals_batch_equals_chunks_bit_for_bit():
    decoder = decoders.Decoder(windows=(0, 5))
    module, tokens = paged(decoder), serving.sequences(decoder.vocab)
    cut = serving.served_logits(module, decoder.weights, tokens)
    batch = serving.served_logits(module, decoder.weights, tokens, [serving.LENGTHS], seed=1)
    alone = [{s: n} for s, n in reversed(serving.LENGTHS.items())]
    alone = serving.served_logits(module, decoder.weights, tokens, alone, seed=2)
    for s in tokens:
        assert (batch[s] == cut[s]).all()
        assert (batch[s] == alone[s]).all()


def test_one_sequence_never_touches_another():
    decoder = decoders.Decoder()
    module, tokens = paged(decoder), serving.sequences(decoder.vocab)
    before = serving.served_logits(module, decoder.weights, tokens)
    tokens["c"] = (tokens["c"] + 1) % decoder.vocab
    after = serving.served_logits(module, decoder.weights, tokens)
    assert {s for s in tokens if (before[s] != after[s]).any()} == {"c"}


def test_layers_of_one_reach_share_a_group():
    state = state_of(paged(decoders.Decoder(layers=3, windows=(5, 0, 5))))
    assert [(g["kind"], g["page_size"], g["window"], g["chunk"], g["layers"]) for g in state] == [
        ("paged", 4, 5, 0, [0, 2]),
        ("paged", 4, 0, 0, [1]),
    ]
    assert state[1]["tensors"] == [
        {"name": "k_pages_1", "shape": [2, 8, 4], "dtype": "float32"},
        {"name": "v_pages_1", "shape": [2, 4, 8], "dtype": "float32"},
    ]


def test_key_pages_lie_as_the_target_asks():
    from llmc.passes.goal import Goal

    decoder = decoders.Decoder(layers=1, v_dim=4)
    module = paged(decoder, Goal(page_size=4))
    assert [t["shape"] for t in state_of(module)[0]["tensors"]] == [[2, 4, 8], [2, 4, 4]]
    assert serving.error_of(module, decoder) < TOLERANCE


def test_half_precision_pages():
    decoder = decoders.Decoder(dtype="bfloat16", stored="bfloat16")
    module = paged(decoder)
    assert {t["dtype"] for g in state_of(module) for t in g["tensors"]} == {"bfloat16"}
    # Attention rounds once to bfloat16 (2^-9), and each of two layers' sums of rounded numbers drifts by a few of
    # these.
    assert serving.error_of(module, decoder) < 0.05


class Rounded(Rewriter):
    """The textbook, its attention over keys and values as a cache in 8 bits keeps them: by arithmetic, not by codes."""

    def __init__(self, module, kind):
        super().__init__(module)
        self.kind = kind

    def rewrite(self, var, value):
        if op_of(self.module, value) != "attention":
            return self.again(value)
        q, k, v, *sinks = (self.get(a) for a in value.args)
        return tvm.relax.Call(value.op, [q, self.rounded(k), self.rounded(v), *sinks])

    def rounded(self, x):
        number = lambda value: tvm.relax.const(value, "float32")  # noqa: E731
        largest = {"int8": 127.0, "fp8": 448.0}[self.kind]
        size = self.emit(R.abs(x))
        scale = self.emit(R.divide(self.emit(R.max(size, axis=[-1], keepdims=True)), number(largest)))
        step = number(1.0)
        if self.kind == "fp8":  # three bits of mantissa, and none below 2**-6
            exponent = self.emit(R.divide(self.emit(R.log(self.emit(R.divide(size, scale)))), number(np.log(2.0))))
            exponent = self.emit(R.maximum(self.emit(R.floor(exponent)), number(-6.0)))
            step = self.emit(R.power(number(2.0), self.emit(R.subtract(exponent, number(3.0)))))
        step = self.emit(R.multiply(step, scale))
        return self.emit(R.multiply(self.emit(R.round(self.emit(R.divide(x, step)))), step))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("how", [{}, {"windows": (5, 0), "sinks": True}, {"kv_heads": 1, "v_dim": 12, "softcap": 1.5}])
def test_a_quantized_cache_is_the_textbook_over_rounded_keys_and_values(how, kind):
    decoder = decoders.Decoder(**how)
    tokens = serving.sequences(decoder.vocab)
    wanted = serving.textbook_logits(Rounded(decoder.module, kind).run(), decoder.weights, tokens)
    module = paged(decoder, replace(GOAL, kv_cache=kind))
    # A number between two codes becomes the other one where the last bit of a key differs: none of these does.
    assert serving.worst(serving.served_logits(module, decoder.weights, tokens), wanted) < TOLERANCE
    # And what it costs can be seen: neither is the textbook itself.
    assert serving.worst(wanted, serving.textbook_logits(decoder.module, decoder.weights, tokens)) > 1e-2


def test_a_quantized_cache_has_codes_and_scales():
    module = paged(decoders.Decoder(layers=1, windows=(6,)), replace(GOAL, kv_cache="int8"))
    assert state_of(module)[0]["tensors"] == [
        {"name": "k_pages_0", "shape": [2, 8, 4], "dtype": "int8"},
        {"name": "k_scales_0", "shape": [2, 4], "dtype": "float32"},
        {"name": "v_pages_0", "shape": [2, 4, 8], "dtype": "int8"},
        {"name": "v_scales_0", "shape": [2, 4], "dtype": "float32"},
    ]


def test_expected_of_a_quantized_cache(golden):
    decoder = decoders.Decoder(layers=1)
    golden("page_attention_int8.txt", text(paged(decoder, replace(GOAL, kv_cache="int8"))))


class Fault(Rewriter):
    """Plants a fault in `step`: `change(name of op, call)` returns another expression or None."""

    def __init__(self, module, change):
        super().__init__(module, "step")
        self.change = change

    def rewrite(self, var, value):
        op = op_of(self.module, value)
        new = self.change(self, op, value) if op else None
        return self.again(value) if new is None else new


def with_parameters(**changed):
    """Every paged attention made anew with other parameters."""

    def change(at, op, call):
        if op != paging.PAGED_ATTENTION:
            return None
        func = paging.paged_attention(**{**paging.parameters(at.module[call.args[0]]), **changed})
        name = at.builder.add_func(func, op)
        return tvm.relax.op.call_tir(name, [at.get(a) for a in call.args[1].fields], call.ty)

    return change


def without_append(letter):
    def change(at, op, call):
        pool = call.args[1].fields[0] if op == paging.APPEND_PAGES else None
        return pool if pool is not None and pool.name.startswith(letter) else None

    return change


def swapped_table(at, op, call):
    """Reads the pages of the sequences in another order."""
    if op != paging.PAGED_ATTENTION:
        return None
    args = [at.get(a) for a in call.args[1].fields]
    args[-2] = at.emit(tvm.relax.op.flip(args[-2], axis=0))
    return tvm.relax.op.call_tir(call.args[0], args, call.ty)


FAULTS = {
    "window": with_parameters(window=0),
    "chunk": with_parameters(chunk=0),
    "softcap": with_parameters(softcap=0.0),
    "scale": with_parameters(scale=1.0),
    "append of keys": without_append("k"),
    "append of values": without_append("v"),
    "pages": swapped_table,
}


@pytest.fixture(scope="module")
def everything():
    """A decoder that has all that can be lost."""
    decoder = decoders.Decoder(windows=(6, 0), chunks=(0, 7), softcap=1.5)
    return decoder, paged(decoder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(everything, fault):
    decoder, module = everything
    assert serving.error_of(Fault(module, FAULTS[fault]).run(), decoder) > 1e-3


def test_a_lost_sink_shows():
    decoder = decoders.Decoder(sinks=True)

    def change(at, op, call):
        if op != paging.PAGED_ATTENTION:
            return None
        func = paging.paged_attention(**{**paging.parameters(at.module[call.args[0]]), "sinks": False})
        args = [at.get(a) for i, a in enumerate(call.args[1].fields) if i != 3]
        return tvm.relax.op.call_tir(at.builder.add_func(func, op), args, call.ty)

    assert serving.error_of(Fault(paged(decoder), change).run(), decoder) > 1e-3


def test_equal_layers_share_functions():
    module = paged(decoders.Decoder(layers=4))
    assert len([f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]) == 3


def test_the_driver_starts_from_nothing():
    decoder = decoders.Decoder(layers=1)
    driver = Driver(paged(decoder), decoder.weights)
    assert all(np.isnan(p.numpy()).all() for p in driver.pools.values())
    assert driver.length("a") == 0


def test_expected(golden):
    golden("page_attention.txt", text(paged(decoders.Decoder(layers=1, windows=(6,), sinks=True))))
