"""Facts of the machines that llmc compiles for: numbers and names, nothing else."""

import sys
from types import ModuleType

from .cpu import CpuTarget, detect
from .listing import TargetFact, listing

__all__ = ["CpuTarget", "TargetFact", "TargetNotYet", "detect", "listing", "parse"]

FAMILIES = ("cpu", "cuda", "rocm", "metal")


class TargetNotYet(ValueError):
    """A target that has a name and no code generator yet."""


def parse(targets: str | list[str] | tuple[str, ...]) -> list[CpuTarget]:
    """The targets that a user names: "cpu", "cpu:x86-64-v3", several joined by commas or as a list.

    Raises ValueError for an unknown name, TargetNotYet (a ValueError) for a family that can't be compiled for yet.
    """
    from . import cpu

    names = targets.split(",") if isinstance(targets, str) else list(targets)
    found: list[CpuTarget] = []
    for name in (n.strip() for n in names):
        family, _, part = name.partition(":")
        if family not in FAMILIES:
            raise ValueError(
                f"unknown target {name!r}: expected one of {', '.join(FAMILIES)}, e.g. cpu or cpu:x86-64-v3"
            )
        if family != "cpu":
            raise TargetNotYet(f"target {name!r} can't be compiled for yet: this version emits code for cpu only")
        target = cpu.by_name(part)
        if target not in found:
            found.append(target)
    return found


class _Room(ModuleType):
    """`llmc.targets` is this room, and in the public contract a function as well: llmc.targets() lists the targets."""

    def __call__(self) -> list[TargetFact]:
        return listing()


sys.modules[__name__].__class__ = _Room
