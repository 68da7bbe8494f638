"""The program over weights that codes stand for: what a quantized program is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir.decode import decode
from llmc.ir.forms import weight_names, weights_of
from llmc.ir.rewrite import Rewriter, dtype_of, op_name
from llmc.passes.weight_uses import weight_uses

__all__ = ["fake_quantized"]


def fake_quantized(
    before: tvm.IRModule, after: tvm.IRModule, schemes: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """`before` with float32 parameters for the weights of which `after` has parts, and what these parts stand for.

    weights: the parts' arrays by name (NAME:codes, …).
    """
    there, uses = set(weight_names(after["main"])), weight_uses(before)
    fake = {}
    for name in weight_names(before["main"]):
        if f"{name}:codes" not in there:
            continue
        rows = uses[name].rows
        format = schemes[name].format(rows[-1])
        found = decode(format, *(weights[f"{name}:{part}"] for part in format.parts(rows)))
        if schemes[name].ordered:
            ordered, found = found, np.empty_like(found)
            found[..., weights[f"{name}:order"]] = ordered
        if schemes[name].scaled:
            found = found * weights[f"{schemes[name].scaled}:inverse_scale"]
        fake[name] = found.swapaxes(-1, -2) if uses[name].transposed else found
    return _Widened(before, set(fake)).run(), fake


class _Widened(Rewriter):
    """Weights in float32: what casts them casts from float32, all else reads them rounded to what they were."""

    def __init__(self, module: tvm.IRModule, names: set[str]):
        super().__init__(module)
        self.names = names
        self.wide: dict[relax.Var, relax.Var] = {}

    def params(self, old):
        for name, param in weights_of(self.old).items():
            if name in self.names:
                self.wide[param] = relax.Var(param.name, relax.TensorType(param.ty.shape, "float32"))
        return [self.wide.get(p, p) for p in old]

    def get(self, x):
        if isinstance(x, relax.Var) and x in self.wide and x not in self.new:
            wide = self.wide[x]
            self.new[x] = wide if dtype_of(x) == "float32" else self.emit(R.astype(wide, dtype_of(x)))
        return super().get(x)

    def rewrite(self, var, value):
        if op_name(value) == "astype" and value.args[0] in self.wide:
            return R.astype(self.wide[value.args[0]], dtype_of(var))
        return self.again(value)
