"""Which GPUs this machine has, asked of their drivers; and why a target can't run here."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..artifact import TargetEntry

__all__ = ["Card", "cards", "obstacle"]

# What TVM's CUDA runtime is linked with, libcudart 13, needs: CUDA Toolkit 13.0 release notes, table 3.
CUDA_DRIVER = 13000
CUDA_DRIVER_NAME = "CUDA 13.0, which is NVIDIA driver 580 or later"
KFD = Path("/sys/class/kfd/kfd/topology/nodes")


class Card(NamedTuple):
    """arch: as targets spell it ("sm_90", "gfx942", ""); driver: its version as CUDA has it, 0 for others."""

    arch: str
    driver: int = 0


@cache
def cards(kind: str) -> tuple[Card, ...]:
    """The GPUs of a kind ("cuda", "rocm", "metal") that this machine has, in the order of their numbers."""
    return {"cuda": _cuda, "rocm": _rocm, "metal": _metal}[kind]()


def _cuda() -> tuple[Card, ...]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) != 0:
            return ()
    except (OSError, AttributeError):
        return ()
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for number in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), number)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append(Card(f"sm_{major.value}{minor.value}", version.value))
    return tuple(found)


def _rocm(nodes: Path = KFD) -> tuple[Card, ...]:
    """Of the kernel's list: gfx_target_version is major · 10000 + minor · 100 + step, 0 for CPUs."""
    found = []
    for properties in sorted(nodes.glob("*/properties"), key=lambda p: int(p.parent.name)):
        words = dict(line.split() for line in properties.read_text().splitlines() if line.count(" ") == 1)
        version = int(words.get("gfx_target_version", 0))
        if version:
            found.append(Card(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"))
    return tuple(found)


def _metal() -> tuple[Card, ...]:
    return (Card(""),) if platform.system() == "Darwin" and platform.machine() == "arm64" else ()


def obstacle(target: TargetEntry, found: Sequence[Card] | None = None) -> str | None:
    """Why no GPU of this machine runs a target, with what was found and what is needed; None: one does."""
    found = cards(target.kind) if found is None else tuple(found)
    if not found:
        what = {"cuda": "NVIDIA card", "rocm": "AMD card", "metal": "Apple GPU"}[target.kind]
        return f"{target.target} needs an {what}, found none (or no driver for it)"
    if target.kind == "cuda" and found[0].driver < CUDA_DRIVER:
        version = f"{found[0].driver // 1000}.{found[0].driver % 1000 // 10}"
        return f"{target.target} needs a driver for {CUDA_DRIVER_NAME}, found one for CUDA {version}: update the driver"
    arch = target.target.partition(":")[2]
    if not any(runs(arch, card.arch) for card in found):
        return f"{target.target} is machine code for {arch}, found {', '.join(c.arch for c in found)}"
    return None


def runs(arch: str, card: str) -> bool:
    """A card runs code for its own architecture; NVIDIA's, too, code for smaller minor numbers of the same major one,
    and PTX ("compute_80") of any architecture up to its own.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    if arch.startswith("compute_") and card.startswith("sm_"):
        return int(card[3:]) >= int(arch[8:])
    if arch.startswith("sm_") and arch[3:].isdigit() and card[3:].isdigit():
        (major, minor), (own, least) = (divmod(int(a[3:]), 10) for a in (card, arch))
        return major == own and least <= minor
    return arch in ("", card)
