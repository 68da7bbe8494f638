from dataclasses import dataclass

import pytest
from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import CompileError, FormError
from llmc.ir.forms import check_textbook
from llmc.ir.rewrite import Rewriter, op_name
from llmc.passes import manager
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE, Stage
from tests import textbook


class _Twice(Rewriter):
    def rewrite(self, var, value):
        value = self.again(value)
        return R.multiply(self.emit(value), relax.const(2.0)) if op_name(value) == "rsqrt" else value


@dataclass(frozen=True)
class Twice:
    name: str = "twice"

    def run(self, module, goal):
        return _Twice(module).run()


@dataclass(frozen=True)
class Nothing:
    name: str = "nothing"

    def run(self, module, goal):
        return module


@dataclass(frozen=True)
class Refuses:
    name: str = "refuses"

    def run(self, module, goal):
        raise CompileError("no", op="softmax")


@dataclass(frozen=True)
class Breaks:
    """Leaves a variable that nothing binds."""

    name: str = "breaks"

    def run(self, module, goal):
        main = module["main"]
        params = list(main.params)[:-1]
        module = module.clone() if hasattr(module, "clone") else module
        broken = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
        return type(module)({**dict(module.functions.items()), module.get_global_var("main"): broken})


STAGES = (Stage("first", (Nothing(), Twice()), lambda module: None), Stage("second", (Nothing(),), lambda module: None))


def test_passes_run_in_order_and_are_recorded():
    seen = []
    module = textbook.llama(layers=1)
    result = manager.run(
        module, Goal(), stages=STAGES, on_pass=lambda *a: seen.append((a[0], a[1].name, a[2].same_as(a[3])))
    )
    assert seen == [(1, "nothing", True), (2, "twice", False), (3, "nothing", True)]
    assert [s["name"] for s in result.stages] == ["first", "second"]
    assert [(p["name"], p["changed"]) for p in result.stages[0]["passes"]] == [("nothing", False), ("twice", True)]
    assert all(s["seconds"] >= 0 and all(p["seconds"] >= 0 for p in s["passes"]) for s in result.stages)
    assert not result.module.same_as(module)


def test_several_hooks():
    seen = []
    hooks = [lambda *a: seen.append("a"), lambda *a: seen.append("b")]
    manager.run(textbook.llama(layers=1), Goal(), stages=STAGES[1:], on_pass=hooks)
    assert seen == ["a", "b"]


def test_an_error_in_a_pass_gets_its_place():
    with pytest.raises(CompileError) as error:
        manager.run(textbook.llama(layers=1), Goal(), stages=[Stage("third", (Nothing(), Refuses()), check_textbook)])
    assert (error.value.stage, error.value.pass_name, error.value.op) == ("third", "refuses", "softmax")


def test_an_error_in_a_hook_gets_its_place():
    def hook(*_):
        raise CompileError("differs")

    with pytest.raises(CompileError, match="differs") as error:
        manager.run(textbook.llama(layers=1), Goal(), stages=STAGES, on_pass=hook)
    assert (error.value.stage, error.value.pass_name) == ("first", "nothing")


def test_the_form_is_checked_after_a_stage():
    stage = Stage("textbook", (Nothing(),), check_textbook)
    with pytest.raises(FormError, match=r"textbook form: expected int32 \[.*\] as parameter tokens") as error:
        manager.run(textbook.llama(layers=1), Goal(), stages=[stage])
    assert error.value.stage == "textbook"
    manager.run(textbook.llama(layers=1), Goal(), stages=[stage], check=False)


def test_a_malformed_module_is_found_after_its_pass():
    stage = Stage("odd", (Breaks(), Nothing()), lambda module: None)
    with pytest.raises(FormError, match="expected a well-formed module, found") as error:
        manager.run(textbook.llama(layers=1), Goal(), stages=[stage], check="pass")
    assert error.value.pass_name == "breaks"


@pytest.mark.parametrize("level, shown", [("", []), ("1", ["stage first"]), ("2", ["twice: ", "stage first"])])
def test_debug_levels(level, shown, monkeypatch, capsys):
    monkeypatch.setenv("LLMC_DEBUG", level)
    manager.run(textbook.llama(layers=1), Goal(), stages=STAGES[:1])
    err = capsys.readouterr().err
    assert all(s in err for s in shown)
    assert bool(err) == bool(shown)
    assert "R.multiply" not in err


def test_debug_level_3_shows_diffs(monkeypatch, capsys):
    monkeypatch.setenv("LLMC_DEBUG", "3")
    manager.run(textbook.llama(layers=1), Goal(), stages=STAGES[:1])
    assert "--- twice before" in capsys.readouterr().err


def test_no_pass_has_the_name_of_another_in_its_stage_and_all_are_frozen():
    for stage in PIPELINE:
        names = [p.name for p in stage.passes]
        assert len(set(names)) == len(names)
        assert all(type(p).__dataclass_params__.frozen and type(p).__doc__ for p in stage.passes)
