"""The functions whose sums are in one order: what differs in them, and where there are none."""

import difflib

import tvm

from llmc import codegen, targets
from llmc.codegen.add_invariant_step import AddInvariantStep
from llmc.codegen.invariance import INVARIANCE, MISSING, is_asked
from llmc.ir.text import text
from llmc.passes.goal import Goal
from tests.codegen.ragged import Llama


def lowered(target):
    [facts] = targets.parse(target)
    goal = Goal(target=facts, dtype="float32", page_size=4)
    return codegen.lower(Llama(layers=1, token_last=facts.keys_token_last).module, goal), goal


def lines(module, name):
    """A function's text without its name."""
    return text(tvm.IRModule({"f": module[name].with_attr("global_symbol", "f")})).splitlines(keepends=True)


def test_a_step_asks_its_kernels(golden):
    found, _ = lowered("cuda:sm_90")
    differing = difflib.unified_diff(lines(found.module, "step"), lines(found.module, "step_invariant"), n=0)
    golden("add_invariant_step.txt", "".join(line for line in differing if line[0] in "+-" and line[1] not in "+-"))
    assert found.weights["step_invariant"] == found.weights["step"]
    assert "embed_invariant" not in found.weights  # it only looks up


def test_kernels_are_counted_once():
    found, _ = lowered("cuda:sm_90")
    assert {k["name"]: k["calls"] for k in found.kernels}["paged_attention"] == 1


def test_none_where_a_kernel_has_no_such_order():
    found, goal = lowered("cuda:sm_90")
    kernels = {v.name_hint: f for v, f in found.module.functions.items() if is_asked(f)}
    assert len(kernels) > 3  # products, the head, attention
    module = tvm.IRModule({v: f for v, f in found.module.functions.items() if not v.name_hint.endswith("_invariant")})
    name, kernel = next(iter(kernels.items()))
    module[name] = kernel.with_attr(INVARIANCE, MISSING)
    assert AddInvariantStep().run(module, goal).same_as(module)


def test_none_on_a_cpu():
    found, _ = lowered("cpu:x86-64-v3")
    assert set(found.weights) == {"embed", "step"}
