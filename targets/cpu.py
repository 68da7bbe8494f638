"""CPU targets: this machine's own, and a few by name.

Sources: LLVM's host detection (llvm/lib/TargetParser/Host.cpp) for the names of microarchitectures,
the x86-64 psABI for the levels v3 and v4.
"""

import os
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

# Features as Linux spells them in /proc/cpuinfo. A library is refused on a machine that lacks one of its target's.
X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
X86_64_V4 = (*X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
AARCH64 = ("asimd", "fp")

_ZEN4 = (*X86_64_V4, "avx512_bf16", "avx512_vnni", "avx512ifma", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq")

# (vendor, family) -> microarchitectures: LLVM's name, models, features that it takes for granted beyond its level.
_MICROARCHITECTURES: dict[tuple[str, int], list[tuple[str, set[int], tuple[str, ...]]]] = {
    ("AuthenticAMD", 0x17): [("znver1", {*range(0x30)}, X86_64_V3), ("znver2", {*range(0x30, 0x100)}, X86_64_V3)],
    ("AuthenticAMD", 0x19): [
        ("znver4", {*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)}, _ZEN4),
        ("znver3", {*range(0x10), *range(0x20, 0x60)}, X86_64_V3),
    ],
    ("AuthenticAMD", 0x1A): [("znver5", {*range(0x100)}, (*_ZEN4, "avx_vnni"))],
    ("GenuineIntel", 6): [
        ("haswell", {0x3C, 0x3F, 0x45, 0x46}, X86_64_V3),
        ("broadwell", {0x3D, 0x47, 0x4F, 0x56}, X86_64_V3),
        ("skylake", {0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6}, X86_64_V3),
        ("cooperlake", {0x55}, (*X86_64_V4, "avx512_vnni", "avx512_bf16")),
        ("cascadelake", {0x55}, (*X86_64_V4, "avx512_vnni")),
        ("skylake-avx512", {0x55}, X86_64_V4),
        ("icelake-server", {0x6A, 0x6C}, (*X86_64_V4, "avx512_vnni", "avx512_vbmi2")),
        ("sapphirerapids", {0x8F, 0xCF}, (*X86_64_V4, "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile")),
        ("graniterapids", {0xAD, 0xAE}, (*X86_64_V4, "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_fp16")),
        ("alderlake", {0x97, 0x9A, 0xB7, 0xBA, 0xBF}, (*X86_64_V3, "avx_vnni")),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class CpuTarget:
    """Facts of a CPU that code is generated for.

    name: as `--target` spells it, e.g. "cpu:znver4"; mcpu: LLVM's name; mattr: LLVM features beyond mcpu's own.
    features: what the machine must have, as /proc/cpuinfo spells it.
    vector_bits: width of a vector register; vector_registers: how many.
    has_bf16_dot: an instruction sums pairs of bfloat16 products in float32 lanes (vdpbf16ps).
    cores: those of this machine, or 0 where the target is not this machine.
    l1d, l2, l3: bytes of cache (one core's; l3 is shared).
    keys_token_last: K pages are [kv_heads, head_dim, page_size]: a vector spans tokens and no sum is horizontal.
    """

    name: str
    mcpu: str
    arch: str
    features: tuple[str, ...]
    vector_bits: int
    vector_registers: int
    has_bf16_dot: bool = False
    mattr: tuple[str, ...] = ()
    cores: int = 0
    l1d: int = 32 << 10
    l2: int = 512 << 10
    l3: int = 8 << 20
    system: str = "linux"
    kind: str = "cpu"
    keys_token_last: bool = True

    @property
    def host(self) -> str:
        """The system that libraries for this target run on, e.g. "linux-x86_64"."""
        return f"{self.system}-{self.arch}"

    @property
    def lanes(self) -> int:
        """float32 numbers in a vector register."""
        return self.vector_bits // 32

    def llvm(self) -> dict:
        """The keywords of `tvm.target.Target` for this CPU."""
        triples = {
            "linux-x86_64": "x86_64-linux-gnu",
            "linux-aarch64": "aarch64-linux-gnu",
            "macos-arm64": "arm64-apple-macos",
        }
        target: dict = {"kind": "llvm", "mcpu": self.mcpu, "mtriple": triples[self.host]}
        if self.mattr:
            target["mattr"] = list(self.mattr)
        return target


BY_NAME = {
    "x86-64-v3": CpuTarget("cpu:x86-64-v3", "x86-64-v3", "x86_64", X86_64_V3, 256, 16),
    "x86-64-v4": CpuTarget("cpu:x86-64-v4", "x86-64-v4", "x86_64", X86_64_V4, 512, 32),
    "aarch64": CpuTarget("cpu:aarch64", "generic", "aarch64", AARCH64, 128, 32),
}


def by_name(name: str) -> CpuTarget:
    """The target of a CPU named after the colon, e.g. "x86-64-v3"; "native" is this machine. ValueError: unknown."""
    if name in ("", "native"):
        return detect()
    if name not in BY_NAME:
        here = detect()
        if name == here.name.partition(":")[2]:
            return here
        raise ValueError(
            f"unknown CPU {name!r}: expected cpu (this machine: {here.name}), "
            f"or {', '.join(f'cpu:{n}' for n in BY_NAME)}"
        )
    return BY_NAME[name]


def detect(cpuinfo: str | None = None) -> CpuTarget:
    """This machine, read from /proc/cpuinfo and /sys (or from a given text of /proc/cpuinfo)."""
    system = {"Linux": "linux", "Darwin": "macos"}.get(platform.system(), platform.system().lower())
    fields = _fields(cpuinfo)
    if "Features" in fields or (platform.machine() in ("aarch64", "arm64") and cpuinfo is None):
        if system == "macos":
            return _here(CpuTarget("cpu:apple-m1", "apple-m1", "arm64", (), 128, 32), system)
        return _here(CpuTarget("cpu:aarch64", "generic", "aarch64", AARCH64, 128, 32), system)
    flags = set(fields.get("flags", "").split())
    needed: tuple[str, ...]
    if flags.issuperset(X86_64_V4):
        level, needed, bits, registers = "x86-64-v4", X86_64_V4, 512, 32
    elif flags.issuperset(X86_64_V3):
        level, needed, bits, registers = "x86-64-v3", X86_64_V3, 256, 16
    else:
        missing = ", ".join(f for f in X86_64_V3 if f not in flags)
        raise ValueError(
            f"this CPU lacks {missing}: llmc generates code for x86-64-v3 (2013) and later, and for aarch64"
        )
    mcpu = level
    mattr: tuple[str, ...] = ()
    dot = "avx512_bf16" in flags and bits == 512
    family = (fields.get("vendor_id", ""), int(fields.get("cpu family", -1)))
    for name, models, features in _MICROARCHITECTURES.get(family, []):
        # A hypervisor may hide features: then the level says what is there.
        if int(fields.get("model", -1)) in models and flags.issuperset(features):
            mcpu, needed = name, features
            break
    else:
        # Instructions that the level does not say, each worth several times the speed of some product.
        wanted = ("avx512_bf16", "avx512_vnni") if bits == 512 else ("avx_vnni",)
        more = tuple(f for f in wanted if f in flags)
        mattr, needed = tuple(f"+{f.replace('_', '')}" for f in more), (*needed, *more)
    suffix = "".join(f"+{a.removeprefix('+avx').removeprefix('512')}" for a in mattr)
    return _here(CpuTarget(f"cpu:{mcpu}{suffix}", mcpu, "x86_64", needed, bits, registers, dot, mattr), system)


def _here(target: CpuTarget, system: str) -> CpuTarget:
    """The target with this machine's cores, caches and system."""
    caches = _caches(Path("/sys/devices/system/cpu/cpu0/cache"))
    return replace(
        target,
        cores=os.cpu_count() or 1,
        system=system,
        l1d=caches.get("l1d", target.l1d),
        l2=caches.get("l2", target.l2),
        l3=caches.get("l3", target.l3),
    )


def runs_here(target: CpuTarget) -> bool:
    """Whether this machine has what a target needs."""
    fields = _fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return machine == target.arch and set(flags) >= set(target.features)


def _fields(cpuinfo: str | None = None) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo (or of a given text of it); none where there is no such file."""
    path = Path("/proc/cpuinfo")
    text = cpuinfo if cpuinfo is not None else path.read_text() if path.exists() else ""
    return dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))


def _caches(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the first core's data caches, of those levels that the system tells."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        kind, level, size = ((index / f).read_text().strip() for f in ("type", "level", "size"))
        if kind != "Instruction":
            sizes["l1d" if level == "1" else f"l{level}"] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return {level: size for level, size in sizes.items() if level in ("l1d", "l2", "l3")}
