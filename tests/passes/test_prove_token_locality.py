import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import FormError
from llmc.ir.rewrite import Rewriter, bindings, op_name
from llmc.passes import manager
from llmc.passes.goal import Goal
from llmc.passes.locality import MixesTokens
from llmc.passes.pipeline import PIPELINE
from llmc.passes.prove_token_locality import ProveTokenLocality
from tests import textbook

PROVE = ProveTokenLocality()


@pytest.fixture(scope="module")
def ragged():
    return manager.run(textbook.llama(window=3, sinks=True), Goal(), stages=PIPELINE).module


def test_a_proven_module_is_unchanged(ragged):
    for module in (textbook.llama(), ragged):
        assert PROVE.run(module, Goal()).same_as(module)


def test_the_message_names_op_place_and_reason():
    def body(emit, x, p, n, **w):
        return R.nn.softmax(emit(R.matmul(x, w["mix_weight"])), 1)

    with pytest.raises(MixesTokens) as error:
        PROVE.run(textbook.embedded(body, **{"mix.weight": (8, 8)}), Goal())
    assert error.value.op == "nn.softmax"
    assert str(error.value) == (
        "expected every token to reach another through a semantic op alone, found nn.softmax (gv, near weight "
        "mix.weight): it works along the token axis (axis 1 of [1, n, 8]). Such a program can't serve many sequences "
        "at once"
    )


def test_refuses_a_fixed_number_of_tokens():
    builder = relax.BlockBuilder()
    tokens = [relax.Var(name, relax.TensorType([1, 8], "int32")) for name in ("tokens", "positions")]
    with builder.function("main", tokens, attrs={"num_input": 2, "llmc.weights": []}):
        with builder.dataflow():
            out = builder.emit_output(R.astype(tokens[0], "float32"))
        builder.emit_func_output(out)
    with pytest.raises(FormError, match=r"expected main to take a symbolic number of tokens, found int32 \[1, 8\]"):
        PROVE.run(builder.get(), Goal())


def test_refuses_a_result_that_is_not_one_row_a_token():
    module = textbook.embedded(lambda emit, x, p, n: R.permute_dims(x, [0, 2, 1]))
    with pytest.raises(FormError, match="expected main to return one row a token"):
        PROVE.run(module, Goal())


def test_refuses_an_unknown_function():
    def body(builder, tokens, positions, table):
        x = builder.emit(R.take(table, tokens, 0))
        inner = relax.BlockBuilder()
        y = relax.Var("y", x.ty)
        with inner.function("blend", [y], private=True):
            inner.emit_func_output(inner.emit(R.nn.softmax(y, 1)))
        function = relax.utils.copy_with_new_vars(inner.get()["blend"])
        return relax.Call(builder.add_func(function, "blend"), [x])

    with pytest.raises(MixesTokens, match="a function that is no semantic op") as error:
        PROVE.run(textbook.program(body, {"table": (48, 8)}), Goal())
    assert error.value.op == "blend"


class Fault(Rewriter):
    """Puts make(emit, x, params by name) where `op` stands (its last occurrence) in step."""

    def __init__(self, module, op, make):
        super().__init__(module, "step")
        self.make = make
        self.place = [b.var for b in bindings(self.old) if op_name(b.value) == op][-1]

    def rewrite(self, var, value):
        value = self.again(value)
        if not var.same_as(self.place):
            return value
        return self.make(self.emit, self.emit(value), {p.name: p for p in self.old.params})


FAULTS = {
    "answer rows mixed": ("nn.softmax", lambda emit, x, p: R.nn.softmax(x, 0)),
    "answer rows reversed": ("flip", lambda emit, x, p: R.flip(x, 0)),
    "number of an answer row used": (
        "astype",
        lambda emit, x, p: R.add(x, emit(R.expand_dims(emit(R.astype(p["logit_rows"], "float32")), -1))),
    ),
    "length of a sequence used": (
        "astype",
        lambda emit, x, p: R.add(x, emit(R.sum(emit(R.astype(p["kv_last_page_len_0"], "float32"))))),
    ),
    "pages read": ("sum", lambda emit, x, p: R.add(x, emit(R.sum(p["k_pages_0"])))),
    "gathered again by the table": ("take", lambda emit, x, p: R.add(x, emit(R.take(x, p["logit_rows"], 0)))),
    "tokens taken for answers": (
        "add",
        lambda emit, x, p: R.add(x, emit(R.astype(emit(R.reshape(p["positions"], [-1, 1])), "float32"))),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_ragged_form_is_proven_too(ragged, name):
    op, make = FAULTS[name]
    with pytest.raises(MixesTokens) as error:
        PROVE.run(Fault(ragged, "matmul", make).run(), Goal())
    assert error.value.op == op


def test_a_fault_that_mixes_nothing_is_accepted(ragged):
    """The faults above are refused for what they do, not for being there."""
    PROVE.run(Fault(ragged, "matmul", lambda emit, x, p: R.add(x, relax.const(np.float32(1)))).run(), Goal())
