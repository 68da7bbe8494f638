"""Row kernels against reference evaluation: every rule, and whole stretches of models."""

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc import targets
from llmc.codegen.backend import backend
from llmc.codegen.cpu.backend import CpuBackend
from llmc.codegen.fuse_rows import _Fuse
from llmc.codegen.legalize import Legalize
from llmc.codegen.library import _plan, passes
from llmc.ir.errors import CompileError
from llmc.ir.evaluate import Reference
from llmc.ir.rewrite import bindings, op_name
from llmc.passes.goal import Goal

F = "float32"


def const(value, dtype=F):
    return relax.const(np.asarray(value, dtype), dtype)


def half_turn(e, x, cos, sin):
    d = int(x.ty.shape[-1])
    axis = len(x.ty.shape) - 1
    left, right = e(R.strided_slice(x, [axis], [0], [d // 2])), e(R.strided_slice(x, [axis], [d // 2], [d]))
    turned = e(R.concat([e(R.negative(right)), left], axis=-1))
    return e(R.add(e(R.multiply(x, cos)), e(R.multiply(turned, sin))))


def rms(e, x, w):
    x = e(R.astype(x, F))
    mean = e(R.mean(e(R.power(x, const(2.0))), [-1], keepdims=True))
    return R.multiply(w, e(R.multiply(x, e(R.rsqrt(e(R.add(mean, const(1e-5))))))))


def heads_first(e, x, position, frequency):
    """Rotary angles by an outer product, heads before tokens, and back."""
    n = x.ty.shape[0]
    angle = e(R.matmul(e(R.reshape(frequency, [1, 8, 1])), e(R.astype(e(R.reshape(position, [1, 1, n])), F))))
    angle = e(R.permute_dims(angle, [0, 2, 1]))
    angle = e(R.concat([angle, angle], axis=-1))
    q = e(R.permute_dims(e(R.reshape(x, [n, 3, 16])), [1, 0, 2]))
    q = half_turn(e, q, e(R.cos(angle)), e(R.sin(angle)))
    return R.permute_dims(q, [1, 0, 2])


def interleaved(e, x):
    """Rotary pairs side by side."""
    n = x.ty.shape[0]
    even, odd = e(R.strided_slice(x, [1], [0], [48], [2])), e(R.strided_slice(x, [1], [1], [48], [2]))
    both = e(R.stack([e(R.negative(odd)), even], axis=-1))
    return R.reshape(both, [n, 48])


def chain(e, *xs):
    """Sums and products of more and more operands; some of what lies between is asked for too."""
    found = [e(R.add(xs[0], xs[1]))]
    for i, x in enumerate(xs[2:]):
        found.append(e((R.multiply if i % 2 else R.add)(found[-1], x)))
    return found[2], found[5], e(R.nn.softmax(found[-1], axis=-1))


def halves_and_more(e, x, *xs):
    """Both halves of a tuple, read late."""
    both = e(R.split(x, 2, axis=1))
    found = e(R.add(xs[0], xs[1]))
    for other in xs[2:]:
        found = e(R.multiply(found, other))
    return R.subtract(e(R.add(found, e(relax.TupleGetItem(both, 0)))), e(relax.TupleGetItem(both, 1)))


def router(e, x):
    """Softmax, the best two of every half, scattered back: groups of experts."""
    n = x.ty.shape[0]
    p = e(R.nn.softmax(x, -1))
    top = e(R.topk(e(R.reshape(p, [n, 4, 12])), k=2, axis=-1, ret_type="both", dtype="int64"))
    score = e(R.sum(e(relax.TupleGetItem(top, 0)), [-1]))
    group = e(R.topk(score, k=2, axis=-1, ret_type="indices", dtype="int64"))
    mask = e(R.scatter_elements(e(R.zeros([n, 4], F)), group, e(R.ones([n, 2], F)), axis=1))
    wide = e(R.reshape(e(R.broadcast_to(e(R.expand_dims(mask, -1)), [n, 4, 12])), [n, 48]))
    kept = e(R.where(e(R.astype(wide, "bool")), p, const(0.0)))
    ids = e(R.topk(kept, k=3, axis=-1, ret_type="indices", dtype="int64"))
    weight = e(R.gather_elements(p, ids, axis=1))
    total = e(R.sum(weight, [-1], keepdims=True))
    return e(R.divide(weight, e(R.add(total, const(1e-20))))), e(R.astype(ids, "int32"))


def experts_out(e, x, w):
    """Chosen experts' rows, weighted and summed."""
    n = x.ty.shape[0]
    many = e(R.repeat(x, 3, axis=0))
    scaled = e(R.multiply(many, e(R.reshape(w, [n * 3, 1]))))
    return R.sum(e(R.reshape(scaled, [n, 3, 48])), [1])


def added(e, pair):
    return R.add(e(relax.TupleGetItem(pair, 0)), e(relax.TupleGetItem(pair, 1)))


X, P = (F, ("n", 48)), ("int32", ("n",))


# name -> (operands, what is made of them, how far off the result may be)
def an_axis_for_each_layer(dtype):
    """The angles: every layer gives them an axis of its own, and reads the same numbers."""

    def make(e, x):
        cos = e(R.astype(e(R.cos(x)), dtype)) if dtype != F else e(R.cos(x))
        return tuple(e(R.expand_dims(cos, axis)) for axis in (1, 2, 1, 2))

    return make


CASES = {
    "an_axis_for_each_layer": ([(F, ("n", 16))], an_axis_for_each_layer(F), 1e-6),
    "an_axis_for_each_layer_in_half": ([(F, ("n", 16))], an_axis_for_each_layer("float16"), 1e-3),
    "rms_norm": ([X, (F, (48,))], rms, 2e-6),
    "rms_norm_of_half": ([("bfloat16", ("n", 48)), (F, (48,))], rms, 2e-6),
    "layer_norm": (
        [X, (F, (48,)), (F, (48,))],
        lambda e, x, g, b: R.nn.layer_norm(x, g, b, axes=[-1], epsilon=1e-5),
        4e-6,
    ),
    "heads_first": ([X, P, (F, (8,))], heads_first, 2e-5),
    "interleaved": ([X], interleaved, 0),
    "router": ([X], router, 2e-6),
    "experts_out": ([X, (F, ("n", 3))], experts_out, 2e-6),
    "gelu": ([X], lambda e, x: R.nn.gelu(x), 2e-6),
    "gelu_tanh": ([X], lambda e, x: R.nn.gelu_tanh(x), 2e-6),
    "silu_multiply": ([X, X], lambda e, x, y: R.multiply(e(R.nn.silu(x)), y), 2e-6),
    "tanh": ([X], lambda e, x: R.tanh(x), 5e-7),
    "erf": ([X], lambda e, x: R.erf(x), 5e-7),
    "sigmoid": ([X], lambda e, x: R.sigmoid(x), 5e-7),
    "exp": ([X], lambda e, x: R.exp(x), 1e-5),
    "log": ([X], lambda e, x: R.log(e(R.add(e(R.abs(x)), const(0.1)))), 2e-6),
    "softplus": ([X], lambda e, x: R.nn.softplus(x), 2e-6),
    "cube": ([X], lambda e, x: R.power(x, const(3.0)), 1e-5),
    "power": ([X], lambda e, x: R.power(e(R.abs(x)), const(0.3)), 2e-6),
    "clip": ([X], lambda e, x: R.clip(x, -0.5, 0.5), 0),
    "leaky": ([X], lambda e, x: R.nn.leakyrelu(x, 0.1), 0),
    "squared_relu": ([X], lambda e, x: R.square(e(R.nn.relu(x))), 0),
    "compare": (
        [X, X],
        lambda e, x, y: R.where(e(R.logical_and(e(R.less(x, y)), e(R.greater(x, const(0.0))))), x, y),
        0,
    ),
    "bool_out": ([X], lambda e, x: R.greater(x, const(0.0)), 0),
    "positions": ([P], lambda e, p: R.floor_divide(e(R.add(p, const(7, "int32"))), const(3, "int32")), 0),
    "scaled_by_position": (
        [P],
        lambda e, p: R.log(e(R.add(e(R.floor(e(R.divide(e(R.astype(p, F)), const(4.0))))), const(1.0)))),
        2e-6,
    ),
    "flip": ([X], lambda e, x: R.flip(x, 1), 0),
    "cumsum": ([X], lambda e, x: R.cumsum(x, axis=1), 1e-5),
    "argsort": ([X], lambda e, x: R.argsort(x, axis=-1, descending=True, dtype="int32"), 0),
    "one_hot": (
        [("int64", ("n",))],
        lambda e, i: R.one_hot(i, relax.prim_value(1), relax.prim_value(0), 8, axis=-1),
        0,
    ),
    "split": ([X], lambda e, x: added(e, e(R.split(x, 2, 1))), 0),
    "max": ([X], lambda e, x: R.max(x, [1]), 0),
    "sum_of_middle": ([(F, ("n", 5, 48))], lambda e, x: R.sum(x, [1]), 2e-6),
    "mean_of_last": ([(F, ("n", 5, 19))], lambda e, x: R.mean(x, [2]), 2e-6),
    "variance": ([X], lambda e, x: R.variance(x, [1]), 2e-6),
    "log_softmax": ([X], lambda e, x: R.nn.log_softmax(x, -1), 4e-6),
    "lookup": (
        [("bfloat16", (20, 48)), ("int32", ("n",))],
        lambda e, w, i: R.multiply(e(R.astype(e(R.take(w, i, axis=0, mode="clip")), F)), const(3.0)),
        0,
    ),
    "rows_asked_for": (
        [(F, ("n", 48)), ("int32", ("m",))],
        lambda e, x, rows: R.take(e(R.multiply(x, const(2.0))), e(R.minimum(rows, const(0, "int32"))), 0, "clip"),
        0,
    ),
    "tiny_product": (
        [(F, ("n", 3, 5)), (F, ("n", 5, 4))],
        lambda e, a, b: R.matmul(a, b),
        2e-6,
    ),
    "half_in_half_out": (
        [("bfloat16", ("n", 48)), ("bfloat16", ("n", 48))],
        lambda e, x, y: R.multiply(e(R.add(x, y)), const(0.5, "bfloat16")),
        2e-2,
    ),
    "nothing_left": (
        [X],
        lambda e, x: R.concat([x, e(R.strided_slice(x, [1], [48], [48]))], axis=1),
        0,
    ),
    "more_than_shared_memory_holds": (
        [(F, ("n", 16384))],
        lambda e, x: R.nn.softmax(e(R.subtract(e(R.tanh(x)), e(R.mean(e(R.tanh(x)), [1], keepdims=True)))), -1),
        4e-6,
    ),
    "many_tensors": ([(F, ("n", 48))] * 9, chain, 2e-6),
    "a_tuple_beside_many": ([(F, ("n", 96)), *[(F, ("n", 48))] * 6], halves_and_more, 2e-6),
    "wide": ([(F, ("n", 700))], lambda e, x: R.subtract(x, e(R.mean(x, [1], keepdims=True))), 2e-6),
}  # fmt: skip


def module():
    builder = relax.BlockBuilder()
    for name, (operands, make, _) in CASES.items():
        symbols = {s: tirx.Var(s, "int64") for s in "nm"}
        params = [
            relax.Var(f"x{i}", relax.TensorType([symbols[d] if isinstance(d, str) else d for d in shape], dtype))
            for i, (dtype, shape) in enumerate(operands)
        ]
        with builder.function(name, params, attrs={"num_input": len(params), "llmc.weights": []}):
            with builder.dataflow():
                made = make(builder.emit, *params)
                made = relax.Tuple(list(made)) if isinstance(made, tuple) else made
                out = builder.emit_output(made)
            builder.emit_func_output(out)
    return builder.get()


class Narrow(CpuBackend):
    """A machine whose kernels take few tensors."""

    def fits(self, program, tensors):
        return tensors <= NARROW


NARROW = 4


def fused(narrow=False):
    goal = Goal(target=targets.detect())
    machine = Narrow(goal.target) if narrow else backend(goal.target)
    made, kernels = module(), {}
    for name in CASES:
        made = _Fuse(made, name, machine, kernels).run()
    return made, goal


def data(name, n):
    """Operands of a case; the first rows are the same for every n."""
    found = []
    for i, (dtype, shape) in enumerate(CASES[name][0]):
        sizes = [{"n": 40, "m": 7}.get(d, d) for d in shape]
        rng = np.random.default_rng(i)
        if "int" in dtype:
            value = rng.integers(0, 8, sizes) * (16001 if name == "heads_first" else 1)
        else:
            value = rng.standard_normal(sizes) * 2
        if dtype == "bfloat16":
            import ml_dtypes

            value = value.astype(ml_dtypes.bfloat16)
        value = value.astype(dtype)
        found.append(value[:n] if shape[0] == "n" else value)
    return found


def run_all(sizes, narrow=False):
    """-> case -> for every size, (result of the kernels, of the reference); arrays of every output."""
    made, goal = fused(narrow)
    kernels = Reference.__new__(Reference)
    target = tvm.target.Target(goal.target.llvm())
    with target, passes("llvm"):
        planned, _ = _plan(Legalize().run(made, goal))
        kernels.machine = relax.VirtualMachine(relax.build(planned, target, relax_pipeline=None), tvm.cpu())
    plain = Reference(module())

    def listed(value):
        return [v.astype(F) for v in (value if isinstance(value, tuple) else (value,))]

    return {
        name: [tuple(listed(r(*data(name, n), function=name)) for r in (kernels, plain)) for n in sizes]
        for name in CASES
    }


@pytest.fixture(scope="module")
def results():
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(run_all, ([1, 3, 40],)).get(timeout=300)


def test_several_kernels_where_one_takes_too_few_tensors(isolated):
    """Every case, cut up as far as it must be, and not further."""
    found = isolated(run_all, [3], True, timeout=300)
    for name, [(got, expected)] in found.items():
        for a, b in zip(got, expected, strict=True):
            assert np.abs(a - b).max() <= CASES[name][2] * max(np.abs(b).max(), 1), name
    narrow, whole = (fused(narrow)[0] for narrow in (True, False))
    more = 0
    for name in CASES:
        calls = [[b.value for b in bindings(m[name]) if op_name(b.value) == "call_tir"] for m in (narrow, whole)]
        for call in calls[0]:
            outputs = len(call.ty.fields) if isinstance(call.ty, relax.TupleType) else 1
            assert len(call.args[1].fields) + outputs <= NARROW, name
        most = max(len(c.args[1].fields) + 1 for c in calls[1])
        assert len(calls[0]) >= len(calls[1]) and (len(calls[0]) > len(calls[1]) or most <= NARROW), name
        more += len(calls[0]) > len(calls[1])
    assert more == 2


def test_an_op_with_more_tensors_than_a_kernel_takes(monkeypatch):
    monkeypatch.setattr("tests.codegen.test_fuse_rows.NARROW", 1)
    with pytest.raises(CompileError, match="more tensors than a kernel of this target takes; compile for cpu"):
        fused(narrow=True)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(results, name):
    for got, expected in results[name]:
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= CASES[name][2] * max(np.abs(b).max(), 1)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_the_same_bits_beside_others(results, name):
    rows = {"rows_asked_for": 0}.get(name, 1)
    one, _, many = (got for got, _ in results[name])
    for a, b in zip(one, many, strict=True):
        assert (a[:rows] == b[: len(a)][:rows]).all()


def test_nothing_is_left_outside():
    made, _ = fused()
    left = {name: {op_name(b.value) for b in bindings(made[name])} - {"call_tir", "reshape", None} for name in CASES}
    assert {name: ops for name, ops in left.items() if ops} == {}


@pytest.mark.parametrize("name", ["an_axis_for_each_layer", "an_axis_for_each_layer_in_half"])
def test_what_every_layer_reads_is_written_once(name):
    made, _ = fused()
    [kernel] = [b for b in bindings(made[name]) if op_name(b.value) == "call_tir"]
    assert isinstance(kernel.var.ty, relax.TensorType)
