"""Kernels that TVM's own rules made are given launches, so that nothing unscheduled is built for a GPU."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import dlight

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget

__all__ = ["schedule"]


def schedule(module: tvm.IRModule, target: GpuTarget) -> tvm.IRModule:
    """Every PrimFunc that is not scheduled yet gets DLight's fallback: its parallel loops become threads.

    Under the target's context. Raises CompileError, naming the op, where the fallback does not apply.
    """
    module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module)
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs:
            raise CompileError(
                f"{var.name_hint}: no kernel of llmc's serves this op on {target.name}, and TVM's fallback rule "
                "can't schedule it; compile for cpu",
                op=var.name_hint,
            )
    return module
