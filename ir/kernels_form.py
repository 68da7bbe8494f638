"""The last form: only kernels and the calls between them."""

from __future__ import annotations

import json

import tvm
from tvm import relax, tirx

from llmc.ir.errors import FormError
from llmc.ir.rewrite import bindings, op_name

__all__ = ["check_kernels"]

# What may stand in a function beside calls of kernels: views and the allocation of a constant.
FREE = {"reshape", "memory.view", "memory.ensure_zero_offset"}


def check_kernels(module: tvm.IRModule) -> None:
    """The kernels form: embed(tokens, weights), step(hidden, positions, qo_indptr, logit_rows, tables..., pages,
    weights), copy_pages_{g}(source, target, pages) for every group, and perhaps sample(logits, then how to draw from
    each row). Pages and weights are tuples; only PrimFuncs are called.

    Raises FormError: expected, found, where.
    """
    for name in ("embed", "step"):
        if name not in {v.name_hint for v in module.functions}:
            raise FormError(f"kernels form: expected a function {name!r}, found {_public(module)}")
    state = (module["step"].attrs or {}).get("llmc.state")
    if state is None:
        raise FormError("kernels form: expected the attribute 'llmc.state' on step, found none")
    groups = len(json.loads(str(state)))
    # name -> (tensors, tuples); the tensors of step are hidden, positions, qo_indptr, logit_rows, three tables a group.
    signatures = {"embed": (1, 1), "step": (4 + 3 * groups, 2)} | {f"copy_pages_{g}": (2, 1) for g in range(groups)}
    if any(v.name_hint == "sample" for v in module.functions):
        signatures["sample"] = (6, 0)
    for name in ("embed", "step"):  # with sums in one order, whatever else is in the step
        if any(v.name_hint == f"{name}_invariant" for v in module.functions):
            signatures[f"{name}_invariant"] = signatures[name]
    for name, (tensors, tuples) in signatures.items():
        if name not in {v.name_hint for v in module.functions}:
            raise FormError(f"kernels form: expected a function {name!r}, found {_public(module)}")
        params = list(module[name].params)
        found = [isinstance(p.ty, relax.TupleType) for p in params]
        if found != [False] * tensors + [True] * tuples:
            raise FormError(
                f"kernels form: expected {name} to take {tensors} tensors and {tuples} tuples, "
                f"found {', '.join(p.name for p in params)}"
            )
    for var, function in module.functions.items():
        if isinstance(function, relax.Function):
            for b in bindings(function):
                _check_binding(module, var.name_hint, b)


def _check_binding(module, function, binding) -> None:
    value = binding.value
    if not isinstance(value, relax.Call):
        return
    name = op_name(value)
    if name is not None and name.startswith("call_tir"):
        kernel = value.args[0]
        if not isinstance(module.functions.get(kernel), tirx.PrimFunc):
            raise FormError(
                f"kernels form: expected {binding.var.name} in {function} to call a PrimFunc, found {kernel}"
            )
    elif name not in FREE:
        what = name or str(value.op)
        raise FormError(
            f"kernels form: expected only calls of kernels, found {what} in {function}, at {binding.var.name}", op=what
        )


def _public(module) -> str:
    return ", ".join(sorted(v.name_hint for v, f in module.functions.items() if isinstance(f, relax.Function)))
