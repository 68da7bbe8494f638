"""Metal's kernels travel as source, which the Mac's driver compiles when it loads them. So what can be checked here is
checked here: the source must be valid in the version and with the options that TVM's runtime asks for.

TVM's Metal runtime asks for language version 2.3 with fast math, and binds every buffer at its beginning.
Sources of the rules: "Metal Shading Language Specification" (scalar and vector types, fast math), "Metal Feature Set
Tables".
"""

from __future__ import annotations

import re

import tvm

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget

from .device_code import DeviceCode, device_modules

# What stands in a source -> why it may not.
FORBIDDEN = {
    r"\bbfloat\d*\b": "bfloat came with version 3.1; load such numbers as ushort",
    r"\b(INFINITY|HUGE_VALF?|NAN|MAXFLOAT \* )\b|\b(inf|nan)f?\b": "fast math has no infinities and no NaN",
    r"\b(double|float64_t)\d*\b": "there is no double",
    r"\b(char|uchar|short|ushort|int|uint|long|ulong|half|float)(8|16)\b": "a vector has at most 4 lanes",
}
_SIZES = {"char": 1, "uchar": 1, "bool": 1, "short": 2, "ushort": 2, "half": 2, "int": 4, "uint": 4, "float": 4,
          "long": 8, "ulong": 8}  # fmt: skip
_SHARED = re.compile(r"^\s*threadgroup\s+(?:packed_)?([a-z]+)([234]?)\s+\w+\s*\[\s*(\d+)\s*\]\s*;", re.MULTILINE)
_KERNEL = re.compile(r"^kernel void (\w+)\(", re.MULTILINE)
_BUFFER = re.compile(r"\[\[\s*buffer\((\d+)\)\s*\]\]")


class Compiler:
    """Checks what TVM emits for Metal; nothing else compiles it here."""

    def __init__(self, target: GpuTarget):
        self.target = target

    def install(self) -> None:
        """Nothing to replace: without Apple's tools TVM keeps the source."""

    def device_code(self, module: tvm.runtime.Module) -> DeviceCode:
        found = DeviceCode({}, [], {})
        for index, device in enumerate(device_modules(module, "metal")):
            text = device.inspect_source("metal")
            found.sources[f"kernels{index or ''}.metal"] = text
            for name, source in kernels(text).items():
                check(name, source, self.target)
                found.kernels[name] = source.encode()
        found.binaries.extend(found.kernels.values())
        return found


def kernels(text: str) -> dict[str, str]:
    """TVM's source of all kernels, one after the other -> kernel: its source."""
    parts = re.split(r"^// Function: (\S+)\n", text, flags=re.MULTILINE)
    # Behind every source stands one more line's end.
    return {name: source.removesuffix("\n") for name, source in zip(parts[1::2], parts[2::2], strict=True)}


def check(name: str, source: str, target: GpuTarget) -> None:
    """Raises CompileError naming the kernel and the rule where the Mac's compiler or runtime would refuse it."""

    def wrong(why: str) -> CompileError:
        return CompileError(f"Metal kernel {name}: {why}; this is a fault of the compiler", stage="library")

    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    for pattern, why in FORBIDDEN.items():
        found = re.search(pattern, code)
        if found:
            line = code.count("\n", 0, found.start()) + 1
            raise wrong(f"{found[0]!r} in line {line}: {why}")
    shared = shared_bytes(code)
    if shared > target.shared_bytes:
        raise wrong(f"{shared} bytes of threadgroup memory, where there are {target.shared_bytes}")
    names = _KERNEL.findall(code)
    if names != [name]:
        raise wrong(f"expected one kernel of that name, found {names}")
    places = [int(n) for n in _BUFFER.findall(code)]
    if places != list(range(len(places))):
        raise wrong(f"expected every tensor in a buffer of its own, in order, found {places}")
    if len(places) > target.most_tensors:
        raise wrong(f"{len(places)} buffers, where there are {target.most_tensors}")


def shared_bytes(code: str) -> int:
    """Threadgroup memory that a kernel declares."""
    return sum(_SIZES[kind] * int(lanes or 1) * int(count) for kind, lanes, count in _SHARED.findall(code))
