"""Build the runtime of AMD's cards: python -m llmc.runtime.hip.build [--optional] [--force]

It needs a C++ compiler with libstdc++ ($CXX, or g++), which TVM's wheels are built with too (libc++ has other strings
and other exceptions), and the headers that TVM's wheels bring. It needs nothing of ROCm.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import ELSEWHERE, SOURCE, library, sources

# Has a header of the C++ library that is not libstdc++ been found?
PROBE = "#include <string>\n#ifndef __GLIBCXX__\n#error not libstdc++\n#endif\n"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


class BuildError(Exception):
    """The library could not be built; the message says what to do."""


def compiler() -> list[str]:
    """The command of a C++ compiler with libstdc++. Raises BuildError: there is none."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"expected a C++ compiler, found no {command[0]!r}; install g++ (Debian, Ubuntu: apt install g++; Fedora: "
            "dnf install gcc-c++), or name one with libstdc++ in the environment variable CXX"
        )
    found = subprocess.run(
        [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"], input=PROBE, capture_output=True, text=True
    )
    if found.returncode:
        raise BuildError(
            f"expected a C++ compiler with libstdc++, and {shlex.join(command)!r} says: {found.stderr.strip()[-500:]}; "
            "install g++, or name it in the environment variable CXX"
        )
    return command


def includes() -> list[str]:
    """Compiler options for the headers. Raises BuildError: a package or its headers are missing."""
    tvm, ffi = _package("tvm", "apache-tvm"), _package("tvm_ffi", "apache-tvm-ffi")
    folders = (tvm / "include", tvm / "src" / "runtime", ffi / "include")
    for folder in folders:
        if not folder.is_dir():
            raise BuildError(f"expected headers in {folder}, found no such folder; install apache-tvm again")
    # -isystem: warnings about other people's headers are of no use here. The stand-ins come last.
    return [option for folder in (*folders, SOURCE / "include") for option in ("-isystem", str(folder))]


def libraries() -> list[str]:
    """The libraries of the wheels that it takes functions from. Raises BuildError: a package is missing."""
    tvm, ffi = _package("tvm", "apache-tvm"), _package("tvm_ffi", "apache-tvm-ffi")
    return [str(tvm / "lib" / "libtvm_runtime.so"), str(ffi / "lib" / "libtvm_ffi.so")]


def _package(module: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)  # finds, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"expected the package {module}, found none; pip install {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


def build(force: bool = False) -> Path:
    """Build the library unless it stands already -> the file. Raises BuildError."""
    target = library()
    if target.exists() and not force:
        return target
    command = [*compiler(), *FLAGS, "-shared", *includes()]
    command += [str(file) for file in sources() if file.suffix == ".cc"]
    # Named by their sonames, so that the ones which the process has open are found wherever they stand.
    command += ["-Wl,--no-undefined", *libraries(), "-ldl"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{command[0]} failed:\n{done.stderr.strip()[-4000:]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}")
            shutil.copy(made, partial)
            partial.replace(target)
        except OSError as error:
            raise BuildError(
                f"could not write {target}: {error}; name a folder that you may write in the environment variable "
                f"{ELSEWHERE}, now and when the runtime is used"
            ) from error
    for stale in target.parent.glob("libllmc_hip-*.so"):
        if stale != target:
            stale.unlink()
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optional", action="store_true", help="without a compiler, say so and do nothing")
    parser.add_argument("--force", action="store_true", help="build it again")
    arguments = parser.parse_args()
    try:
        if arguments.optional:
            try:
                compiler()
            except BuildError as error:
                print(f"the runtime of AMD's cards is not built: {error}", file=sys.stderr)
                return 0
        print(build(arguments.force))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
