"""AMD's code objects: LLVM inside TVM makes machine code, ziglang's lld links it. No ROCm is needed.

TVM's barrier is a bare `s_barrier`, and since gfx90a the hardware does not wait by itself for what a wave wrote to
shared memory: the next wave could read old values. So every barrier gets a release in front and an acquire behind it,
from which LLVM makes the waits (LLVM, "User Guide for AMDGPU Backend", section "Memory Model"), and what came out is
checked.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm_ffi import structural_map, structural_walk

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget

from .barriers import check_barriers
from .device_code import DeviceCode, device_modules
from .elf import Elf
from .host import zig

# Names of the memory that a block shares, and of the barriers over it.
BLOCK = ("shared", "shared.dyn")
# Linked into the kernels' module as LLVM's text: these inline to a fence each.
FENCES = """
define linkonce_odr void @llmc_release() alwaysinline {
  fence syncscope("workgroup") release
  ret void
}
define linkonce_odr void @llmc_acquire() alwaysinline {
  fence syncscope("workgroup") acquire
  ret void
}
define linkonce_odr void @llmc_wave_release() alwaysinline {
  fence syncscope("wavefront") release
  ret void
}
define linkonce_odr void @llmc_wave_acquire() alwaysinline {
  fence syncscope("wavefront") acquire
  ret void
}
"""
# Shared memory taken for global memory: TVM writes so where two of its buffers were given the same place, and where it
# is seen through a view in another dtype.
_TAKEN_FOR_GLOBAL = re.compile(r"addrspacecast \(?ptr addrspace\(3\) \S+ to ptr addrspace\(1\)")


class Compiler:
    """Stands in for TVM's own way to ROCm while a module is built."""

    def __init__(self, target: GpuTarget):
        self.target, self.binaries, self.threads = target, list[bytes](), dict[str, int]()
        self.folder = tempfile.TemporaryDirectory(prefix="llmc-rocm-")

    def install(self) -> None:
        import tvm_ffi

        fences = Path(self.folder.name) / "fences.ll"
        fences.write_text(FENCES)
        build = tvm_ffi.get_global_func("target.build.rocm")

        def build_fenced(module, target):
            check_shared_memory(module, self.target)
            self.threads |= block_sizes(module)
            check_block_sizes(self.threads, self.target)
            return build(fence_barriers(module), target)

        callbacks = {
            "tvm_callback_rocm_bitcode_path": lambda *_: tvm.runtime.convert([str(fences)]),
            "tvm_callback_rocm_link": self.link,
            "target.build.rocm": build_fenced,
        }
        for name, function in callbacks.items():
            tvm_ffi.register_global_func(name, function, override=True)

    def link(self, compiled) -> bytearray:
        """An object of LLVM's to a code object."""
        folder = Path(self.folder.name)
        (folder / "kernels.o").write_bytes(bytes(compiled))
        zig(["ld.lld", "--no-undefined", "-shared", str(folder / "kernels.o"), "-o", str(folder / "kernels.hsaco")])
        self.binaries.append((folder / "kernels.hsaco").read_bytes())
        return bytearray(self.binaries[-1])

    def device_code(self, module: tvm.runtime.Module) -> DeviceCode:
        found = DeviceCode({}, list(self.binaries), {}, self.threads)
        for index, device in enumerate(device_modules(module, "hip") + device_modules(module, "rocm")):
            assembly = device.inspect_source("asm")
            check_barriers(assembly)
            text = device.inspect_source("llvm")
            check_address_spaces(text)
            found.sources[f"kernels{index or ''}.ll"] = text
            found.sources[f"kernels{index or ''}.s"] = assembly
        for binary in self.binaries:
            found.kernels |= kernels(binary)
        return found


def kernels(binary: bytes) -> dict[str, bytes]:
    """Machine code of every kernel of a code object; each has a descriptor NAME.kd beside it."""
    elf = Elf(binary, "code object")
    symbols = {s.name: s for s in elf.symbols()}
    return {name: elf.code(symbol) for name, symbol in symbols.items() if f"{name}.kd" in symbols}


def fence_barriers(module: tvm.IRModule) -> tvm.IRModule:
    """Every barrier of a block gets a release before and an acquire behind it; TVM's automatic ones, too."""

    def fence(name: str):
        return tirx.Evaluate(tirx.call_extern("void", name))

    def fenced(statement):
        call = statement.value
        if isinstance(call, tvm.ir.Call) and call.op.name == "tirx.tvm_storage_sync" and call.args[0].value in BLOCK:
            return tirx.SeqStmt([fence("llmc_release"), statement, fence("llmc_acquire")])
        return statement

    functions = {
        name: function.with_body(structural_map(function.body, (tirx.Evaluate, fenced)))
        for name, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def check_address_spaces(text: str) -> None:
    """Raises CompileError, naming the kernel, where LLVM's text reads shared memory as if it were global memory."""
    kernel = ""
    for line in text.splitlines():
        if line.startswith("define "):
            kernel = line.partition("@")[2].partition("(")[0]
        if found := _TAKEN_FOR_GLOBAL.search(line):
            raise CompileError(
                f"{kernel}: shared memory is taken for global memory: {found[0]}; this is a fault of the compiler",
                stage="library",
            )


def block_sizes(module: tvm.IRModule) -> dict[str, int]:
    """kernel -> threads of a block, of the kernels in which that is fixed."""
    found = {}
    for name, function in module.functions.items():
        extents: dict[str, Any] = {}

        def note(statement, extents=extents):
            if statement.attr_key == "thread_extent" and statement.node.thread_tag.startswith("threadIdx"):
                extents[statement.node.thread_tag] = statement.value

        structural_walk(function.body, (tirx.AttrStmt, note))
        if all(isinstance(extent, tirx.IntImm) for extent in extents.values()):
            found[name.name_hint] = math.prod(int(extent) for extent in extents.values())
    return found


def check_block_sizes(threads: dict[str, int], target: GpuTarget) -> None:
    """Raises CompileError for a block of more threads than the code says it may have: it would not be launched."""
    for name, count in threads.items():
        if count > target.max_threads:
            raise CompileError(
                f"kernel {name} has blocks of {count} threads; {target.name} has {target.max_threads} at most",
                stage="library",
            )


def check_shared_memory(module: tvm.IRModule, target: GpuTarget) -> None:
    """Raises CompileError for a kernel that asks for more than there is: LLVM would end the process over it."""
    for name, function in module.functions.items():
        sizes: list[int] = []

        def count(statement, sizes=sizes):
            buffer = statement.buffer
            if buffer.scope() in BLOCK:
                kind = tvm.DataType(buffer.dtype)
                sizes.append(math.prod(int(extent) for extent in buffer.shape) * kind.bits * kind.lanes // 8)

        structural_walk(function.body, (tirx.AllocBuffer, count))
        if sum(sizes) > target.shared_bytes:
            raise CompileError(
                f"kernel {name.name_hint} takes {sum(sizes)} bytes of shared memory; {target.name} has "
                f"{target.shared_bytes} for a block: its tile must be smaller",
                stage="library",
            )
