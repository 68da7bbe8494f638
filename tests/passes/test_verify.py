from dataclasses import dataclass

import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import CompileError
from llmc.ir.rewrite import Rewriter, op_name
from llmc.passes import manager
from llmc.passes.drop_batch_axis import DropBatchAxis
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE, Stage
from llmc.passes.verify import Verifier
from tests import textbook


def model(**options):
    module = textbook.llama(**options)
    names = list(map(str, module["main"].attrs["llmc.weights"]))
    return module, dict(zip(names, textbook.arguments(module, 1)[2:], strict=True))


class _Change(Rewriter):
    """Adds something to what the second `op` of a function computes."""

    def __init__(self, module, op):
        super().__init__(module, "step" if any(v.name_hint == "step" for v in module.functions) else "main")
        self.op, self.count = op, 0

    def rewrite(self, var, value):
        value = self.again(value)
        if op_name(value) != self.op:
            return value
        self.count += 1
        return R.add(self.emit(value), relax.const(0.1)) if self.count == 2 else value


@dataclass(frozen=True)
class Change:
    op: str
    name: str = "change"

    def run(self, module, goal):
        return _Change(module, self.op).run()


def test_the_pipeline_keeps_what_the_program_computes():
    module, weights = model(layers=1, window=7, softcap=3.0, sinks=True)
    verifier = Verifier(module, weights, Goal(), lengths=(1, 20))
    manager.run(module, Goal(), stages=PIPELINE, on_pass=verifier.on_pass)


def test_names_the_pass_the_layer_and_the_op():
    module, weights = model()
    stages = [Stage("textbook", (DropBatchAxis(), Change("nn.silu")), lambda module: None)]
    with pytest.raises(CompileError) as error:
        manager.run(module, Goal(), stages=stages, on_pass=Verifier(module, weights, Goal(), lengths=(5,)).on_pass)
    message = str(error.value)
    assert message.startswith(
        "change changed what the program computes: expected the imported program's logits within "
    )
    assert "near weight layers.1.gate.weight" in message
    assert (error.value.stage, error.value.pass_name, error.value.op) == ("textbook", "change", "add")


def test_a_fault_in_the_ragged_form_is_found_and_placed():
    module, weights = model(layers=1)
    verifier = Verifier(module, weights, Goal(), lengths=(1, 20))
    before = manager.run(module, Goal(), stages=PIPELINE).module
    change = Change("rsqrt")
    with pytest.raises(CompileError, match=r"the first value to differ is .* \(add, near weight") as error:
        verifier.on_pass(9, change, before, change.run(before, Goal()))
    assert error.value.pass_name == "change"
