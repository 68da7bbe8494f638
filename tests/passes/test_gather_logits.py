"""GatherLogits: the asked rows, computed alone, are the rows of the whole."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.relax import op as R

from llmc.ir import ops
from llmc.ir.driver import Driver
from llmc.ir.quantized import activation_group
from llmc.ir.rewrite import Rewriter, bindings, op_name
from llmc.ir.text import text
from llmc.passes import schemes
from llmc.passes.gather_logits import GatherLogits
from llmc.passes.page_attention import PageAttention
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.split_embedding import SplitEmbedding
from llmc.passes.weight_uses import weight_uses
from tests import decoders, serving
from tests.passes.test_fuse_projections import Parallel
from tests.serving import GOAL, TOLERANCE


class Experts(decoders.Decoder):
    """A mixture in place of the MLP: two of four experts a token, so that some values have two rows a token."""

    def mlp(self, at, x):
        n = x.ty.shape[0]
        scores = self.emit(R.nn.softmax(self.linear(x, f"{at}.router", 4), -1))
        top = self.emit(R.topk(scores, k=2, axis=-1, ret_type="both", dtype="int64"))
        weights, ids = (self.emit(tvm.relax.TupleGetItem(top, i)) for i in (0, 1))
        ids = self.emit(R.reshape(ids, [n * 2]))
        rows = self.emit(R.repeat(x, 2, axis=0))
        up = self.weight(f"{at}.experts.up", 4, self.intermediate, self.hidden)
        down = self.weight(f"{at}.experts.down", 4, self.hidden, self.intermediate)
        y = ops.expert_linear(self.bb, rows, up, ids)
        y = ops.expert_linear(self.bb, self.emit(R.nn.silu(y)), down, ids)
        y = self.emit(R.multiply(y, self.emit(R.reshape(weights, [n * 2, 1]))))
        return self.emit(R.sum(self.emit(R.reshape(y, [n, 2, self.hidden])), axis=1))


def split(decoder):
    return SplitEmbedding().run(PageAttention().run(decoder.module, GOAL), GOAL)


def gathered(decoder):
    module = GatherLogits().run(split(decoder), GOAL)
    tvm.relax.analysis.well_formed(module)
    return module


@pytest.mark.parametrize("make", [decoders.Decoder, Experts])
def test_serving_equals_the_textbook(make):
    decoder = make()
    assert serving.error_of(gathered(decoder), decoder) < TOLERANCE


@pytest.mark.parametrize("make", [decoders.Decoder, Experts])
def test_rows_are_those_of_the_whole_bit_for_bit(make):
    decoder = make()
    module = gathered(decoder)
    tokens = serving.sequences(decoder.vocab)
    whole = Driver(module, decoder.weights).step(tokens)
    rows = {"a": [0], "b": [8], "c": [22, 0, 5, 5], "d": []}
    some = Driver(module, decoder.weights).step(tokens, rows)
    for s, r in rows.items():
        np.testing.assert_array_equal(some[s], whole[s][r])


def rows_of(module, function="step"):
    """How many times each number of rows stands first in the shape of a matmul's result."""
    step = module[function]
    m = next(p for p in step.params if p.name == "logit_rows").ty.shape[0]
    shapes = [b.var.ty.shape[0] for b in bindings(step) if op_name(b.value) == "matmul"]
    return sum(not s.same_as(m) for s in shapes), sum(s.same_as(m) for s in shapes)


def test_the_last_block_works_on_asked_rows_only():
    # A block has 7 matmuls, of which q, k and v lead to its attention; the head is one more.
    assert rows_of(gathered(decoders.Decoder(layers=2))) == (10, 5)


def test_answer_rows_are_counted_by_a_variable_of_their_own():
    step = gathered(decoders.Decoder(layers=1))["step"]
    names = [p.name for p in step.params]
    assert names[:4] == ["hidden", "positions", "qo_indptr", "logit_rows"]
    assert int(step.attrs["num_input"]) == 9
    assert isinstance(step.ret_ty.shape[0], tirx.Var)
    assert step.ret_ty.shape[0].same_as(step.params[3].ty.shape[0])


def test_logits_are_float32():
    module = gathered(decoders.Decoder(dtype="bfloat16", stored="bfloat16"))
    assert str(module["step"].ret_ty.dtype) == "float32"


class Reversed(Rewriter):
    """The fault: rows gathered in the wrong order, at one of the gathers."""

    seen = False

    def rewrite(self, var, value):
        if op_name(value) == "take" and not self.seen:
            self.seen = True
            return R.take(self.get(value.args[0]), self.emit(R.flip(self.get(value.args[1]), axis=0)), 0, mode="fast")
        return self.again(value)


def test_wrongly_gathered_rows_show():
    decoder = decoders.Decoder()
    assert serving.error_of(Reversed(gathered(decoder), "step").run(), decoder) > 1e-2


def test_rounding_stands_before_every_product_of_the_asked_rows():
    """Attention and MLP read one rounded activation: its rows are rounded again, not gathered from what was rounded."""
    decoder = Parallel(layers=1, hidden=32, intermediate=64)
    plan = {n: schemes.parse("int4-g32-a8") for n, use in weight_uses(decoder.module).items() if "product" in use.roles}
    goal = replace(GOAL, schemes=plan)
    module = PageAttention().run(QuantizeWeights().run(decoder.module, goal), goal)
    module = GatherLogits().run(SplitEmbedding().run(module, goal), goal)
    bound = {b.var: b.value for b in bindings(module["step"])}
    products = [v for v in bound.values() if op_name(v) == "matmul"]
    assert len(products) == 8
    assert all(activation_group(module, bound.get(v.args[0])) == 32 for v in products)


def test_expected(golden):
    golden("gather_logits.txt", text(gathered(Experts(layers=1))))
