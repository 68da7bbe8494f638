"""A function that draws tokens: where the machine has a kernel for it, and only there."""

import tvm

from llmc import targets
from llmc.codegen.add_sample import AddSample
from llmc.ir.text import text
from llmc.passes.goal import Goal
from tests.codegen.ragged import Llama


def test_a_gpu_draws_its_tokens(golden):
    module = Llama(layers=1).module
    after = AddSample().run(module, Goal(target=targets.parse("cuda:sm_90")[0]))
    assert {v.name_hint for v in after.functions} - {v.name_hint for v in module.functions} == {
        "sample",
        "sample_tokens",
    }
    golden("add_sample.txt", text(tvm.IRModule({v: f for v, f in after.functions.items() if v.name_hint == "sample"})))


def test_a_cpu_leaves_it_to_the_runtime():
    module = Llama(layers=1).module
    assert AddSample().run(module, Goal(target=targets.detect())).same_as(module)
