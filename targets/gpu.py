"""GPU targets: what kernels and passes may know of a graphics processor."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from .cpu import AARCH64

# x86-64-v2 as /proc/cpuinfo spells it (x86-64 psABI, table 3.1): every x86-64 CPU since about 2009.
X86_64_V2 = ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")


@dataclass(frozen=True)
class Host:
    """The machine beside a GPU: its code only launches kernels, so it is plain on purpose.

    mtriple, mcpu: LLVM's names. features: what the CPU must have, as /proc/cpuinfo spells it.
    """

    name: str
    mtriple: str
    mcpu: str
    features: tuple[str, ...]

    def tvm(self) -> dict:
        """The keywords of `tvm.target.Target` for host code."""
        return {"kind": "llvm", "mtriple": self.mtriple, "mcpu": self.mcpu}


HOSTS = {
    "linux-x86_64": Host("linux-x86_64", "x86_64-linux-gnu", "x86-64-v2", X86_64_V2),
    "linux-aarch64": Host("linux-aarch64", "aarch64-linux-gnu", "generic", AARCH64),
    "macos-arm64": Host("macos-arm64", "arm64-apple-macos11.0", "apple-m1", ()),  # macOS 11 is the first on arm64
}

# kind of TVM's target -> language that device code is emitted in.
LANGUAGES = {"cuda": "cuda", "rocm": "amdgpu", "metal": "msl"}


@dataclass(frozen=True)
class GpuTarget:
    """Facts of a GPU architecture that code is generated for, and of the host beside it.

    kind: "cuda" | "rocm" | "metal"; name: as `--target` spells it; arch: the toolchain's name of the architecture.
    host: the system whose code launches the kernels.
    warp: threads that run together. max_threads: most threads of a block.
    shared_bytes: shared memory a block may declare; shared_dynamic_bytes: what a kernel may ask for at its launch.
    matrix_unit: None | "mma" (mma.sync, m16n8k16) | "mfma" (CDNA, 64 lanes) | "wmma" (RDNA 3) | "wmma12" (RDNA 4, other
    lane layout) | "simdgroup" (Apple, 8x8x8). dtypes: operands that it multiplies with float32 sums.
    int8_run: adjacent 8-bit integers of a row that a lane hands, of either operand, to one instruction of the matrix
    unit with 32-bit integer sums; 0: it has none.
    fp8: the matrix unit multiplies E4M3 numbers (OCP's, with NaN at all ones) with float32 sums.
    native_bf16: the language has a bfloat16 type. async_copy: global to shared memory without registers (cp.async).
    multiprocessors: of the card that bandwidth (bytes/s) and peak (multiply-adds counted as two, float16 operands with
    float32 sums, dense, FLOP/s) belong to. Of each multiprocessor: registers (32 bits a thread's), shared memory in
    bytes, resident threads, resident blocks; 0 where the maker tells no number.
    mattr: LLVM features beyond the architecture's own. most_tensors: that a kernel takes as arguments, its numbers
    counted as one more; by default what fits, 8 bytes each, in the 4 KB of parameters that CUDA (C++ Programming Guide,
    "Function Parameters") and HIP have on every card, with room for a dozen numbers.
    keys_token_last: K pages are [kv_heads, page_size, head_dim], as V's.
    """

    kind: str
    name: str
    arch: str
    card: str
    host: str
    warp: int
    max_threads: int
    shared_bytes: int
    shared_dynamic_bytes: int
    matrix_unit: str | None
    dtypes: tuple[str, ...]
    native_bf16: bool
    async_copy: bool
    multiprocessors: int
    registers: int
    registers_per_thread: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    bandwidth: float
    peak: float
    mattr: tuple[str, ...] = ()
    most_tensors: int = 500
    keys_token_last: bool = False
    int8_run: int = 0
    fp8: bool = False

    @property
    def language(self) -> str:
        """What device code is emitted in: "cuda" (C++), "amdgpu" (LLVM IR) or "msl"."""
        return LANGUAGES[self.kind]

    @property
    def features(self) -> tuple[str, ...]:
        """What the host's CPU must have, as /proc/cpuinfo spells it."""
        return HOSTS[self.host].features

    @property
    def system(self) -> str:
        """Operating system of the host: "linux" or "macos"."""
        return self.host.partition("-")[0]

    def tvm(self) -> dict:
        """The keywords of `tvm.target.Target` for device code."""
        arch = {"cuda": {"arch": self.arch.replace("compute_", "sm_")}, "rocm": {"mcpu": self.arch}, "metal": {}}[
            self.kind
        ]
        mattr = {"mattr": list(self.mattr)} if self.mattr else {}
        return {
            "kind": self.kind,
            **arch,
            **mattr,
            "max_num_threads": self.max_threads,
            "max_threads_per_block": self.max_threads,
            "max_shared_memory_per_block": self.shared_bytes,
            "thread_warp_size": self.warp,
        }

    def host_tvm(self) -> dict:
        """The keywords of `tvm.target.Target` for host code."""
        return HOSTS[self.host].tvm()


def this_host() -> str:
    """This machine as a host, e.g. "linux-x86_64"; it may be one that nothing is compiled for."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = platform.machine().lower()
    return f"{system}-{'x86_64' if machine == 'amd64' else machine}"


def choose_host(family: str, host: str | None, possible: tuple[str, ...]) -> str:
    """The host asked for, or this machine, or the only one there is. ValueError: the family has no driver there."""
    if host is not None and host not in HOSTS:
        raise ValueError(f"unknown host {host!r}: expected one of {', '.join(HOSTS)}")
    if len(possible) == 1 and host is None:
        return possible[0]
    chosen = host or this_host()
    if chosen not in possible:
        what = f"host {chosen!r}" if host else f"this machine ({chosen})"
        raise ValueError(f"{what} can't run {family}: expected {' or '.join(possible)}; give it as --host")
    return chosen


def by_arch(family: str, arch: str, known: dict[str, dict]) -> dict:
    """The facts of an architecture by name. ValueError: unknown, with those that are known."""
    if arch not in known:
        names = ", ".join(f"{family}:{name}" for name in known)
        raise ValueError(f"unknown architecture {family}:{arch}: expected {family}, {family}:native, or one of {names}")
    return known[arch]
