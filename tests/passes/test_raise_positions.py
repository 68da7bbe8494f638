import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir.evaluate import evaluate
from llmc.ir.forms import check_imported
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import text
from llmc.passes import raise_positions
from llmc.passes.goal import Goal
from llmc.passes.raise_positions import RaisePositions
from tests import textbook

PASS = RaisePositions()


def counting(count):
    """logits = x * (what count(emit, n) makes, as [1, n, 1])"""

    def body(emit, x, p, n):
        row = emit(R.reshape(emit(R.astype(count(emit, n), "float32")), [1, n, 1]))
        return R.multiply(x, row)

    return textbook.embedded(body)


COUNTS = {
    "arange": lambda emit, n: emit(R.arange(n, dtype="int64")),
    "arange from 2": lambda emit, n: emit(R.arange(2, n + 2, dtype="int64")),
    "arange by 3": lambda emit, n: emit(R.arange(0, n * 3, 3, "int64")),
    "float arange": lambda emit, n: emit(R.arange(n, dtype="float32")),
    "cumsum of ones": lambda emit, n: emit(R.cumsum(emit(R.ones([1, n], "int64")), 1)),
    "exclusive cumsum": lambda emit, n: emit(R.cumsum(emit(R.ones([1, n], "int64")), 1, exclusive=True)),
    "cumsum of a cast fill": lambda emit, n: emit(
        R.cumsum(emit(R.astype(emit(R.full([1, n], relax.const(2.0), "float32")), "int64")), -1)
    ),
    "cumsum of a broadcast": lambda emit, n: emit(
        R.cumsum(emit(R.broadcast_to(relax.const(np.array([[3]]), "int64"), relax.ShapeExpr([1, n]))), 1)
    ),
}


def counters(module):
    return [op_name(b.value) for b in bindings(module["main"]) if op_name(b.value) in ("arange", "cumsum")]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_become_positions(name):
    before = counting(COUNTS[name])
    after = PASS.run(before, Goal())
    check_imported(after)
    assert counters(before) and not counters(after)
    # Small integers, exact in float32: no tolerance.
    np.testing.assert_array_equal(textbook.logits(after, 7), textbook.logits(before, 7))


def test_positions_are_followed():
    """The result is a function of the positions input: token 2 at position 9 gets what row 9 would get."""
    module = PASS.run(counting(COUNTS["arange"]), Goal())
    args = textbook.arguments(module, 10)
    args[0][0, 2] = args[0][0, 9]
    moved = [a.copy() for a in args]
    moved[1][0, 2] = 9
    np.testing.assert_array_equal(evaluate(module, moved)[0, 2], evaluate(module, args)[0, 9])


LEFT_ALONE = {
    "reversed": lambda emit, n: emit(R.arange(n - 1, -1, -1, "int64")),
    "from the length": lambda emit, n: emit(R.arange(n, n * 2, 1, "int64")),
    "cumsum of something": lambda emit, n: emit(R.cumsum(emit(R.arange(n, n * 2, 1, "int64")), 0)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone_what_does_not_count_from_the_first_row(name):
    module = counting(LEFT_ALONE[name])
    assert PASS.run(module, Goal()).same_as(module)


def test_a_module_without_counts_is_unchanged():
    module = textbook.llama(layers=1)
    assert PASS.run(module, Goal()).same_as(module)


def test_golden(golden):
    golden("raise_positions.txt", text(PASS.run(counting(COUNTS["arange from 2"]), Goal())))


def test_a_planted_fault_is_caught(monkeypatch):
    """Positions off by one."""
    before = counting(COUNTS["arange"])
    monkeypatch.setattr(
        raise_positions._Raise, "count", lambda self, value: (1, 1) if op_name(value) == "arange" else None
    )
    after = PASS.run(before, Goal())
    assert not np.array_equal(textbook.logits(after, 7), textbook.logits(before, 7))
