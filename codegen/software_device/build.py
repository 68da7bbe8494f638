"""Compiles C++ and LLVM IR to shared libraries, kept by the hash of all that goes into them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from llmc.ir.errors import CompileError
from llmc.targets.cpu import detect
from llmc.targets.toolchains import LINKER, locate

__all__ = ["NATIVE", "cache_folder", "kernel_library", "machine_library"]

NATIVE = Path(__file__).parent / "native"

_COMMON = (
    *("-c", "-fPIC", "-std=c++20", "-fdeclspec", "-ffreestanding", "-fno-exceptions", "-fno-rtti", "-nostdinc"),
    *("-fno-stack-protector", "-fno-threadsafe-statics", "-ffp-contract=off"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
)
_MACHINE = ("-O2", "-march=native", "-fvisibility=default", "-Wno-unused-command-line-argument")
# No accesses wider than 16 bytes: clang announces none of those. Registers that nothing wrote hold NaN.
_KERNEL = (
    *("-O1", "-w", "-march=native", "-gline-tables-only", "-fno-strict-aliasing", "-fno-vectorize"),
    *("-fno-optimize-sibling-calls", "-fno-slp-vectorize", "-ftrivial-auto-var-init=pattern", "-fvisibility=hidden"),
)
_STRICT = (
    "-fsanitize=thread,alignment,array-bounds",
    *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-read-before-write=1"),
)


def machine_library() -> Path:
    """The device itself: lanes, memory, matrix units; loaded once by a process, for all its names."""
    sources = {f.name: f.read_text() for f in sorted(NATIVE.glob("*.cc"))}
    return _library("machine", sources, (*_COMMON, *_MACHINE), [NATIVE])


def kernel_library(name: str, sources: Mapping[str, str], *, strict: bool, include: Sequence[Path] = ()) -> Path:
    """A library of kernels. sources: file name (.cc, .ll) -> text. strict: every access of memory is announced.

    Raises CompileError: ziglang is missing, or the compiler refuses the text.
    """
    return _library(name, sources, (*_COMMON, *_KERNEL, *(_STRICT if strict else ())), [*include, NATIVE])


def cache_folder() -> Path:
    """$LLMC_CACHE, or ~/.cache/llmc."""
    return Path(os.environ.get("LLMC_CACHE") or Path.home() / ".cache" / "llmc") / "software_device"


def _library(name: str, sources: Mapping[str, str], flags: Sequence[str], include: Sequence[Path]) -> Path:
    key = hashlib.sha256(repr((sorted(sources.items()), flags, _surroundings())).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{name}-"))
    try:
        objects = []
        headers = [*(f"-isystem{folder}" for folder in include), f"-isystem{_zig().parent / 'lib' / 'include'}"]
        for file, text in sources.items():
            source, object_file = scratch / file, scratch / f"{file}.o"
            source.write_text(text)
            _run([str(_zig()), "clang", *flags, *headers, str(source), "-o", str(object_file)])
            objects.append(str(object_file))
        library = scratch / path.name
        _run([str(_zig()), "ld.lld", "-shared", "-z", "now", *objects, "-o", str(library)])
        library.rename(path)
    finally:
        shutil.rmtree(scratch)
    return path


@cache
def _surroundings() -> str:
    """What else a library depends on: headers, the compiler, this machine's CPU."""
    headers = [(str(f.relative_to(NATIVE)), f.read_text()) for f in sorted(NATIVE.rglob("*")) if f.is_file()]
    machine = detect()
    return repr((headers, version("ziglang"), machine.name, machine.features, platform.machine()))


@cache
def _zig() -> Path:
    path = locate("ziglang", "zig")
    if path is None:
        raise CompileError(
            f"the software device compiles with clang from ziglang, which is not installed: {LINKER.advice}",
            stage="software_device",
        )
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip()
        raise CompileError(
            f"the software device could not compile what was emitted (exit {done.returncode}):\n{words[:4000]}",
            stage="software_device",
        )
