"""From the kernels form to a shared library."""

from __future__ import annotations

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


def library_name(target) -> str:
    """The file name of a target's library, e.g. "cpu-znver4-linux-x86_64.so"."""
    suffix = ".dylib" if target.host.startswith("macos") else ".so"
    return f"{target.name.replace(':', '-')}-{target.host}{suffix}"


def build(lowered, target, path: Path | str) -> Path:
    """Compile the module to machine code for `target` and link it as the shared library `path`.

    The library is loaded with tvm_ffi.load_module and holds a Relax executable: vm_load_executable, then
    vm_initialization(1, 0, 2, 1, 0, 2), then its functions embed, step, copy_pages_{g}.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Compaction looks for smaller buffers; kernels have none to give, and it is nine tenths of their compile time.
    quick = tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"])
    with tvm.target.Target(target.llvm()) as machine, quick:
        module = _plan(lowered.module)
        executable = relax.build(module, machine, relax_pipeline=None, exec_mode="bytecode")

    def link(output, objects, options=None, **_):
        _link(output, objects, target.host)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".objects-") as scratch:
        executable.export_library(str(path), fcompile=link, workspace_dir=scratch)
    return path


def _plan(module: tvm.IRModule) -> tvm.IRModule:
    """Calls with results in allocated memory, planned so that buffers are shared."""
    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
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
