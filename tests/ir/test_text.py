import numpy as np
from tvm import relax

from llmc.ir.text import diff, text


def module_with(constant):
    builder = relax.BlockBuilder()
    x = relax.Var("model.layers.0.x", relax.TensorType([3], "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.add(x, relax.const(np.asarray(constant, "float32"))))
        builder.emit_func_output(out)
    return builder.get()


def test_names_are_identifiers_and_scalars_are_shown():
    shown = text(module_with(2.5))
    assert "model_layers_0_x" in shown
    assert 'R.const(2.5, "float32")' in shown


def test_constants_stand_as_name_and_hash():
    shown = text(module_with([1, 2, 3]))
    assert "const_float32_3_" in shown and "metadata" not in shown
    assert shown == text(module_with([1, 2, 3]))
    assert shown != text(module_with([1, 2, 4]))


def test_diff_shows_what_changed_and_nothing_else():
    assert diff(module_with(1.0), module_with(1.0)) == ""
    changes = diff(module_with(1.0), module_with(2.0), "double")
    assert changes.startswith("--- double before\n+++ double after\n")
    assert [line for line in changes.splitlines() if line[:2] in ("- ", "+ ")] == [
        '-            gv: R.Tensor((3,), dtype="float32") = R.add(model_layers_0_x, R.const(1.0, "float32"))',
        '+            gv: R.Tensor((3,), dtype="float32") = R.add(model_layers_0_x, R.const(2.0, "float32"))',
    ]
