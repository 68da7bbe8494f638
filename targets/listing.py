"""What can be compiled for, what this machine can run, and the toolchains that were found."""

from importlib.util import find_spec
from typing import NamedTuple

from . import cpu


class TargetFact(NamedTuple):
    """status: "runs here", "compiles" (for another machine), or "not yet"."""

    name: str
    status: str
    about: str


def listing() -> list[TargetFact]:
    """What `--target` takes, one entry a name."""
    linker = "linked by ziglang" if find_spec("ziglang") else "ziglang not found: install llmc[compile] to compile"
    here = cpu.detect()
    found = [TargetFact("cpu", "runs here", f"this machine: {here.name}, {here.vector_bits}-bit vectors; {linker}")]
    for name, target in cpu.BY_NAME.items():
        status = "runs here" if cpu.runs_here(target) else "compiles"
        found.append(TargetFact(f"cpu:{name}", status, f"{target.vector_bits}-bit vectors, {target.host}"))
    for family in ("cuda", "rocm", "metal"):
        found.append(TargetFact(family, "not yet", "no code generator in this version"))
    return found
