"""What each pass of the last stage makes of a small llama, as text; and that planted faults are seen."""

import numpy as np
import pytest
import tvm

from llmc import targets
from llmc.codegen import lower
from llmc.codegen.pipeline import KERNELS
from llmc.codegen.rows import rules
from llmc.codegen.rows.values import Memory, strided_slice
from llmc.ir.errors import FormError
from llmc.ir.kernels_form import check_kernels
from llmc.ir.text import text
from llmc.passes.goal import Goal
from tests.codegen import test_fuse_rows
from tests.codegen.ragged import Llama


def without_kernels(module):
    """Only what calls kernels: their loops are the target's."""
    return tvm.IRModule({v: f for v, f in module.functions.items() if not isinstance(f, tvm.tirx.PrimFunc)})


def test_passes_as_text(golden):
    goal = Goal(target=targets.parse("cpu:x86-64-v3")[0], page_size=4)  # the same text on every machine
    module = Llama(layers=1, checkpoint="bfloat16").module
    for step in KERNELS.passes:
        before, module = module, step.run(module, goal)
        if not module.same_as(before):
            golden(f"{step.name}.txt", text(without_kernels(module)))


def test_every_pass_is_reported(goal):
    seen = []
    lower(Llama(layers=1).module, goal, on_pass=lambda index, step, before, after: seen.append((index, step.name)))
    assert seen == list(enumerate((p.name for p in KERNELS.passes), 1))


def test_the_form_is_checked(goal):
    module = lower(Llama(layers=1).module, goal).module
    check_kernels(module)
    with pytest.raises(FormError, match="expected a function 'embed'"):
        check_kernels(tvm.IRModule({v: f for v, f in module.functions.items() if v.name_hint != "embed"}))
    with pytest.raises(FormError, match="attribute"):
        other = tvm.IRModule(module.functions)
        other["step"] = module["step"].without_attr("llmc.state")
        check_kernels(other)
    with pytest.raises(FormError, match="expected embed to take 1 tensors"):
        other = tvm.IRModule(module.functions)
        other["embed"] = Llama(layers=1).module["embed"]
        check_kernels(other)


def wrong_mean():
    rules.RULES["mean"] = rules.reduction("sum")


def wrong_negative():
    rules.RULES["negative"] = lambda p, call, args, rows, out: args[0]


def wrong_slice():
    right = rules.RULES["strided_slice"]

    def unshifted(p, call, args, rows, out):
        found = right(p, call, args, rows, out)
        return strided_slice(args[0], 1, 0, found.shape[1]) if isinstance(found, Memory) and found.offset else found

    rules.RULES["strided_slice"] = unshifted


def wrong_epsilon():
    right = rules._normalized
    rules._normalized = lambda p, x, axes, epsilon: right(p, x, axes, epsilon * 1000)


# A fault -> the case of test_fuse_rows that it has to show in.
FAULTS = {
    wrong_mean: "rms_norm",
    wrong_negative: "heads_first",
    wrong_slice: "interleaved",
    wrong_epsilon: "layer_norm",
}


def errors():
    """For every fault, planted alone: the largest error of its case, in units of what is tolerated."""
    cases, found = test_fuse_rows.CASES, {}
    for fault, name in FAULTS.items():
        kept = dict(rules.RULES), rules._normalized
        fault()
        test_fuse_rows.CASES = {name: cases[name]}
        ((got, expected),) = test_fuse_rows.run_all([3])[name]
        tolerance = cases[name][2] or 1e-9
        found[fault.__name__] = float(max(np.abs(a - b).max() for a, b in zip(got, expected, strict=True)) / tolerance)
        rules.RULES.update(kept[0])
        rules._normalized = kept[1]
    return found


def test_planted_faults_are_seen(isolated):
    found = isolated(errors, timeout=400)
    assert len(found) == len(FAULTS)
    assert {name: error for name, error in found.items() if not error > 10} == {}
