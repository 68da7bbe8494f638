"""Reference evaluation: run any module on this CPU, as it stands, with TVM's plain pipeline."""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm import relax, tirx

__all__ = ["Reference", "evaluate"]


SMALL = 1_000_000  # elements of all weights


class Reference:
    """A module built for plain evaluation; keep one to run it more than once.

        Reference(module)(tokens, positions, *weights)
        Reference(module)(hidden, ..., function="step")

    Semantic ops run by the body that is their meaning, PrimFuncs as their loops stand. Arguments are numpy arrays
    (bfloat16: ml_dtypes.bfloat16) or TVM tensors; a TVM tensor is passed as it is, so that a function which writes in
    place (pages) can be followed from call to call. The result is a numpy array, or a tuple of them.
    """

    def __init__(self, module: tvm.IRModule):
        # Small programs are built quickly, large ones run quickly.
        target = tvm.target.Target({"kind": "llvm", "opt-level": 0 if parameters(module) < SMALL else 2})
        self.machine = relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())

    def __call__(self, *args: np.ndarray | tvm.runtime.Tensor, function: str = "main"):
        given = [a if isinstance(a, tvm.runtime.Tensor) else tvm.runtime.tensor(np.asarray(a, order="C")) for a in args]
        return _to_numpy(self.machine[function](*given))


def evaluate(module: tvm.IRModule, args: list, function: str = "main"):
    """`function` of the module on `args`, one for each parameter in order. See Reference."""
    return Reference(module)(*args, function=function)


def parameters(module: tvm.IRModule) -> int:
    """How many elements of a fixed number the parameters of a module's public functions have."""
    given = (p.ty for f in module.functions.values() if _is_public(f) for p in f.params)
    fields = (t for ty in given for t in (ty.fields if isinstance(ty, relax.TupleType) else [ty]))
    shapes = (ty.shape for ty in fields if _is_tensor(ty))
    return sum(math.prod(map(int, shape)) for shape in shapes if all(isinstance(d, tirx.IntImm) for d in shape))


def _is_public(function) -> bool:
    return isinstance(function, relax.Function) and bool(function.attrs) and "global_symbol" in function.attrs


def _is_tensor(ty) -> bool:
    return isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr)


def _to_numpy(value):
    if isinstance(value, tvm.runtime.Tensor):
        return value.numpy()
    return tuple(_to_numpy(v) for v in value)
