"""Links host code as a shared library, for this machine or another: with the clang and lld that ziglang brings."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from llmc.ir.errors import CompileError

from .elf import Elf
from .macho import MachO

# Linker emulation of every Linux that libraries are built for.
EMULATIONS = {"linux-x86_64": "elf_x86_64", "linux-aarch64": "aarch64linux"}
# zig's name of the oldest macOS that runs on arm64, and what a library says that it needs.
MACOS, MACOS_MINIMUM = "aarch64-macos.11.0", (11, 0)
# Libraries of the system that host code may open.
SYSTEM = {"libm.so.6", "libc.so.6", "/usr/lib/libSystem.B.dylib"}
# What host code may take from the system's C library, beside TVM's own functions.
_MATHS = ("exp", "exp2", "log", "log2", "pow", "sqrt", "sin", "cos", "tanh", "erf", "fmod", "floor", "ceil", "round",
          "rint", "nearbyint", "trunc", "fabs", "fmin", "fmax", "fma", "ldexp")  # fmt: skip
C_FUNCTIONS = {"memcpy", "memmove", "memset", "bzero", "abort", *_MATHS, *(f"{name}f" for name in _MATHS)}


def link(output: Path | str, objects: list[str], host: str) -> None:
    """Link objects as the shared library `output` for `host`, and look at what came out.

    TVM's runtime functions stay undefined until the library is loaded beside it. Raises CompileError: no such host, the
    linker's own error, or a library that the host would not load.
    """
    if host in EMULATIONS:
        _link_elf(output, objects, host)
    elif host == "macos-arm64":
        _link_macho(output, objects)
    else:
        known = ", ".join([*EMULATIONS, "macos-arm64"])
        raise CompileError(f"no linker is set up for {host}: expected one of {known}", stage="library")
    check(Path(output), host)


def check(library: Path, host: str) -> None:
    """Raises CompileError unless `library` is one that `host` loads beside TVM's runtime libraries."""
    data = library.read_bytes()
    if host == "macos-arm64":
        macho = MachO(data, library.name)
        macho.check_signature()
        if macho.minimum > MACOS_MINIMUM:
            raise CompileError(
                f"{library.name}: expected macOS {MACOS_MINIMUM} at least, found {macho.minimum}", stage="library"
            )
        # The linker found all others in the list of macOS 11's own functions.
        needed, undefined = macho.needed, [name for name, place in macho.bound.items() if place == MachO.FLAT]
    else:
        elf = Elf(data, library.name)
        if f"linux-{elf.machine}" != host:
            raise CompileError(f"{library.name}: expected code for {host}, found linux-{elf.machine}", stage="library")
        needed, undefined = elf.needed(), elf.undefined()
    strangers = [name for name in needed if name not in SYSTEM]
    if strangers:
        raise CompileError(f"{library.name}: needs {', '.join(strangers)}, which {host} may not have", stage="library")
    unknown = [name for name in undefined if not name.startswith(("TVMFFI", "TVMBackend")) and name not in C_FUNCTIONS]
    if unknown:
        raise CompileError(
            f"{library.name}: calls {', '.join(unknown[:8])}: neither TVM's runtime nor {host}'s C library has that",
            stage="library",
        )


def _link_elf(output: Path | str, objects: list[str], host: str) -> None:
    """Kernels call a few functions of the C library; it is named through an empty library that bears its name."""
    lld = ["ld.lld", "-m", EMULATIONS[host], "-shared"]
    folder = Path(objects[0]).parent
    empty = folder / "empty.a"
    empty.write_bytes(b"!<arch>\n")
    names = ("libm.so.6", "libc.so.6")
    for name in names:
        zig([*lld, "-soname", name, str(empty), "-o", str(folder / name)])
    needed = ["--no-as-needed", *(str(folder / n) for n in names)]
    zig([*lld, "--hash-style=gnu", "-z", "now", "-z", "relro", "-o", str(output), *objects, *needed])


def _link_macho(output: Path | str, objects: list[str]) -> None:
    """zig's linker signs what it writes; nothing may be written into the library after that."""
    name = f"-Wl,-install_name,@rpath/{Path(output).name}"
    zig(["cc", "-target", MACOS, "-shared", "-Wl,-undefined,dynamic_lookup", name, "-o", str(output), *objects])


def zig(command: list[str]) -> None:
    """Run one of ziglang's tools. Raises CompileError with its message, or with what to install where it is missing."""
    if find_spec("ziglang") is None:
        raise CompileError(
            "the linker is the package ziglang, which is not installed: pip install 'llmc[cross]'", stage="library"
        )
    done = subprocess.run([sys.executable, "-m", "ziglang", *command], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(
            f"the linker failed (exit {done.returncode}): {done.stderr.strip()[-2000:]}", stage="library"
        )
