"""The forms that a program goes through, and the checks that say of a module whether it is in one, and if not, why.

    imported   main(tokens [1, n], positions [1, n], *weights) -> logits [1, n, vocab]
    textbook   main(tokens [n], positions [n], *weights) -> logits [n, vocab]

Inputs are int32; the attribute `num_input` says how many of them stand before the weights, and `llmc.weights` names
each weight. That a textbook program is token-local is proven by the pass that ends the stage, not here.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from llmc.ir.errors import FormError
from llmc.ir.text import shape_text

__all__ = ["check_imported", "check_textbook", "check_well_formed", "type_text", "weight_names", "weights_of"]

FLOATS = ("float32", "float16", "bfloat16")


def check_imported(module: tvm.IRModule) -> None:
    """Raises FormError unless the module is in the imported form."""
    _check_main(module, "imported", batch=True)


def check_textbook(module: tvm.IRModule) -> None:
    """Raises FormError unless the module is in the textbook form."""
    _check_main(module, "textbook", batch=False)


def check_well_formed(module: tvm.IRModule) -> None:
    """TVM's own rules: every variable defined once and before its use, types that agree."""
    try:
        relax.analysis.well_formed(module)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise FormError(f"expected a well-formed module, found: {reason}") from error


def weight_names(function: relax.Function) -> list[str]:
    """The names of a function's weights, in the order of their parameters."""
    return [str(name) for name in function.attrs["llmc.weights"]]


def weights_of(function: relax.Function) -> dict[str, relax.Var]:
    """A function's weights: name -> parameter."""
    inputs = int(function.attrs["num_input"])
    return dict(zip(weight_names(function), list(function.params)[inputs:], strict=True))


def type_text(ty) -> str:
    """A type as messages show it: "float32 [n, 64]"."""
    if not isinstance(ty, relax.TensorType):
        return str(ty)
    return f"{ty.dtype} {shape_text(ty.shape.values) if isinstance(ty.shape, relax.ShapeExpr) else 'of unknown shape'}"


def _check_main(module: tvm.IRModule, form: str, batch: bool) -> None:
    function = check_function(module, form, "main")
    check_inputs(function, form, "main", 2)
    tokens, positions = function.params[0].ty, function.params[1].ty
    n = length_of(tokens, 1 if batch else 0)
    leading = [1] if batch else []
    for name, ty in (("tokens", tokens), ("positions", positions)):
        expect_tensor(ty, "int32", [*leading, n], form, f"parameter {name} of main")
    expect_tensor(function.ret_ty, FLOATS, [*leading, n, "vocab"], form, "the result of main")


def check_function(module: tvm.IRModule, form: str, name: str) -> relax.Function:
    """The public Relax function `name` of a module that has no other private Relax functions than semantic ops."""
    public = {v.name_hint: f for v, f in module.functions.items() if f.attrs and "global_symbol" in f.attrs}
    if not isinstance(public.get(name), relax.Function):
        found = ", ".join(sorted(public)) or "no public function"
        raise FormError(f"{form} form: expected a function {name}, found {found}")
    for v, f in module.functions.items():
        if v.name_hint not in public and isinstance(f, relax.Function) and not (f.attrs and "llmc.op" in f.attrs):
            raise FormError(f"{form} form: expected private functions to be semantic ops, found {v.name_hint}")
    return public[name]


def check_inputs(function: relax.Function, form: str, name: str, inputs: int) -> None:
    """`num_input` is as expected and every parameter after the inputs has its name in `llmc.weights`."""
    found = int(function.attrs.get("num_input", -1))
    if found != inputs:
        raise FormError(f"{form} form: expected the attribute num_input of {name} to be {inputs}, found {found}")
    if "llmc.weights" not in function.attrs:
        others = ", ".join(sorted(dict(function.attrs)))
        raise FormError(f"{form} form: expected the attribute llmc.weights on {name}, found {others}")
    names, weights = weight_names(function), len(function.params) - inputs
    if len(names) != weights:
        raise FormError(f"{form} form: expected a name for each of {weights} weights of {name}, found {len(names)}")
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise FormError(f"{form} form: expected every weight of {name} once, found {', '.join(twice)} twice")


def length_of(ty, axis: int) -> tirx.Var | None:
    """The symbolic variable that is the dimension `axis` of a type; None if there is none."""
    shape = ty.shape.values if isinstance(getattr(ty, "shape", None), relax.ShapeExpr) else []
    return shape[axis] if len(shape) > axis and isinstance(shape[axis], tirx.Var) else None


def expect_tensor(ty, dtype: str | tuple[str, ...], shape: list, form: str, where: str) -> None:
    """Raises FormError unless `ty` is a tensor of (one of) these dtypes and of this shape.

    An entry of shape is a number, a symbolic variable, a name for any fixed size, or None, which nothing fits.
    """
    dtypes = (dtype,) if isinstance(dtype, str) else dtype
    if isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr) and str(ty.dtype) in dtypes:
        found = list(ty.shape.values)
        if len(found) == len(shape) and all(map(_fits, shape, found)):
            return
    wanted = shape_text(["n" if d is None else d for d in shape])
    raise FormError(f"{form} form: expected {' or '.join(dtypes)} {wanted} as {where}, found {type_text(ty)}")


def _fits(expected: int | str | tirx.PrimExpr | None, found: tirx.PrimExpr) -> bool:
    if isinstance(expected, (int, str)):
        return isinstance(found, tirx.IntImm) and (isinstance(expected, str) or int(found) == expected)
    return expected is not None and found.same_as(expected)
