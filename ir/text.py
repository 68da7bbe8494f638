"""A module as text that people read and tests compare, and the difference of two modules."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable

import tvm
from tvm import relax

__all__ = ["diff", "shape_text", "text"]


def text(module: tvm.IRModule) -> str:
    """The module as TVMScript, stable from run to run.

    Constants with more than one element stand as a name that tells dtype, shape and a hash of the content
    (`const_float32_64_1f0c2d3e`), so that two texts differ if their constants differ.
    """
    shown = tvm.IRModule({v: _without_constants(f) for v, f in module.functions.items()})
    script = shown.script(show_meta=False)
    lines = [line.rstrip() for line in script.splitlines() if not line.startswith("# ")]
    return "\n".join(lines).strip() + "\n"


def shape_text(dimensions: Iterable) -> str:
    """A shape as messages show it: "[1, n * 2, 64]"."""
    return "[" + ", ".join(re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(d)) for d in dimensions) + "]"


def diff(before: tvm.IRModule | str, after: tvm.IRModule | str, name: str = "module") -> str:
    """Unified diff of two modules (or texts); empty if they read the same."""
    old, new = (x if isinstance(x, str) else text(x) for x in (before, after))
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"{name} before", f"{name} after")
    return "".join(lines)


def _without_constants(function):
    if not isinstance(function, relax.Function):
        return function
    return _NameConstants().visit_expr(function)


@relax.expr_functor.mutator
class _NameConstants(relax.PyExprMutator):
    """Puts a free variable, named after what it holds, where a large constant stands."""

    def __init__(self):
        super().__init__()
        self.named: dict[str, relax.Var] = {}

    def visit_generic_const_(self, constant):
        if len(constant.ty.shape) == 0:
            return constant
        data = constant.value.numpy()
        digest = hashlib.sha256(data.tobytes()).hexdigest()[:8]
        name = "_".join(["const", str(data.dtype), *map(str, data.shape), digest])
        return self.named.setdefault(name, relax.Var(name, constant.ty))
