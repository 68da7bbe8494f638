import numpy as np
import pytest
from tvm import relax, tirx

from llmc.ir.evaluate import evaluate
from llmc.ir.rewrite import Rewriter, bindings, finish, op_name
from llmc.ir.text import text

SHIFT = np.array([1.0, 2.0])


def small(dtype="float32"):
    """main(x [n, 2]) = exp(x + [1, 2]) + 2"""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64"), 2], dtype))
    with builder.function("main", [x], attrs={"num_input": 1, "llmc.weights": []}):
        with builder.dataflow():
            y = builder.emit(relax.op.add(x, relax.const(np.array([1.0, 2.0]), dtype)), "shifted")
            y = builder.emit(relax.op.exp(y), "raised")
            out = builder.emit_output(relax.op.add(y, relax.const(2.0, dtype)))
        builder.emit_func_output(out)
    return builder.get()


class ExpToSquare(Rewriter):
    """exp(x) -> abs(x) * abs(x)"""

    def rewrite(self, var, value):
        if op_name(value) != "exp":
            return self.again(value)
        x = self.emit(relax.op.abs(self.get(value.args[0])), "positive")
        return relax.op.multiply(x, x)


def test_a_rewriter_without_hooks_changes_nothing():
    assert text(Rewriter(small()).run()) == text(small())


def test_rewrites_one_op_and_keeps_the_names():
    rewritten = ExpToSquare(small()).run()
    assert [b.var.name for b in bindings(rewritten["main"])][:3] == ["shifted", "positive", "raised"]
    x = np.array([[0.5, -3.0]], "float32")
    np.testing.assert_allclose(evaluate(rewritten, [x]), (x + SHIFT) ** 2 + 2, rtol=1e-6)


def test_into_another_function_leaves_the_old_one():
    both = ExpToSquare(small()).run(into="step")
    assert {v.name_hint for v in both.functions} == {"main", "step"}
    relax.analysis.well_formed(both)
    x = np.ones((3, 2), "float32")
    np.testing.assert_allclose(evaluate(both, [x], "step"), (x + SHIFT) ** 2 + 2, rtol=1e-6)
    np.testing.assert_allclose(evaluate(both, [x]), np.exp(x + SHIFT) + 2, rtol=1e-6)


def test_match_cast_and_tuples_are_rebuilt():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([4, 6], "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            parts = builder.emit(relax.op.split(x, 2, axis=1))
            part = builder.match_cast(builder.emit(relax.TupleGetItem(parts, 1)), relax.TensorType([4, 3], "float32"))
            out = builder.emit_output(relax.op.concat([part, builder.emit(relax.TupleGetItem(parts, 0))], axis=1))
        builder.emit_func_output(out)
    module = finish(builder.get())
    assert text(Rewriter(module).run()) == text(module)


def test_parameters_attributes_and_result_can_change():
    class Pair(Rewriter):
        def params(self, old):
            self.scale = relax.Var("scale", relax.TensorType([], "float32"))
            return [*old, self.scale]

        def attrs(self, old):
            return old | {"num_input": 2}

        def result(self, body):
            return relax.op.multiply(self.get(body), self.scale)

    module = Pair(small()).run()
    assert int(module["main"].attrs["num_input"]) == 2
    x = np.ones((1, 2), "float32")
    got = evaluate(module, [x, np.array(3.0, "float32")])
    np.testing.assert_allclose(got, 3 * (np.exp(x + SHIFT) + 2), rtol=1e-6)


@pytest.mark.parametrize("value, name", [("exp", "exp"), ("softmax", "nn.softmax"), ("var", None)])
def test_op_name(value, name):
    x = relax.Var("x", relax.TensorType([2], "float32"))
    assert op_name({"exp": relax.op.exp(x), "softmax": relax.op.nn.softmax(x), "var": x}[value]) == name
