"""The runtime of AMD's cards for TVM: no TVM wheel has one.

The library is built from `source/` by `python -m llmc.runtime.hip.build`, with any C++ compiler and without ROCm; HIP's
own library is looked for when a card is first asked for anything. Two entry points lead here (see pyproject.toml):
`llmc.runtime_backends`, by which the runtime opens it without `import tvm`, and `tvm.backends`, which TVM reads when it
is imported.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
from pathlib import Path

from ..errors import ArtifactError

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "source"
ELSEWHERE = "LLMC_HIP_RUNTIME"  # environment variable: a folder for the library, where this one can't be written
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")

_opened: list[ctypes.CDLL] = []


def load() -> None:
    """Register the device "rocm" with TVM's runtime, whose small libraries are open already (libtvm_runtime).

    May be called twice, and after somebody else has registered one: that one stays. Raises ArtifactError: the library
    is not built, or can't be opened.
    """
    import tvm_ffi

    if _opened or tvm_ffi.get_global_func("device_api.rocm", allow_missing=True) is not None:
        return
    file = library()
    if not file.exists():
        raise ArtifactError(
            f"expected the runtime of AMD's cards at {file}, found none; build it with "
            "`python -m llmc.runtime.hip.build` (it needs g++, and no ROCm)"
        )
    try:
        _opened.append(ctypes.CDLL(str(file), ctypes.RTLD_LOCAL))
    except OSError as error:
        raise ArtifactError(
            f"{file}: could not open the runtime of AMD's cards: {error}; build it again with "
            "`python -m llmc.runtime.hip.build`"
        ) from error


def autoload() -> None:
    """What `import tvm` calls: registers the device where the library is built, and is silent where it is not."""
    if library().exists():
        load()


def library() -> Path:
    """Where the built library stands. Its name tells what it is made of, so that a stale one is never opened."""
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.relative_to(SOURCE).as_posix().encode() + file.read_bytes())
    for package in _PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return Path(os.environ.get(ELSEWHERE) or FOLDER) / f"libllmc_hip-{digest.hexdigest()[:12]}.so"


def sources() -> list[Path]:
    """The files it is built from, in a fixed order."""
    return sorted(file for file in SOURCE.rglob("*") if file.suffix in (".cc", ".h"))
