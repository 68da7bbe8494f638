"""Native libraries: TVM's small runtime, opened by hand, and an artifact's own.

TVM's compiler is never opened: `import tvm` is not needed, nor done.
"""

import ctypes
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact import TargetEntry
from .errors import ArtifactError


def function(machine: Any, target: TargetEntry, name: str) -> Any:
    """A function of a library by name. Raises ArtifactError: it has none of that name."""
    try:
        return machine[name]
    except (AttributeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{target.library}: expected a function {name!r}, found none; compile it again") from error


def ffi() -> Any:
    """tvm_ffi, imported where it is needed, so that `import llmc` stays quick; with TVM's runtime beside it."""
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))  # read once, when the pool starts; TVM's default is half
    with _Without("torch"):
        import tvm_ffi

    for name in ("libtvm_runtime", "libtvm_runtime_extra"):
        open_runtime(name)
    return tvm_ffi


def open_runtime(name: str) -> None:
    """Open one of the libraries that TVM's package brings, for all to see. OSError: it can't be opened."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    ctypes.CDLL(str(_runtime_folder() / f"{name}{suffix}"), ctypes.RTLD_GLOBAL)


def open_library(library: Path, devices: Sequence[int]) -> Any:
    """An artifact's library -> its functions by name, at work on devices: (type, number, allocator) of each, flat.

    It is opened by a name that was never used: by one that was, the linker answers with the library that it opened
    then, though another has been compiled to that path since.

    Raises ArtifactError: it is none of llmc's, or can't be opened here.
    """
    tvm_ffi = ffi()
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        link = Path(folder) / library.name
        link.symlink_to(library.resolve())
        try:
            machine = tvm_ffi.load_module(str(link))["vm_load_executable"]()
        except (AttributeError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise ArtifactError(f"{library}: expected a library made by llmc, could not open it: {error}") from error
    machine["vm_initialization"](*devices)
    return machine


class _Without:
    """In this block, this thread finds no package of that name unless it is loaded already.

    tvm_ffi imports torch wherever it is installed, which takes seconds; nothing here needs it.
    """

    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path=None, target=None):
        if name == self._package and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is not wanted here", name=name)

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        sys.meta_path.insert(0, self)

    def __exit__(self, *_) -> None:
        sys.meta_path.remove(self)


def _runtime_folder() -> Path:
    spec = importlib.util.find_spec("tvm")  # finds, imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError("expected TVM's runtime libraries, found no package `tvm`; install apache-tvm")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
