import numpy as np
import pytest
from tvm.relax import op as R

from llmc.ir.forms import check_textbook
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import text
from llmc.passes import drop_batch_axis
from llmc.passes.drop_batch_axis import DropBatchAxis
from llmc.passes.goal import Goal
from tests import textbook
from tests.passes.locality_programs import LOCAL, local

PASS = DropBatchAxis()


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "sinks": True}], ids=str)
def test_llama_has_no_batch_axis_left(options):
    before = textbook.llama(**options)
    after = PASS.run(before, Goal())
    check_textbook(after)
    assert sum(1 for _ in bindings(after["main"])) <= sum(1 for _ in bindings(before["main"]))
    # The same operations on the same numbers in the same order: no tolerance.
    np.testing.assert_array_equal(textbook.logits(after, 9), textbook.logits(before, 9))


@pytest.mark.parametrize("name", LOCAL)
def test_keeps_the_result_of_every_op(name):
    before = local(name)
    after = PASS.run(before, Goal())
    check_textbook(after)
    np.testing.assert_array_equal(textbook.logits(after, 5), textbook.logits(before, 5))


def test_bfloat16():
    before = textbook.program(
        lambda builder, tokens, positions, table: R.exp(builder.emit(R.take(table, tokens, 0))),
        {"table": (textbook.VOCAB, 8)},
        dtype="bfloat16",
    )
    after = PASS.run(before, Goal())
    np.testing.assert_array_equal(textbook.logits(after, 5), textbook.logits(before, 5))


def test_an_op_without_a_rule_gets_its_long_values_back():
    def body(emit, x, p, n):
        return R.nn.pad(emit(R.exp(x)), [0, 0, 0, 0, 1, 0])

    after = PASS.run(textbook.embedded(body), Goal())
    ops = [op_name(b.value) for b in bindings(after["main"])]
    assert ops == ["take", "exp", "reshape", "nn.pad", "reshape"]


def test_a_batch_axis_that_moved_is_found():
    def body(emit, x, p, n):
        x = emit(R.permute_dims(x, [1, 0, 2]))
        x = emit(R.add(x, emit(R.sum(x, [1], keepdims=True))))
        return R.permute_dims(x, [1, 0, 2])

    before = textbook.embedded(body)
    after = PASS.run(before, Goal())
    check_textbook(after)
    np.testing.assert_array_equal(textbook.logits(after, 5), textbook.logits(before, 5))


def test_a_module_without_a_batch_axis_is_unchanged():
    module = PASS.run(textbook.llama(layers=1), Goal())
    assert PASS.run(module, Goal()).same_as(module)


def test_golden(golden):
    golden("drop_batch_axis.txt", text(PASS.run(textbook.llama(layers=1), Goal())))


def test_a_planted_fault_is_caught(monkeypatch):
    """A permutation that forgets that the axes moved."""

    def permute_dims(drop, value):
        axes = [int(a) for a in value.attrs.axes]
        x = value.args[0]
        return R.permute_dims(drop.short[x], [0, 1, 2]) if x in drop.short and len(axes) == 4 else None

    def body(emit, x, p, n):
        x = emit(R.permute_dims(emit(R.reshape(x, [1, n, 2, 4])), [0, 1, 3, 2]))
        return R.reshape(x, [1, n, 8])

    before = textbook.embedded(body)
    monkeypatch.setitem(drop_batch_axis.RULES, "permute_dims", permute_dims)
    after = PASS.run(before, Goal())
    assert not np.array_equal(textbook.logits(after, 5), textbook.logits(before, 5))
