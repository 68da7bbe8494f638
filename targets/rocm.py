"""AMD's architectures.

Sources: LLVM, "User Guide for AMDGPU Backend" (wave sizes, registers, LDS); AMD's instruction set documents of CDNA 2,
CDNA 3, RDNA 3 and RDNA 4 (MFMA and WMMA shapes, waves and registers of a SIMD); for bandwidth, compute units and dense
float16 matrix rates: AMD's data sheet or product page of the card that is named.
"""

from __future__ import annotations

from pathlib import Path

from .gpu import GpuTarget, by_arch, choose_host

# What a bare "rocm" compiles for: the same set on every machine.
DEFAULT = ("gfx942", "gfx1100")
HOSTS = ("linux-x86_64", "linux-aarch64")
NODES = Path("/sys/class/kfd/kfd/topology/nodes")


def _cdna(card: str, int8_run: int, multiprocessors: int, gb: float, tflops: float) -> dict:
    """Four SIMDs a compute unit: 512 registers of 64 lanes each, 8 waves."""
    return dict(
        card=card,
        warp=64,
        matrix_unit="mfma",
        int8_run=int8_run,
        multiprocessors=multiprocessors,
        registers=4 * 512 * 64,
        registers_per_thread=512,
        threads_per_multiprocessor=4 * 8 * 64,
        bandwidth=gb * 1e9,
        peak=tflops * 1e12,
    )


def _rdna(card: str, matrix_unit: str, int8_run: int, multiprocessors: int, gb: float, tflops: float) -> dict:
    """Two SIMDs a compute unit: 1536 registers of 32 lanes each, 16 waves."""
    return dict(
        card=card,
        warp=32,
        matrix_unit=matrix_unit,
        int8_run=int8_run,
        multiprocessors=multiprocessors,
        registers=2 * 1536 * 32,
        registers_per_thread=256,
        threads_per_multiprocessor=2 * 16 * 32,
        bandwidth=gb * 1e9,
        peak=tflops * 1e12,
        # A block stays on one compute unit, not two: its shared memory is near, and its fences are cheap.
        mattr=("+cumode",),
    )


ARCHITECTURES = {
    "gfx90a": _cdna("MI250X, one of its two dies", 4, 110, 1638, 191.5),  # MI250X data sheet, halved
    "gfx942": _cdna("MI300X", 8, 304, 5300, 1307.4),  # MI300X data sheet
    "gfx1100": _rdna("RX 7900 XTX", "wmma", 16, 96, 960, 122.8),  # product page
    "gfx1201": _rdna("RX 9070 XT", "wmma12", 8, 64, 640, 194.6),  # product page
}


def target(arch: str, host: str | None = None) -> GpuTarget:
    """The target of an architecture by name, e.g. "gfx942". ValueError: unknown, or no such host."""
    facts = by_arch("rocm", arch, ARCHITECTURES)
    return GpuTarget(
        kind="rocm",
        name=f"rocm:{arch}",
        arch=arch,
        host=choose_host("rocm", host, HOSTS),
        max_threads=256,  # TVM writes this limit into the code, whatever it is told
        shared_bytes=64 << 10,
        shared_dynamic_bytes=64 << 10,
        shared_per_multiprocessor=64 << 10,  # RDNA: 128 KB for two compute units
        blocks_per_multiprocessor=32,
        dtypes=("float16", "bfloat16"),
        native_bf16=False,  # TVM's code generator has no vectors of it
        async_copy=False,
        **facts,
    )


def parse(part: str, host: str | None = None) -> list[GpuTarget]:
    """The targets of what stands after "rocm:": nothing (the usual set), "native" (this machine's card), a name."""
    if part == "native":
        return [target(native(), host)]
    return [target(arch, host) for arch in ((part,) if part else DEFAULT)]


def card(nodes: Path = NODES) -> str | None:
    """Architecture of this machine's first card as Linux's driver tells, e.g. "gfx942"; None: there is none.

    gfx_target_version is major·10000 + minor·100 + step, and the name has minor and step in hexadecimal.
    """
    for file in sorted(nodes.glob("*/properties")):
        fields = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
        version = int(fields.get("gfx_target_version", "0"))
        if version:
            return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return None


def native() -> str:
    """The architecture of this machine's card. ValueError: none found, or none that code is generated for."""
    found = card()
    known = ", ".join(f"rocm:{a}" for a in ARCHITECTURES)
    if found is None:
        raise ValueError(
            "rocm:native is this machine's card, and Linux's driver (kfd) names none: name the architecture, "
            f"e.g. {known}"
        )
    if found not in ARCHITECTURES:
        raise ValueError(f"this machine's card is {found}: expected one of {known}")
    return found
