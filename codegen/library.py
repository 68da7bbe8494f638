"""From the kernels form to a shared library."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import tvm
from tvm import relax

from llmc.ir.errors import CompileError

__all__ = ["build", "library_name"]

# Linker emulation of every system that libraries are built for.
EMULATIONS = {"linux-x86_64": "elf_x86_64", "linux-aarch64": "aarch64linux"}


# The most tokens of one call, new ones of all sequences together. What a call may take follows from it.
MAX_STEP_TOKENS = 1024


def library_name(target) -> str:
    """The file name of a target's library, e.g. "cpu-znver4-linux-x86_64.so"."""
    suffix = ".dylib" if target.host.startswith("macos") else ".so"
    return f"{target.name.replace(':', '-')}-{target.host}{suffix}"


def build(lowered, target, path: Path | str) -> dict[str, int]:
    """Compile the module to machine code for `target` and link it as the shared library `path`.

    -> facts of its memory: max_step_tokens, the most tokens of a call, and intermediate_bytes, what a call of that
    many sets aside (pages that fewer tokens don't reach are never touched).

    The library is loaded with tvm_ffi.load_module and holds a Relax executable: vm_load_executable, then
    vm_initialization(1, 0, 2, 1, 0, 2), then its functions embed, step, copy_pages_{g}.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Compaction looks for smaller buffers; kernels have none to give, and it is nine tenths of their compile time.
    quick = tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"])
    with tvm.target.Target(target.llvm()) as machine, quick:
        module, memory = _plan(lowered.module)
        executable = relax.build(module, machine, relax_pipeline=None, exec_mode="bytecode")

    def link(output, objects, options=None, **_):
        _link(output, objects, target.host)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".objects-") as scratch:
        executable.export_library(str(path), fcompile=link, workspace_dir=scratch)
    return memory


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


def _link(output: str, objects: list[str], host: str) -> None:
    """Link with the lld that ziglang brings: no compiler or C library of the system's is needed.

    Kernels call a few functions of the C library; it is named through an empty library that bears its name. TVM's
    runtime functions stay undefined until the library is loaded beside it.
    """
    if host not in EMULATIONS:
        raise CompileError(f"no linker is set up for {host}: expected one of {', '.join(EMULATIONS)}", stage="library")
    lld = [sys.executable, "-m", "ziglang", "ld.lld", "-m", EMULATIONS[host], "-shared"]
    folder = Path(objects[0]).parent
    empty = folder / "empty.a"
    empty.write_bytes(b"!<arch>\n")
    names = ("libm.so.6", "libc.so.6")
    for name in names:
        _run([*lld, "-soname", name, str(empty), "-o", str(folder / name)])
    needed = ["--no-as-needed", *(str(folder / n) for n in names)]
    _run([*lld, "--hash-style=gnu", "-z", "now", "-z", "relro", "-o", output, *objects, *needed])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(
            f"the linker failed (exit {done.returncode}): {done.stderr.strip()[-2000:]}; "
            f"is the package ziglang installed? (pip install 'llmc[compile]')",
            stage="library",
        )
