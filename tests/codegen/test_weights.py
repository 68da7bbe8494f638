"""Recipes against numpy, row slice by row slice."""

import ml_dtypes
import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.codegen.weights import Recipe, weight_specs, write_weights
from llmc.ir.errors import CompileError
from llmc.runtime.artifact import Weights, WeightsWriter
from tests.codegen.conftest import Array

RNG = np.random.default_rng(0)
A = RNG.standard_normal((6, 8)).astype(ml_dtypes.bfloat16)
B = RNG.standard_normal((10, 8)).astype(ml_dtypes.bfloat16)


def recipe(make, **sources):
    """A recipe over sources a, b, ...; `make(emit, *params)`."""
    builder = relax.BlockBuilder()
    params = [relax.Var(k, relax.TensorType(v.shape, str(v.dtype))) for k, v in sources.items()]
    with builder.function("recipe", params):
        with builder.dataflow():
            out = builder.emit_output(make(builder.emit, *params))
        builder.emit_func_output(out)
    return builder.get()["recipe"].with_attr("llmc.sources", list(sources))


CASES = {
    "identity": (lambda emit, a: a, lambda a: a),
    "transpose": (lambda emit, a: R.permute_dims(a, [1, 0]), lambda a: a.T),
    "transpose twice": (lambda emit, a: R.permute_dims(emit(R.permute_dims(a)), [1, 0]), lambda a: a),
    "split rows": (lambda emit, a: R.reshape(a, [3, 2, 8]), lambda a: a.reshape(3, 2, 8)),
    "merge rows": (lambda emit, a: R.reshape(a, [24, 2]), lambda a: a.reshape(24, 2)),
    "odd reshape": (lambda emit, a: R.reshape(a, [4, 12]), lambda a: a.reshape(4, 12)),
    "flat": (lambda emit, a: R.reshape(a, [48]), lambda a: a.reshape(48)),
    "cast": (lambda emit, a: R.astype(a, "float32"), lambda a: a.astype("float32")),
    "plus one": (lambda emit, a: R.add(emit(R.astype(a, "float32")), relax.const(1.0)), lambda a: a.astype("f4") + 1),
    "pad": (
        lambda emit, a: R.nn.pad(a, [1, 3, 0, 2], "constant", 0.0),
        lambda a: np.pad(a.astype("f4"), [(1, 3), (0, 2)]).astype(a.dtype),
    ),
    "tanh": (lambda emit, a: R.tanh(emit(R.astype(a, "float32"))), lambda a: np.tanh(a.astype("float32"))),
    "every third column from the second": (
        lambda emit, a: R.strided_slice(a, axes=[1], begin=[1], end=[8], strides=[3]),
        lambda a: a[:, 1:8:3],
    ),
    "rows two to four": (lambda emit, a: R.strided_slice(a, axes=[0], begin=[2], end=[4]), lambda a: a[2:4]),
    "nibbles": (
        lambda emit, a: R.bitwise_or(
            emit(R.bitwise_and(emit(R.astype(a, "uint8")), relax.const(15, "uint8"))),
            emit(
                R.left_shift(
                    emit(R.right_shift(emit(R.astype(a, "uint8")), relax.const(1, "uint8"))), relax.const(4, "uint8")
                )
            ),
        ),
        lambda a: a.astype("u1") & 15 | a.astype("u1") >> 1 << 4,
    ),
    "panels": (
        lambda emit, a: R.permute_dims(emit(R.reshape(a, [3, 2, 4, 2])), [0, 2, 1, 3]),
        lambda a: a.reshape(3, 2, 4, 2).transpose(0, 2, 1, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_rows_equal_numpy(case, size):
    make, oracle = CASES[case]
    expected = oracle(A)
    slices = list(Recipe(recipe(make, a=A), {"a": Array(A)}).slices(size))
    got = np.concatenate(slices)
    got = got.view(ml_dtypes.bfloat16) if expected.dtype == ml_dtypes.bfloat16 else got
    assert got.shape == expected.shape and got.dtype == expected.dtype
    # tanh of the two libraries may differ in the last places
    np.testing.assert_allclose(got.astype("f4"), expected.astype("f4"), rtol=1e-6 if case == "tanh" else 0)
    assert size > 1 or case in ("flat",) or len(slices) > 1


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_concat_of_projections_in_panels(size):
    """Rows of a panel come from two sources."""

    def make(emit, a, b):
        both = emit(R.concat([a, b], axis=0))
        return R.permute_dims(emit(R.reshape(both, [4, 4, 8])), [0, 2, 1])

    made = Recipe(recipe(make, a=A, b=B), {"a": Array(A), "b": Array(B)})
    expected = np.concatenate([A, B]).reshape(4, 4, 8).transpose(0, 2, 1)
    assert (np.concatenate(list(made.slices(size))).view(ml_dtypes.bfloat16) == expected).all()


def test_written_file_holds_the_recipes(tmp_path):
    recipes = {"x": recipe(CASES["panels"][0], a=A), "y": recipe(CASES["cast"][0], a=A)}
    seen = []
    with WeightsWriter(tmp_path / "w", weight_specs(recipes)) as writer:
        write_weights(recipes, {"a": Array(A)}, writer, lambda done, total: seen.append((done, total)))
    file = Weights(tmp_path / "w")
    assert (file["x"].view(ml_dtypes.bfloat16) == CASES["panels"][1](A)).all()
    assert (file["y"] == A.astype("float32")).all()
    assert seen[-1] == (A.nbytes * 3, A.nbytes * 3)


def test_a_source_that_is_missing_or_other_is_named():
    made = recipe(CASES["identity"][0], a=A)
    with pytest.raises(CompileError, match="weight 'a' is needed"):
        Recipe(made, {})
    with pytest.raises(CompileError, match=r"weight 'a': expected bfloat16 \[6, 8\], found bfloat16 \[10, 8\]"):
        Recipe(made, {"a": Array(B)})


def test_a_source_may_be_a_number():
    """Weights without axes (xIELU's) stay without: a row more would be another shape for what follows."""
    number = np.array(0.5, np.float32)
    made = recipe(lambda emit, a: R.reshape(emit(R.exp(a)), [1]), a=number)
    (found,) = Recipe(made, {"a": Array(number)}).slices()
    assert found.tolist() == [np.exp(np.float32(0.5))]


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_nibbles_are_joined_a_slice_at_a_time(size, monkeypatch):
    """Codes of 4 bits, as panels of a CPU hold them: no op but those that have rules."""
    from llmc.codegen.cpu.quantized import pack
    from llmc.ir.quantized import Format
    from llmc.targets import parse

    [target] = parse("cpu:x86-64-v3")
    codes, scales = RNG.integers(0, 16, (40, 16), "uint8"), RNG.standard_normal((40, 2)).astype("float16")
    monkeypatch.setattr(Recipe, "_fallback", lambda self, value: pytest.fail(f"no rule for {value}"))

    def packed(which):
        make = lambda emit, c, s: pack(target, emit, [c, s], 40, 16, Format(4, 8, offset=8))[which]  # noqa: E731
        found = Recipe(recipe(make, c=codes, s=scales), {"c": Array(codes), "s": Array(scales)})
        return np.concatenate(list(found.slices(size)))

    rows = np.zeros((48, 16), "uint8")  # 3 panels of 2 vectors of 8 columns
    rows[:40] = codes
    pairs = rows.reshape(3, 2, 8, 2, 2, 4)
    expected = (pairs[..., 0, :] | pairs[..., 1, :] << 4).transpose(0, 3, 1, 2, 4)
    assert (packed(0) == expected).all()
    wide = np.zeros((48, 2), "float16")
    wide[:40] = scales
    assert (packed(1) == wide.reshape(3, 2, 8, 2).transpose(0, 3, 1, 2)).all()


def test_a_slice_of_rows_is_cut_from_the_whole():
    made = Recipe(recipe(lambda emit, a: R.strided_slice(a, [0, 1], [1, 2], [5, 8], [2, 3]), a=A), {"a": Array(A)})
    assert (np.concatenate(list(made.slices(1))).view(ml_dtypes.bfloat16) == A[1:5:2, 2:8:3]).all()
