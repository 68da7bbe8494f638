"""Facts of the machines that llmc compiles for: numbers and names, nothing else."""

from __future__ import annotations

import sys
from types import ModuleType

from .cpu import CpuTarget, detect
from .gpu import HOSTS, GpuTarget
from .listing import TargetFact, listing

__all__ = ["CpuTarget", "GpuTarget", "Target", "TargetFact", "detect", "listing", "parse"]

Target = CpuTarget | GpuTarget
FAMILIES = ("cpu", "cuda", "rocm", "metal")


def parse(targets: str | list[str] | tuple[str, ...], host: str | None = None) -> list[Target]:
    """The targets that a user names: "cpu", "cuda:sm_90", "metal", several joined by commas or as a list.

    A bare family of GPUs is its usual set of architectures, "native" after the colon is this machine's card. host is
    the system that will load the code, by default this machine; metal has one only, and takes it whatever the others
    are for.
    Raises ValueError for an unknown name, an unknown host, and one that a target can't run on.
    """
    names = targets.split(",") if isinstance(targets, str) else list(targets)
    names = [name.strip() for name in names]
    if host is not None and host not in HOSTS:
        raise ValueError(f"unknown host {host!r}: expected one of {', '.join(HOSTS)}")
    found: list[Target] = []
    for name in names:
        # Metal beside others goes to its own host, theirs is the one that was named.
        alone = host if len(names) == 1 or name.partition(":")[0] != "metal" else None
        for target in _family(name, alone):
            if target not in found:
                found.append(target)
    return found


def _family(name: str, host: str | None) -> list[Target]:
    from . import cpu, cuda, metal, rocm

    family, _, part = name.partition(":")
    if family == "cpu":
        target = cpu.by_name(part)
        if host is not None and host != target.host:
            raise ValueError(
                f"host {host!r} with target {target.name}: expected {target.host}, the only host of that CPU"
            )
        return [target]
    if family in FAMILIES:
        return [*{"cuda": cuda, "rocm": rocm, "metal": metal}[family].parse(part, host)]
    raise ValueError(
        f"unknown target {name!r}: expected one of {', '.join(FAMILIES)}, e.g. cpu, cpu:x86-64-v3 or cuda:sm_90"
    )


class _Room(ModuleType):
    """`llmc.targets` is this room, and in the public contract a function as well: llmc.targets() lists the targets."""

    def __call__(self) -> list[TargetFact]:
        return listing()


sys.modules[__name__].__class__ = _Room
