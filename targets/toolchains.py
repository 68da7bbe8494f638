"""Tools that compiling needs, all of them Python packages: which of them are here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Toolchain:
    """name: what it is called; extra: the extra of llmc that installs it; modules: what must be importable;
    files: what must lie in the folder of the first of `modules`' packages of that name, as (module, path)."""

    name: str
    extra: str
    modules: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()

    def missing(self) -> list[str]:
        """The modules and files that are not here."""
        gone = [module for module in self.modules if not _found(module)]
        return gone + [f"{module}/{path}" for module, path in self.files if locate(module, path) is None]

    @property
    def found(self) -> bool:
        return not self.missing()

    @property
    def advice(self) -> str:
        """What to do where it is missing."""
        return f"pip install 'llmc[{self.extra}]'"


LINKER = Toolchain("ziglang", "cross", ("ziglang",))
NVRTC = Toolchain(
    "NVRTC",
    "cuda",
    ("nvidia.cu13",),
    (("nvidia.cu13", "lib/libnvrtc.so.13"), ("nvidia.cu13", "include/cuda_fp16.h"), ("nvidia.cu13", "include/cccl")),
)
DISASSEMBLER = Toolchain(
    "nvdisasm", "cuda", ("nvidia.cu13",), (("nvidia.cu13", "bin/nvdisasm"), ("nvidia.cu13", "bin/cuobjdump"))
)

# kind of target -> what compiling for it needs.
NEEDED = {"cpu": (LINKER,), "cuda": (LINKER, NVRTC), "rocm": (LINKER,), "metal": (LINKER,)}


def missing(kind: str) -> list[Toolchain]:
    """The toolchains that compiling for a kind of target lacks on this machine."""
    return [toolchain for toolchain in NEEDED[kind] if not toolchain.found]


def locate(module: str, path: str) -> Path | None:
    """A file or folder of an installed package, or None."""
    for folder in _folders(module):
        if (folder / path).exists():
            return folder / path
    return None


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _folders(module: str) -> list[Path]:
    spec = find_spec(module) if _found(module) else None
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
