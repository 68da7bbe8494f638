import ml_dtypes
import numpy as np
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from llmc.ir.evaluate import Reference, evaluate


def program(body, *types):
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(*t)) for i, t in enumerate(types)]
    with builder.function("main", params, attrs={"num_input": len(params)}):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(body(builder, *params)))
        builder.emit_func_output(out)
    return builder.get()


def test_symbolic_lengths_and_two_calls():
    n = tirx.Var("n", "int64")
    run = Reference(program(lambda bb, x, w: relax.op.matmul(x, w), ([n, 3], "float32"), ([3, 2], "float32")))
    w = np.arange(6, dtype="float32").reshape(3, 2)
    for rows in (1, 5):
        np.testing.assert_allclose(run(np.ones((rows, 3), "float32"), w), np.ones((rows, 3)) @ w)


def test_bfloat16_in_and_out():
    n = tirx.Var("n", "int64")
    module = program(lambda bb, x: relax.op.add(x, x), ([n], "bfloat16"))
    got = evaluate(module, [np.array([1.5, 2.0], ml_dtypes.bfloat16)])
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype("float32"), [3.0, 4.0])


def test_private_functions_and_prim_funcs_run_and_tuples_come_back():
    def body(bb, x):
        doubled = bb.emit_te(lambda a: tvm.te.compute(a.shape, lambda i: a[i] * 2.0), x)
        y = relax.Var("y", relax.TensorType([4], "float32"))
        inner = relax.BlockBuilder()
        with inner.function("square", [y], private=True):
            inner.emit_func_output(inner.emit(relax.op.multiply(y, y)))
        squared = bb.emit(relax.Call(bb.add_func(inner.get()["square"], "square"), [doubled]))
        return relax.Tuple([doubled, squared])

    x = np.arange(4, dtype="float32")
    doubled, squared = evaluate(program(body, ([4], "float32")), [x])
    np.testing.assert_allclose(doubled, 2 * x)
    np.testing.assert_allclose(squared, 4 * x * x)


def test_a_tensor_is_written_in_place():
    @T.prim_func(private=True)
    def put(pool: T.Buffer((4,), "float32"), x: T.Buffer((1,), "float32")):
        pool[2] = x[0]

    builder = relax.BlockBuilder()
    pool, x = relax.Var("pool", relax.TensorType([4], "float32")), relax.Var("x", relax.TensorType([1], "float32"))
    with builder.function("main", [pool, x], attrs={"num_input": 2}):
        with builder.dataflow():
            function = builder.add_func(put, "put")
            written = builder.emit(relax.op.call_tir_inplace(function, [pool, x], 0, pool.ty))
            out = builder.emit_output(relax.op.sum(written))
        builder.emit_func_output(out)
    pages = tvm.runtime.tensor(np.zeros(4, "float32"))
    assert evaluate(builder.get(), [pages, np.array([7.0], "float32")]) == 7
    np.testing.assert_array_equal(pages.numpy(), [0, 0, 7, 0])
