"""CUDA C++ to machine code with NVRTC, on a machine without a GPU, a driver or a C compiler.

TVM compiles device code where its CUDA runtime can be loaded, and keeps the bare source where it can't: the runtime
wants the driver's library, and a machine that only compiles has none. So the build runs in a process of its own, with a
library in the driver's place that has its names and nothing behind them. No other process ever sees that library.
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget, toolchains
from llmc.targets.gpu import this_host

from .device_code import DeviceCode
from .elf import Elf
from .host import EMULATIONS, zig

DRIVER = "libcuda.so.1"
BOUNDS = re.compile(r"__launch_bounds__\((\d+)[^)]*\)\s*(\w+)\(")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that builds for CUDA; the driver's stand-in is written into `folder`."""
    stand_in(folder / DRIVER)
    runtime = toolchains.locate("nvidia.cu13", "lib")
    if runtime is None or toolchains.missing("cuda"):
        raise missing()
    places = [str(folder), str(runtime), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, places))}


def missing() -> CompileError:
    gone = [part for toolchain in toolchains.missing("cuda") for part in toolchain.missing()]
    return CompileError(
        f"compiling for CUDA needs NVRTC and CUDA's headers; not found: {', '.join(gone)}: {toolchains.NVRTC.advice}",
        stage="library",
    )


def stand_in(path: Path) -> None:
    """A library with the names of the driver's functions that TVM's CUDA runtime wants; calling one would crash."""
    spec = find_spec("tvm")
    folder = Path(next(iter((spec and spec.submodule_search_locations) or ["."]))) / "lib"
    wanted = Elf((folder / "libtvm_runtime_cuda.so").read_bytes()).undefined()
    names = [name for name in wanted if name.startswith("cu") and not name.startswith("cuda")]
    empty = path.with_suffix(".a")
    empty.write_bytes(b"!<arch>\n")
    linker = ["ld.lld", "-m", EMULATIONS[this_host()], "-shared", "-soname", path.name]
    zig([*linker, *(f"--defsym={name}=0" for name in names), str(empty), "-o", str(path)])


class Compiler:
    """Stands in for TVM's own CUDA compiler while a module is built; keeps what went in and what came out."""

    def __init__(self, target: GpuTarget):
        self.target, self.sources, self.binaries = target, list[str](), list[bytes]()

    def install(self) -> None:
        """Raises CompileError where TVM's CUDA runtime was not loaded: the callback would never be called."""
        import tvm_ffi

        if tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is None:
            raise CompileError(
                "TVM's CUDA runtime could not be loaded, so that no machine code would come out; is libcudart.so.13 "
                f"there? {toolchains.NVRTC.advice}",
                stage="library",
            )
        tvm_ffi.register_global_func("tvm_callback_cuda_compile", self, override=True)

    def __call__(self, source: str, *_) -> bytes:
        binary = compile(str(source), self.target.arch)
        self.sources.append(str(source))
        self.binaries.append(binary)
        return binary

    def device_code(self, module) -> DeviceCode:
        """What was compiled since `install`."""
        del module
        found = DeviceCode({}, list(self.binaries), {})
        for index, (source, binary) in enumerate(zip(self.sources, self.binaries, strict=True)):
            found.sources[f"kernels{index or ''}.cu"] = source
            found.kernels |= kernels(binary)
            found.threads |= {name: int(count) for count, name in BOUNDS.findall(source)}
        return found


def kernels(binary: bytes) -> dict[str, bytes]:
    """Machine code of every kernel of a cubin; of PTX the whole text under each of its names."""
    if binary[:4] != b"\x7fELF":
        text = binary.rstrip(b"\0").decode()
        names = [line.split()[2].rstrip("(") for line in text.splitlines() if line.startswith(".visible .entry")]
        return dict.fromkeys(names, binary)
    elf = Elf(binary, "cubin")
    return {s.name.removeprefix(".text."): elf.bytes_of(s) for s in elf.sections if s.name.startswith(".text.")}


def compile(source: str, arch: str) -> bytes:
    """CUDA C++ to a cubin for "sm_90", or to PTX for "compute_90". Raises CompileError with NVRTC's log."""
    library, include = (toolchains.locate("nvidia.cu13", path) for path in ("lib/libnvrtc.so.13", "include"))
    if library is None or include is None:
        raise missing()
    # NVRTC opens this one by its bare name, wherever the system looks: one that is open already is found.
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def check(status: int, what: str, log: str = "") -> None:
        if status:
            reason = nvrtc.nvrtcGetErrorString(status).decode()
            raise CompileError(f"NVRTC for {arch}: {what}: {reason}{log}", stage="library")

    def read(kind: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), f"size of the {kind}")
        content = ctypes.create_string_buffer(size.value)
        check(getattr(nvrtc, f"nvrtcGet{kind}")(program, content), kind)
        return content.raw

    # Half of the time goes to NVVM's optimisations, which two threads share; a fixed number of them, for the machine
    # code depends on it.
    places = [f"-I{include}", f"-I{include / 'cccl'}"]
    options = [f"--gpu-architecture={arch}", *places, "--std=c++17", "--device-int128", "--split-compile=2"]
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "beginning")
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), words)
        log = read("ProgramLog").rstrip(b"\0").decode(errors="replace").strip() if status else ""
        check(status, "compiling", f": {log[:2000]}")
        return read("CUBIN" if arch.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
