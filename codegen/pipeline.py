"""The last stage, as data: from the ragged form to kernels; and `lower`, which runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import tvm
from tvm import relax

from llmc.ir.errors import CompileError
from llmc.ir.kernels_form import check_kernels

from .add_invariant_step import SUFFIX, AddInvariantStep
from .add_sample import AddSample
from .bundle_arguments import AddCopyPages, BundleArguments
from .fuse_rows import FuseRows
from .legalize import Legalize
from .lift_weights import RECIPES, LiftWeights
from .lower_embedding import LowerEmbedding
from .lower_experts import LowerExperts
from .lower_matmul import LowerMatmul
from .lower_pages import LowerPages
from .plain import reference

__all__ = ["KERNELS", "Lowered", "lower", "lowered"]


@dataclass(frozen=True)
class Stage:
    """Passes in order, and the form that they end in."""

    name: str
    passes: tuple
    form: Callable[[tvm.IRModule], None]


KERNELS = Stage(
    "kernels",
    (
        LowerEmbedding(),
        LowerMatmul(),
        LowerExperts(),
        LowerPages(),
        LiftWeights(),
        FuseRows(),
        AddCopyPages(),
        AddSample(),
        BundleArguments(),
        Legalize(),
        AddInvariantStep(),
    ),
    check_kernels,
)


@dataclass(frozen=True)
class Lowered:
    """A module in the kernels form, and how its weights are made.

    module: embed, step, copy_pages_{g}, perhaps sample and step_invariant, and the kernels they call. weights: function
    -> names of its weights, in the order of its last argument. recipes: name -> Relax function over checkpoint weights,
    whose attribute "llmc.sources" names them. kernels: facts of every kernel, for the manifest. reference: what the
    module computes, in plain loops (`plain.reference`), for a GPU target.
    """

    module: tvm.IRModule
    weights: dict[str, list[str]]
    recipes: dict[str, relax.Function]
    kernels: list[dict] = field(default_factory=list)
    reference: tvm.IRModule | None = None


def lower(module: tvm.IRModule, goal, *, on_pass: Callable | None = None) -> Lowered:
    """The ragged form to the kernels form. on_pass(index, pass, before, after) is called after every pass."""
    plain = reference(module, goal)
    for index, step in enumerate(KERNELS.passes, 1):
        before = module
        try:
            module = step.run(before, goal)
        except CompileError as error:
            error.stage, error.pass_name = error.stage or KERNELS.name, error.pass_name or step.name
            raise
        if on_pass is not None:
            on_pass(index, step, before, module)
    KERNELS.form(module)
    return lowered(module, plain)


def lowered(module: tvm.IRModule, reference: tvm.IRModule | None = None) -> Lowered:
    """A module that has been through KERNELS, taken apart into what is built and what is written."""
    recipes = {str(k): v for k, v in module.attrs[RECIPES].items()}
    there = {v.name_hint for v in module.functions}
    with_weights = [f + s for s in ("", SUFFIX) for f in ("embed", "step") if f + s in there]
    weights = {f: [str(n) for n in module[f].attrs["llmc.weights"]] for f in with_weights}
    if "sample" in there:
        weights["sample"] = []
    return Lowered(module.without_attr(RECIPES), weights, recipes, kernel_facts(module), reference)


def kernel_facts(module: tvm.IRModule) -> list[dict]:
    """Name of every kernel and how many calls of it stand in the module's functions; those of a step count once."""
    calls: dict[str, int] = {}

    def count(e):
        if isinstance(e, relax.Call) and isinstance(e.op, tvm.ir.Op) and e.op.name.startswith("relax.call_tir"):
            calls[e.args[0].name_hint] = calls.get(e.args[0].name_hint, 0) + 1

    for var, function in module.functions.items():
        if isinstance(function, relax.Function) and not var.name_hint.endswith(SUFFIX):
            relax.analysis.post_order_visit(function.body, count)
    return [{"name": name, "calls": n} for name, n in sorted(calls.items())]
