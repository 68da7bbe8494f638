"""From the kernels form to a shared library."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from llmc.targets import GpuTarget, Target

from .binaries.host import link

__all__ = ["build", "export", "library_name", "machine_code", "sources_name"]

# The most tokens of one call, new ones of all sequences together. What a call may take follows from it.
MAX_STEP_TOKENS = 1024


def library_name(target: Target) -> str:
    """The file name of a target's library, e.g. "cpu-znver4-linux-x86_64.so"."""
    suffix = ".dylib" if target.host.startswith("macos") else ".so"
    return f"{target.name.replace(':', '-')}-{target.host}{suffix}"


def sources_name(target: Target) -> str:
    """The file name of the zip with a target's kernel sources, e.g. "cuda-sm_90.zip"."""
    return f"{target.name.replace(':', '-')}.zip"


def build(lowered, target: Target, path: Path | str, sources: Path | str | None = None) -> dict[str, Any]:
    """Compile the module to machine code for `target` and link it as the shared library `path`.

    sources: for a GPU, the zip to write of what the library was made from; default: beside the library.
    -> facts of its memory: max_step_tokens, the most tokens of a call, and intermediate_bytes, what a call of that
    many sets aside (pages that fewer tokens don't reach are never touched); for a GPU also "kernels", the SHA-256 of
    every kernel's machine code (of its text, where the driver compiles it).

    The library is loaded with tvm_ffi.load_module and holds a Relax executable: vm_load_executable, then
    vm_initialization(1, 0, 2, 1, 0, 2), then its functions embed, step, copy_pages_{g}.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(target, GpuTarget):
        from .binaries import process

        return process.build(lowered, target, path, Path(sources or path.with_suffix(".zip")))
    executable, memory = machine_code(lowered.module, tvm.target.Target(target.llvm()))
    export(executable, target.host, path)
    return memory


def machine_code(module: tvm.IRModule, machine: tvm.target.Target) -> tuple[Any, dict[str, int]]:
    """A module in the kernels form, planned and compiled within this process; -> it, and the facts of its memory."""
    with machine, passes(machine.kind.name):
        planned, memory = _plan(module)
        return relax.build(planned, machine, relax_pipeline=None, exec_mode="bytecode"), memory


# Passes of TVM that find nothing to do in kernels which say how they are scheduled, and take time to find that out.
IDLE = (
    "s_tir.HoistIfThenElse",
    "s_tir.InferFragment",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.InjectVirtualThread",
)


def passes(kind: str) -> tvm.transform.PassContext:
    """What TVM's passes leave out when kernels are compiled for a kind of target of TVM.

    Compaction looks for smaller buffers; kernels have none to give, and it is nine tenths of their compile time. Of
    what is left, a quarter goes to IDLE passes.
    Storage rewriting gives two shared buffers of a GPU kernel the same memory where it thinks that one is no longer
    used, without a barrier between their uses; AMD's code generator then takes that memory for global memory.
    """
    config = {} if kind == "llvm" else {"tirx.disable_storage_rewrite": True}
    return tvm.transform.PassContext(config=config, disabled_pass=["s_tir.CompactBufferAllocation", *IDLE])


def export(executable, host: str, path: Path) -> None:
    """Link a compiled module as a shared library for `host`."""

    def fcompile(output, objects, options=None, **_):
        link(output, objects, host)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".objects-") as scratch:
        executable.export_library(str(path), fcompile=fcompile, workspace_dir=scratch)


def _plan(module: tvm.IRModule) -> tuple[tvm.IRModule, dict[str, int]]:
    """Calls with results in allocated memory, planned so that buffers are shared, and the facts that `build` returns.

    Every buffer is as large as the longest step needs, whatever a call brings: so the runtime's pool of buffers holds
    few of them, and each is found again.
    """
    bounds: dict[str, int] = {}
    module = tvm.IRModule(module.functions, attrs=module.attrs)
    for var, function in module.functions.items():
        if isinstance(function, relax.Function):
            bound = {v.name: MAX_STEP_TOKENS for v in relax.analysis.free_symbolic_vars(function.body)}
            bounds |= bound
            module[var] = function.with_attr("tir_var_upper_bound", bound) if bound else function
    module = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
        ]
    )(module)
    total = 0
    for var, function in module.functions.items():
        if isinstance(function, relax.Function):
            bounded = _BoundStorage(bounds)
            module[var] = bounded.visit_expr(function)
            total = max(total, bounded.bytes)
    facts = {"max_step_tokens": MAX_STEP_TOKENS, "intermediate_bytes": total}
    return _finish(module), facts


@relax.expr_functor.mutator
class _BoundStorage(relax.PyExprMutator):
    """Storage of results, too, is set aside for the longest step; counts what a function sets aside."""

    def __init__(self, bounds: dict[str, int]):
        super().__init__()
        self.bounds, self.bytes = bounds, 0

    def visit_call_(self, call):
        if not (isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.memory.alloc_storage"):
            return super().visit_call_(call)
        size, *rest = call.args
        analyzer = tvm.sym.Analyzer()
        for dimension in size.values:
            for v in tvm.tirx.analysis.undefined_vars(dimension):
                analyzer.bind(v, tvm.tirx.IntImm("int64", self.bounds[v.name]))
        fixed = [analyzer.simplify(d) for d in size.values]
        self.bytes += math.prod(int(d) for d in fixed)
        return relax.Call(call.op, [relax.ShapeExpr(fixed), *rest], call.attrs, call.ty_args)


def _finish(module: tvm.IRModule) -> tvm.IRModule:
    """From allocated memory to what the virtual machine runs."""
    return tvm.transform.Sequential(
        [
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )(module)
