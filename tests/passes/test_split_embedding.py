"""SplitEmbedding: lookups in one function, all else in the other."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.driver import Driver
from llmc.ir.errors import CompileError
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import text
from llmc.passes.page_attention import PageAttention
from llmc.passes.split_embedding import SplitEmbedding
from tests import decoders, serving
from tests.serving import GOAL, TOLERANCE


class PerLayer(decoders.Decoder):
    """Beside the embedding, a table of a vector a layer, of clipped tokens (as gemma3n has it)."""

    def embedding(self, tokens):
        wide = self.emit(R.astype(tokens, "int64"))
        small = self.emit(R.where(self.emit(R.less(wide, relax.const(20, "int64"))), wide, relax.const(0, "int64")))
        table = self.weight("per_layer.weight", 20, self.hidden * self.layers)
        extra = self.emit(R.take(table, small, axis=0))
        extra = self.emit(R.strided_slice(extra, [1], [0], [self.hidden]))
        return self.emit(R.add(super().embedding(tokens), self.emit(R.tanh(extra))))


def split(decoder):
    module = SplitEmbedding().run(PageAttention().run(decoder.module, GOAL), GOAL)
    tvm.relax.analysis.well_formed(module)
    return module


def names(module, function):
    return [p.name for p in module[function].params]


def weights(module, function):
    return list(map(str, module[function].attrs["llmc.weights"]))


@pytest.mark.parametrize("make", [decoders.Decoder, PerLayer])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_serving_equals_the_textbook(make, stored):
    decoder = make(stored=stored)
    assert serving.error_of(split(decoder), decoder) < TOLERANCE


def test_each_function_keeps_its_weights():
    module = split(decoders.Decoder(layers=1))
    assert names(module, "embed") == ["tokens", "embed_tokens_weight"]
    assert weights(module, "embed") == ["embed_tokens.weight"]
    assert names(module, "step")[:3] == ["hidden", "positions", "qo_indptr"]
    assert "embed_tokens.weight" not in weights(module, "step")
    assert len(module["step"].params) == int(module["step"].attrs["num_input"]) + len(weights(module, "step"))
    assert int(module["embed"].attrs["num_input"]) == 1


def test_a_tied_table_is_a_weight_of_both():
    decoder = decoders.Decoder(layers=1, tied=True)
    module = split(decoder)
    assert weights(module, "embed") == ["embed_tokens.weight"]
    assert "embed_tokens.weight" in weights(module, "step")
    assert serving.error_of(module, decoder) < TOLERANCE


def test_rows_are_cast_after_the_lookup():
    ops = [op_name(b.value) for b in bindings(split(decoders.Decoder(stored="bfloat16"))["embed"])]
    assert ops == ["take", "astype"]


def test_several_lookups_stand_side_by_side():
    decoder = PerLayer()
    module = split(decoder)
    driver = Driver(module, decoder.weights)
    tokens = np.array([3, 25, 19], "int32")
    hidden = driver.call("embed", {"tokens": tokens})
    table = decoder.weights["per_layer.weight"][[3, 0, 19]]
    want = {16: decoder.weights["embed_tokens.weight"][tokens], 32: table}
    assert hidden.shape == (3, 48)
    parts = {p.shape[1]: p for p in (hidden[:, :16], hidden[:, 16:])}
    if not np.array_equal(parts[16], want[16]):  # the order of lookups is the program's
        parts = {p.shape[1]: p for p in (hidden[:, :32], hidden[:, 32:])}
    for width in want:
        np.testing.assert_array_equal(parts[width], want[width])


class Counting(decoders.Decoder):
    """Takes the token's number for a feature."""

    def embedding(self, tokens):
        number = self.emit(R.expand_dims(self.emit(R.astype(tokens, "float32")), 1))
        return self.emit(R.add(super().embedding(tokens), number))


def test_tokens_used_as_numbers_are_refused():
    with pytest.raises(CompileError, match=r"looked up in tables only, found astype \(\w+\) of them") as error:
        split(Counting())
    assert error.value.op == "astype"


class Sideways(decoders.Decoder):
    def embedding(self, tokens):
        table = self.weight("embed_tokens.weight", self.hidden, self.vocab)
        return self.emit(R.permute_dims(self.emit(R.take(table, tokens, axis=1)), [1, 0]))


def test_a_lookup_of_columns_is_refused():
    with pytest.raises(CompileError, match=r"in the rows of a table, found take .* along axis 1"):
        split(Sideways())


class Blind(decoders.Decoder):
    """Never looks at its tokens."""

    def embedding(self, tokens):
        return self.emit(R.take(self.weight("positions.weight", 32, self.hidden), self.positions_var, axis=0))

    def body(self, n, tokens, positions):
        self.positions_var = positions
        return super().body(n, tokens, positions)


def test_a_program_without_lookup_is_refused():
    with pytest.raises(CompileError, match="found no lookup"):
        split(Blind())


def test_expected(golden):
    golden("split_embedding.txt", text(split(PerLayer(layers=1, stored="bfloat16"))))
