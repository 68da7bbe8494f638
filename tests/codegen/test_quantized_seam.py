"""Quantized weights in the last stage: what reaches a machine's kernels, and that nothing is decoded beside them."""

import itertools

import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc import targets
from llmc.codegen.lift_weights import RECIPES, LiftWeights
from llmc.codegen.lower_embedding import LowerEmbedding
from llmc.codegen.lower_experts import LowerExperts
from llmc.codegen.lower_matmul import LowerMatmul
from llmc.ir.errors import CompileError
from llmc.ir.ops import expert_linear
from llmc.ir.quantized import Format, dequantize, round_activation
from llmc.ir.rewrite import bindings, op_name
from llmc.passes.goal import Goal

INT4, INT8 = Format(4, 32, offset=8), Format(8, 0, "float32", offset=128)
PASSES = (LowerEmbedding(), LowerMatmul(), LowerExperts(), LiftWeights())


@pytest.fixture
def asked(monkeypatch):
    """Kernels that do nothing; what they were asked for: [(which, sizes, how)]. Parts are packed as they are."""
    seen = []

    def kernel(which):
        def make(target, *sizes, **how):
            seen.append((which, sizes, how))
            return tvm.tirx.PrimFunc([tirx.Var("x", "int32")], tirx.Evaluate(len(seen)))

        return make

    def pack(target, emit, parts, columns, depth, format):
        return list(parts)

    kernels = {"pack": pack} | {name: kernel(name) for name in ("matmul", "expert_linear", "take")}
    for room, name in itertools.product(("cpu", "gpu"), kernels):
        monkeypatch.setattr(f"llmc.codegen.{room}.quantized.{name}", kernels[name])
    return seen


def module(body, formats: dict[str, tuple[Format, tuple[int, ...]]], embed=None, dtype="float32"):
    """embed(tokens, …) and step(x [n, 64], ids [n], …): body(bb, x, ids, **weights) of dequantized weights."""
    bb = relax.BlockBuilder()

    def parts_of(names):
        return {
            f"{name}:{part}": relax.Var(f"{name}_{part}", relax.TensorType(list(shape), kind))
            for name in names
            for part, (shape, kind) in formats[name][0].parts(formats[name][1]).items()
        }

    def weights(params, names):
        return {
            n: dequantize(bb, formats[n][0], *(v for k, v in params.items() if k.split(":")[0] == n)) for n in names
        }

    def function(name, inputs, made, used):
        params = parts_of(used)
        attrs = {"num_input": len(inputs), "llmc.weights": list(params)}
        with bb.function(name, [*inputs, *params.values()], attrs=attrs):
            with bb.dataflow():
                out = bb.emit_output(made(bb, *inputs, **weights(params, used)))
            bb.emit_func_output(out)

    n = tirx.Var("n", "int64")
    tokens = relax.Var("tokens", relax.TensorType([n], "int32"))
    function("embed", [tokens], embed or (lambda bb, t: bb.emit(R.astype(t, "float32"))), ["table"] if embed else [])
    n = tirx.Var("n", "int64")
    x, ids = relax.Var("x", relax.TensorType([n, 64], dtype)), relax.Var("ids", relax.TensorType([n], "int32"))
    function("step", [x, ids], body, list(formats))
    return bb.get()


def lowered(made, target="cpu:x86-64-v4"):
    goal = Goal(target=targets.parse(target)[0])
    for step in PASSES:
        made = step.run(made, goal)
    return made


def calls(made, function="step"):
    """Of every kernel that is called: its name, and the shapes it is given."""
    found = []
    for b in bindings(made[function]):
        if op_name(b.value) == "call_tir":
            shapes = [[int(d) if isinstance(d, tirx.IntImm) else "n" for d in a.ty.shape] for a in b.value.args[1]]
            found.append((b.value.args[0].name_hint, shapes))
    return found


def linear(bb, x, w, dtype="float32"):
    w = w if dtype == "float32" else bb.emit(R.astype(w, dtype))
    return bb.emit(R.matmul(x, bb.emit(R.permute_dims(w, [1, 0])), out_dtype="float32"))


@pytest.mark.parametrize("target", ["cpu:x86-64-v4", "cuda:sm_90"])
def test_a_product_reads_the_packed_parts(asked, target):
    def body(bb, x, ids, w):
        return linear(bb, x, w, "bfloat16")

    made = lowered(module(body, {"w": (INT4, (96, 64))}, dtype="bfloat16"), target)
    assert calls(made) == [("matmul_96x64_int4_g32", [["n", 64], [96, 64], [96, 2]])]
    assert set(made.attrs[RECIPES]) == {"w:codes", "w:scales"}
    ((which, sizes, how),) = asked
    assert (which, sizes) == ("matmul", (96, 64))
    # and what else a machine's kernels are told
    assert how.items() >= {"format": INT4, "activation": "bfloat16", "out": "float32", "rounded": None}.items()


def test_the_kernel_rounds_what_was_rounded(asked):
    def body(bb, x, ids, w):
        return linear(bb, round_activation(bb, x, group=32), w)

    made = lowered(module(body, {"w": (INT4, (96, 64))}))
    assert calls(made) == [("matmul_96x64_int4_g32_a8", [["n", 64], [96, 64], [96, 2]])]
    assert asked[0][2]["rounded"] == 32
    assert [op_name(b.value) for b in bindings(made["step"])] == ["call_tir"]  # nothing rounds beside it


def test_a_kernel_does_not_round_to_other_numbers_than_the_op_says(asked):
    """Integers where E4M3 was asked for: the op stays, and the kernel takes what it gives."""

    def body(bb, x, ids, w):
        return linear(bb, round_activation(bb, x, group=32, kind="fp8"), w)

    made = lowered(module(body, {"w": (INT4, (96, 64))}))
    assert asked[0][2]["rounded"] is None
    assert len(list(bindings(made["step"]))) == 2


def test_joined_parts_are_packed_as_one(asked):
    bb, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([n, 64], "float32"))
    codes, scales = ([relax.Var(f"{k}{i}", relax.TensorType([48, width], dtype)) for i in "ab"]
                     for k, width, dtype in (("c", 64, "uint8"), ("s", 2, "float16")))  # fmt: skip
    attrs = {"num_input": 1, "llmc.weights": ["a.w:codes", "b.w:codes", "a.w:scales", "b.w:scales"]}
    with bb.function("step", [x, *codes, *scales], attrs=attrs):
        with bb.dataflow():
            parts = [bb.emit(R.concat(halves, axis=0)) for halves in (codes, scales)]
            out = bb.emit_output(linear(bb, x, dequantize(bb, INT4, *parts)))
        bb.emit_func_output(out)
    made = bb.get()
    made["embed"] = module(lambda bb, x, ids: x, {})["embed"]
    made = lowered(made)
    assert calls(made) == [("matmul_96x64_int4_g32", [["n", 64], [96, 64], [96, 2]])]
    assert set(made.attrs[RECIPES]) == {"a+b.w:codes:concat", "a+b.w:scales:concat"}


def test_experts_as_stored(asked):
    def body(bb, x, ids, w):
        return expert_linear(bb, x, w, ids)

    made = lowered(module(body, {"w": (INT4, (4, 96, 64))}))
    assert calls(made) == [("expert_linear_4x96x64_int4_g32", [["n", 64], [4, 96, 64], [4, 96, 2], ["n"]])]
    how = {"format": INT4, "activation": "float32", "ids": "int32", "bias": None, "rounded": None}
    assert asked == [("expert_linear", (4, 96, 64), how)]


def test_a_tied_embedding_is_packed_once(asked):
    def embed(bb, tokens, table):
        return bb.emit(R.astype(bb.emit(R.take(table, tokens, axis=0)), "bfloat16"))

    made = lowered(module(lambda bb, x, ids, table: linear(bb, x, table), {"table": (INT8, (50, 64))}, embed))
    assert calls(made, "embed") == [("take_int8", [[50, 64], [50, 1], ["n"]])]
    assert calls(made) == [("matmul_50x64_int8", [["n", 64], [50, 64], [50, 1]])]
    assert set(made.attrs[RECIPES]) == {"table:codes", "table:scales"}


def test_what_no_kernel_reads_is_refused(asked):
    """A product of three axes: kernels read rows of two."""

    def body(bb, x, ids, w):
        x = bb.emit(R.expand_dims(x, 0))
        return bb.emit(R.matmul(x, bb.emit(R.permute_dims(w, [0, 2, 1]))))

    with pytest.raises(CompileError, match=r"read by a kernel, found w \(int4-g32\) used by permute_dims in step"):
        lowered(module(body, {"w": (INT4, (2, 96, 64))}))
