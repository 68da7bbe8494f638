"""Planting faults: what each drops, and that it drops nothing else."""

import numpy as np
import pytest
from tvm import relax

from llmc.bench import mutations
from llmc.ir.ops import attention, attributes_of, op_of
from llmc.ir.rewrite import bindings


@pytest.fixture
def module():
    """Two attentions: one with a window, a soft cap and sinks, one with chunks."""
    builder = relax.BlockBuilder()
    q, k, v = (
        relax.Var(name, relax.TensorType([7, heads, 4], "float32"))
        for name, heads in zip("qkv", (4, 2, 2), strict=True)
    )
    sinks = relax.Var("sinks", relax.TensorType([4], "float32"))
    with builder.function("main", [q, k, v, sinks], attrs={"num_input": 4}):
        with builder.dataflow():
            first = attention(builder, q, k, v, sinks, scale=0.5, softcap=3.0, window=3)
            out = builder.emit_output(attention(builder, first, k, v, scale=1.0, chunk=2))
        builder.emit_func_output(out)
    return builder.get()


def attentions(module):
    """(parameters, has sinks) of every attention."""
    found = []
    for binding in bindings(module["main"]):
        if op_of(module, binding.value) == "attention":
            parameters = attributes_of(module, binding.value)
            found.append(
                ({k: parameters[k] for k in ("scale", "softcap", "window", "chunk")}, len(binding.value.args) == 4)
            )
    return found


BEFORE = [
    ({"scale": 0.5, "softcap": 3.0, "window": 3, "chunk": 0}, True),
    ({"scale": 1.0, "softcap": 0.0, "window": 0, "chunk": 2}, False),
]


@pytest.mark.parametrize(
    ("fault", "at", "changed"),
    [
        ("window", 0, ({"scale": 0.5, "softcap": 3.0, "window": 0, "chunk": 0}, True)),
        ("softcap", 0, ({"scale": 0.5, "softcap": 0.0, "window": 3, "chunk": 0}, True)),
        ("sinks", 0, ({"scale": 0.5, "softcap": 3.0, "window": 3, "chunk": 0}, False)),
        ("chunk", 1, ({"scale": 1.0, "softcap": 0.0, "window": 0, "chunk": 0}, False)),
    ],
)
def test_a_fault_drops_one_thing(module, fault, at, changed):
    assert attentions(module) == BEFORE
    planted = mutations.Planted(module, fault)
    after = attentions(planted.run())
    assert planted.count == 1
    assert after[at] == changed
    assert after[1 - at] == BEFORE[1 - at]


def test_the_scale_is_another_in_every_attention(module):
    planted = mutations.Planted(module, "scale")
    assert [parameters["scale"] for parameters, _ in attentions(planted.run())] == [1.0, 0.5]
    assert planted.count == 2


def test_faults_in_weights():
    weights = {
        "model.layers.0.up.weight": np.ones((2, 2)),
        "model.layers.1.up.weight": np.ones((2, 2)),
        "model.layers.1.mlp.experts.down_proj": np.ones((3, 2, 2)),
        "model.layers.2.up.weight": np.ones((2, 2)),
        "lm_head.weight": np.ones((2, 2)),
    }
    faults = mutations.in_weights(weights, {"attention", "expert_linear"})
    assert set(faults["layer"]) == {"model.layers.1.up.weight", "model.layers.1.mlp.experts.down_proj"}
    assert not any(array.any() for array in faults["layer"].values())
    assert list(faults["expert"]) == ["model.layers.1.mlp.experts.down_proj"]
    assert faults["expert"]["model.layers.1.mlp.experts.down_proj"].any(axis=(1, 2)).tolist() == [True, False, True]
    assert "expert" not in mutations.in_weights(weights, {"attention"})
