"""Cutting a program at its layers: by what is alive, not by names."""

import numpy as np
import pytest
import tvm_ffi
from tvm.relax import op as R

from llmc.ir.errors import CompileError
from llmc.ir.evaluate import evaluate
from llmc.quality.layers import cut_layers
from tests.decoders import Decoder
from tests.textbook import program


def test_layers_are_cut_where_the_residual_stream_is_alone():
    model = Decoder(layers=3)
    parts = cut_layers(model.module, 7)
    assert [p.name for p in parts] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    for i, part in enumerate(parts[1:-1]):
        own = {name for name in part.weights if name.startswith("layers.")}
        assert own == {name for name in model.weights if name.startswith(f"layers.{i}.")}
        assert len(part.writes) == 1, "the residual stream alone"
    assert parts[-1].weights == ("lm_head.weight",)


def test_equal_layers_are_one_module():
    _, first, second, last, _ = cut_layers(Decoder(layers=3).module, 7)
    assert tvm_ffi.structural_equal(first.module, second.module)
    assert not tvm_ffi.structural_equal(second.module, last.module), "the last layer ends with the norm"


@pytest.mark.parametrize("model", [Decoder(windows=(3, 0)), Decoder(tied=True, bias=True, sinks=True)])
def test_the_parts_together_are_the_program(model):
    tokens, positions = np.arange(9, dtype="int32") * 5 % model.vocab, np.arange(9, dtype="int32")
    values = {0: tokens, 1: positions}
    for part in cut_layers(model.module, 9):
        given = [values[r] for r in part.reads] + [model.weights[name] for name in part.weights]
        values |= dict(zip(part.writes, evaluate(part.module, given), strict=True))
    want = evaluate(model.module, [tokens, positions, *model.arrays])
    np.testing.assert_array_equal(values[part.writes[0]], want)


def test_a_program_that_does_not_look_at_its_tokens_is_refused():
    module = program(lambda bb, tokens, positions, w: bb.emit(R.add(w, w)), {"w": (4, 4)}, batch=False)
    with pytest.raises(CompileError, match="expected logits that are computed from tokens, found"):
        cut_layers(module, 4)
