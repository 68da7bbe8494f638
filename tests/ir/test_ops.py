"""The semantic ops against numpy in float64."""

import numpy as np
import pytest
import tvm
from tvm import relax

from llmc.ir import ops

FLOAT32 = 2e-6  # float32 inside, sums of at most 64 products of unit scale


def build(shapes, emit):
    """A module whose main(**shapes) is what `emit` emits; shapes name -> (shape, dtype), 'n' a symbolic dimension."""
    n = tvm.tirx.Var("n", "int64")
    bb = relax.BlockBuilder()
    params = [
        relax.Var(name, relax.TensorType([n if d == "n" else d for d in shape], dtype))
        for name, (shape, dtype) in shapes.items()
    ]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(emit(bb, *params))
        bb.emit_func_output(out)
    return bb.get()


def run(module, *args):
    vm = relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    return vm["main"](*[tvm.runtime.tensor(a) for a in args]).numpy()


def attention_f64(q, k, v, sinks=None, *, scale, softcap=0.0, window=0, chunk=0):
    q, k, v = (x.astype("float64") for x in (q, k, v))
    n, h = q.shape[:2]
    out = np.zeros((n, h, v.shape[2]))
    for i in range(n):
        for head in range(h):
            group = head * k.shape[1] // h
            seen = [
                j for j in range(i + 1) if (not window or i - j < window) and (not chunk or i // chunk == j // chunk)
            ]
            score = k[seen, group] @ q[i, head] * scale
            if softcap:
                score = softcap * np.tanh(score / softcap)
            top = score.max() if sinks is None else max(score.max(), sinks[head])
            weight = np.exp(score - top)
            total = weight.sum() + (0 if sinks is None else np.exp(sinks[head] - top))
            out[i, head] = weight @ v[seen, group] / total
    return out


@pytest.mark.parametrize(
    "parameters",
    [
        {"scale": 0.25},
        {"scale": 1.0, "softcap": 2.0},
        {"scale": 0.5, "window": 3},
        {"scale": 0.5, "chunk": 4},
        {"scale": 0.5, "window": 3, "sinks": True},
    ],
    ids=lambda p: "-".join(p),
)
def test_attention(parameters):
    sinks = parameters.pop("sinks", False)
    shapes = {"q": (("n", 6, 8), "float32"), "k": (("n", 3, 8), "float32"), "v": (("n", 3, 5), "float32")}
    shapes |= {"sinks": ((6,), "float32")} if sinks else {}
    module = build(shapes, lambda bb, *params: ops.attention(bb, *params, **parameters))
    rng = np.random.default_rng(0)
    for n in (1, 11):
        args = [rng.standard_normal([n if d == "n" else d for d in s], "float32") for s, _ in shapes.values()]
        np.testing.assert_allclose(run(module, *args), attention_f64(*args, **parameters), atol=FLOAT32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_expert_linear(transposed, bias):
    rng = np.random.default_rng(0)
    x, ids = rng.standard_normal((7, 6), "float32"), rng.integers(0, 3, 7)
    w, b = rng.standard_normal((3, 4, 6), "float32"), rng.standard_normal((3, 4), "float32")
    want = np.einsum("si,soi->so", x.astype("float64"), w[ids].astype("float64")) + (b[ids] if bias else 0)
    w = np.ascontiguousarray(w.transpose(0, 2, 1)) if transposed else w
    shapes = {"x": (("n", 6), "float32"), "w": (w.shape, "float32"), "ids": (("n",), "int64")}
    shapes |= {"bias": (b.shape, "float32")} if bias else {}
    module = build(shapes, lambda bb, *params: ops.expert_linear(bb, *params, transposed=transposed))
    np.testing.assert_allclose(run(module, x, w, ids, *([b] if bias else [])), want, atol=FLOAT32)


def test_results_keep_the_dtype_of_their_input():
    shapes = {"q": (("n", 2, 4), "bfloat16"), "k": (("n", 2, 4), "bfloat16"), "v": (("n", 2, 4), "bfloat16")}
    module = build(shapes, lambda bb, q, k, v: ops.attention(bb, q, k, v, scale=0.5))
    assert module["main"].ret_ty.dtype == "bfloat16"


def test_an_op_is_named_with_its_parameters():
    shapes = {"q": (("n", 2, 4), "float32"), "k": (("n", 2, 4), "float32"), "v": (("n", 2, 4), "float32")}
    module = build(shapes, lambda bb, q, k, v: ops.attention(bb, q, k, v, scale=0.5, window=3))
    call, other = None, None
    for binding in module["main"].body.blocks[0].bindings:
        if isinstance(binding.value, relax.Call):
            call = binding.value
    assert ops.op_of(module, call) == "attention"
    assert ops.attributes_of(module, call) == {
        ops.OP: "attention", "scale": 0.5, "softcap": 0.0, "window": 3, "chunk": 0,
    }  # fmt: skip
    other = relax.op.add(module["main"].params[0], module["main"].params[0])
    assert ops.op_of(module, other) is None
    assert ops.attributes_of(module, other) == {}


def test_equal_ops_share_one_function():
    def twice(bb, q, k, v):
        return ops.attention(bb, ops.attention(bb, q, k, v, scale=0.5), k, v, scale=0.5)

    shapes = {"q": (("n", 2, 4), "float32"), "k": (("n", 2, 4), "float32"), "v": (("n", 2, 4), "float32")}
    assert len(build(shapes, twice).functions) == 2
