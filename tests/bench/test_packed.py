"""Packed weights back to a checkpoint's."""

import ml_dtypes
import numpy as np
import pytest

from llmc.bench.packed import PackedError, rows, sources, unpack
from llmc.codegen.cpu.pack import Panels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_panels_become_rows(dtype):
    weight = np.arange(50 * 24).reshape(50, 24).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    panels = Panels(50, 24, dtype, lanes=16, vectors=2)
    packed = np.zeros(panels.shape, weight.dtype)
    panels.pack(weight, packed)
    assert (rows(packed)[:50, :24] == weight).all()
    assert rows(weight) is weight


def test_names_of_fused_weights():
    assert sources("a.0.self_attn.q_proj+k_proj+v_proj.weight:concat+reshape") == [
        f"a.0.self_attn.{p}_proj.weight" for p in "qkv"
    ]
    assert sources("lm_head.weight") == ["lm_head.weight"]


def test_rows_of_fused_weights_are_told_apart():
    packed = {"m.q+k.weight:concat": np.arange(8 * 3).reshape(8, 3), "norm.weight": np.ones(3)}
    shapes = {"m.q.weight": (4, 2), "m.k.weight": (3, 2), "norm.weight": (3,)}
    found = dict(unpack(packed, list(packed), shapes))
    assert list(found) == list(shapes)
    assert (found["m.q.weight"] == packed["m.q+k.weight:concat"][:4, :2]).all()
    assert (found["m.k.weight"] == packed["m.q+k.weight:concat"][4:7, :2]).all()
    assert found["norm.weight"].shape == (3,)


@pytest.mark.parametrize(
    ("packed", "shapes", "message"),
    [
        ({"a.weight": np.ones((2, 2))}, {}, "has a weight a.weight, and the model has none"),
        ({"a.weight": np.ones((2, 2))}, {"a.weight": (3, 2)}, r"expected the rows of \[\[3, 2\]\], found \[2, 2\]"),
        ({"a.weight": np.ones((1, 2, 3))}, {"a.weight": (3, 2)}, "found a tensor of shape"),
    ],
)
def test_what_is_not_the_models_is_refused(packed, shapes, message):
    with pytest.raises(PackedError, match=message):
        list(unpack(packed, list(packed), shapes))
