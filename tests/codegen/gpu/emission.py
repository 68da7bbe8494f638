"""What the emitters make of a kernel, without any toolchain; imported by tests, and by child processes."""

from llmc import targets
from llmc.targets import GpuTarget

LANGUAGES = {
    "cuda": "cuda:sm_90",
    "rocm": "rocm:gfx942",
    "metal": "metal",
    "rdna3": "rocm:gfx1100",
    "rdna4": "rocm:gfx1201",
}
EXECUTED = ["cuda", "rocm", "metal"]  # on the software device


def target(kind: str) -> GpuTarget:
    [found] = targets.parse(LANGUAGES[kind])
    return found


def source(function, kind: str) -> str:
    """Device code of a kernel: CUDA C++, AMDGPU LLVM IR or MSL."""
    import tvm
    import tvm_ffi

    from llmc.codegen.library import passes

    for name, found in (("bitcode_path", lambda *_: []), ("link", lambda code: code)):
        tvm_ffi.register_global_func(f"tvm_callback_rocm_{name}", found, override=True)
    name = str(function.attrs["global_symbol"])
    with passes(target(kind).kind):
        module = tvm.compile(tvm.IRModule({name: function}), tvm.target.Target(target(kind).tvm(), host="llvm"))
    return "\n".join(m.inspect_source("") for m in module.mod.imports)
