"""A function of its own that draws tokens from logits, where the machine has a kernel for it."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax, tirx

from .backend import backend

__all__ = ["AddSample"]

# Parameters of a row, in order: how its token is drawn.
DRAWS = {"temperature": "float32", "top_k": "int32", "top_p": "float32", "min_p": "float32", "uniforms": "float32"}


@dataclass(frozen=True)
class AddSample:
    """Adds sample(logits [m, vocab] f32, temperature, top_k, top_p, min_p, uniforms [m]) -> tokens [m] i32.

    Keeps every other function. Leaves alone: machines whose logits are in the runtime's own memory.
    """

    name: str = "add_sample"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        vocab = int(module["step"].ret_ty.shape.values[-1])
        kernel = backend(goal.target).sample(vocab)
        if kernel is None:
            return module
        builder, rows = relax.BlockBuilder(module), tirx.Var("m", "int64")
        logits = relax.Var("logits", relax.TensorType([rows, vocab], "float32"))
        draws = [relax.Var(name, relax.TensorType([rows], dtype)) for name, dtype in DRAWS.items()]
        kernel = builder.add_func(kernel.without_attr("global_symbol"), "sample_tokens")
        with builder.function("sample", [logits, *draws]):
            with builder.dataflow():
                out = builder.emit_output(
                    relax.op.call_tir(kernel, [logits, *draws], relax.TensorType([rows], "int32"))
                )
            builder.emit_func_output(out)
        return builder.get()
