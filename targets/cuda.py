"""NVIDIA's architectures.

Sources: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability" (threads, registers, shared
memory, resident blocks); PTX ISA 9.0 (mma.sync m16n8k16 for f16 and bf16, m16n8k32 for s8, cp.async: sm_80
and later; m16n8k32 for e4m3: sm_89 and later); for bandwidth,
multiprocessors and dense float16 rates with float32 sums: NVIDIA's data sheet or white paper of the card that is named.
sm_75 is left out: it multiplies m16n8k8 only, and has neither bfloat16 nor cp.async.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from .gpu import GpuTarget, by_arch, choose_host

# What a bare "cuda" compiles for: the same set on every machine.
DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_90")
HOSTS = ("linux-x86_64", "linux-aarch64")
# CUDA's runtime library of version 13 refuses older drivers (CUDA 13.0 release notes: driver 580, which says 13000).
DRIVER = 13000


def _facts(
    card: str, multiprocessors: int, shared_kb: int, threads: int, blocks: int, gb: float, tflops: float
) -> dict:
    """Of a multiprocessor: shared memory, of which a block may have all but 1 KB; resident threads and blocks."""
    return dict(
        card=card,
        multiprocessors=multiprocessors,
        shared_dynamic_bytes=(shared_kb - 1) << 10,
        shared_per_multiprocessor=shared_kb << 10,
        threads_per_multiprocessor=threads,
        blocks_per_multiprocessor=blocks,
        bandwidth=gb * 1e9,
        peak=tflops * 1e12,
    )


# PTX of a generic architecture, which the driver of a later card compiles when it loads it: what every card has.
GENERIC = {"compute_80": _facts("A100 SXM 80GB", 108, 100, 1536, 16, 2039, 312)}
ARCHITECTURES = {
    "sm_80": _facts("A100 SXM 80GB", 108, 164, 2048, 32, 2039, 312),  # A100 data sheet
    "sm_86": _facts("A40", 84, 100, 1536, 16, 696, 149.7),  # A40 data sheet
    "sm_89": _facts("L40S", 142, 100, 1536, 24, 864, 362),  # L40S data sheet
    "sm_90": _facts("H100 SXM", 132, 228, 2048, 32, 3350, 989.4),  # H100 data sheet, Hopper white paper
    "sm_100": _facts("B200", 148, 228, 2048, 32, 8000, 2250),  # HGX B200 data sheet
    "sm_120": _facts("GeForce RTX 5090", 170, 100, 1536, 24, 1792, 209.5),  # RTX Blackwell white paper
}


def target(arch: str, host: str | None = None) -> GpuTarget:
    """The target of an architecture by name: "sm_90", or "compute_80" for later cards. ValueError: unknown, no host."""
    facts = by_arch("cuda", arch, ARCHITECTURES | GENERIC)
    return GpuTarget(
        kind="cuda",
        name=f"cuda:{arch}",
        arch=arch,
        host=choose_host("cuda", host, HOSTS),
        warp=32,
        max_threads=1024,
        shared_bytes=48 << 10,
        matrix_unit="mma",
        dtypes=("float16", "bfloat16"),
        int8_run=4,
        fp8=_split(arch) >= (8, 9),
        native_bf16=True,
        async_copy=True,
        registers=64 << 10,
        registers_per_thread=255,
        **facts,
    )


def parse(part: str, host: str | None = None) -> list[GpuTarget]:
    """The targets of what stands after "cuda:": nothing (the usual set), "native" (this machine's card), a name."""
    if part == "native":
        return [target(native(), host)]
    return [target(arch, host) for arch in ((part,) if part else DEFAULT)]


class Card(NamedTuple):
    """This machine's first card: its compute capability (major, minor) and the CUDA version of its driver."""

    capability: tuple[int, int]
    driver: int

    @property
    def arch(self) -> str:
        return "sm_{}{}".format(*self.capability)


def card() -> Card | None:
    """This machine's first card as its driver tells, or None where there is no driver or no card."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) != 0:
            return None
    except (OSError, AttributeError):
        return None
    version, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(value.value)
    return Card((capability[0], capability[1]), version.value)


def native() -> str:
    """The architecture for this machine's card: its own, or the nearest earlier one of the same major number.

    A cubin runs on later minor numbers of its major one (CUDA C++ Programming Guide, "Binary Compatibility").
    """
    found = card()
    if found is None:
        raise ValueError(
            "cuda:native is this machine's card, and no NVIDIA driver with a card was found: name the architecture, "
            f"e.g. {', '.join(f'cuda:{a}' for a in ARCHITECTURES)}"
        )
    runs = runs_on(found.capability)
    if not runs:
        raise ValueError(f"this machine's card is {found.arch}: expected one that runs {', '.join(ARCHITECTURES)}")
    return runs[-1]


def runs_on(capability: tuple[int, int]) -> list[str]:
    """The architectures whose machine code a card of this compute capability runs, the best one last."""
    return [a for a in ARCHITECTURES if _split(a)[0] == capability[0] and _split(a)[1] <= capability[1]]


def _split(arch: str) -> tuple[int, int]:
    number = arch.partition("_")[2]
    return int(number[:-1]), int(number[-1])
