"""Run the stages: the one place where passes are timed, checked, reported and dumped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tvm

from llmc.ir.debug import debug_level, log
from llmc.ir.errors import CompileError
from llmc.ir.forms import check_well_formed
from llmc.ir.text import diff
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE, Pass, Stage

__all__ = ["Hook", "Result", "run"]

Hook = Callable[[int, Pass, tvm.IRModule, tvm.IRModule], None]


class Result(NamedTuple):
    """What came out, and a record: [{"name", "seconds", "passes": [{"name", "seconds", "changed"}]}]."""

    module: tvm.IRModule
    stages: list[dict]


def run(
    module: tvm.IRModule,
    goal: Goal,
    *,
    stages: Iterable[Stage] = PIPELINE,
    on_pass: Hook | Iterable[Hook] | None = None,
    check: bool | str = True,
) -> Result:
    """Runs the passes of `stages` in order.

    on_pass(index, pass, before, after), or several such, are called after every pass, changed or not; index counts
    from 1 over all stages. check: True checks the form after every stage; "pass" checks also that the module is well
    formed after every pass; False checks nothing. A CompileError raised by a pass, a hook or a check leaves with its
    `stage` and `pass_name` set.

    LLMC_DEBUG says how much of it is printed, see ir/debug.py.
    """
    hooks = [on_pass] if callable(on_pass) else list(on_pass or ())
    level = debug_level()
    record: list[dict] = []
    index = 0
    for stage in stages:
        entry: dict[str, Any] = {"name": stage.name, "seconds": 0.0, "passes": []}
        record.append(entry)
        current: Pass | None = None
        try:
            for current in stage.passes:
                index += 1
                before, start = module, time.perf_counter()
                module = current.run(before, goal)
                seconds = time.perf_counter() - start
                changed = not module.same_as(before)
                entry["seconds"] += seconds
                entry["passes"].append({"name": current.name, "seconds": round(seconds, 4), "changed": changed})
                if level >= 2:
                    log(f"  {current.name}: {seconds:.3f} s{'' if changed else ' (unchanged)'}")
                if level >= 3 and changed:
                    log(diff(before, module, current.name))
                if check == "pass":
                    check_well_formed(module)
                for hook in hooks:
                    hook(index, current, before, module)
            if check:
                stage.form(module)
        except CompileError as error:
            error.stage = error.stage or stage.name
            error.pass_name = error.pass_name or (current.name if current else None)
            raise
        entry["seconds"] = round(entry["seconds"], 4)
        if level >= 1:
            log(f"stage {stage.name}: {entry['seconds']:.3f} s")
    return Result(module, record)
