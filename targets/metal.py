"""Apple's GPUs, as one target: the Apple 7 family (M1, A14) and every later one.

Sources: Apple, "Metal Feature Set Tables" (threadgroup memory 32 KB, 1024 threads a threadgroup, 31 buffers a kernel,
SIMD-scoped matrix multiplication from Apple 7 on); "Metal Shading Language Specification" (2.3 has simdgroup_matrix of
half and float; bfloat came with 3.1). Bandwidth and rate are the M1's, the least of the family: 68.25 GB/s of
LPDDR4X-4266 on 128 bits, 2.6 TFLOP/s (Apple's announcement of the M1). Registers and resident threads are not
published.
"""

from __future__ import annotations

from .gpu import GpuTarget, choose_host, this_host

HOSTS = ("macos-arm64",)
LANES = 4  # a vector type of MSL has at most 4
LANGUAGE = "metal2.3"  # what TVM's runtime asks Metal's compiler for


def target(host: str | None = None) -> GpuTarget:
    """The one Metal target. ValueError: another host than macos-arm64."""
    return GpuTarget(
        kind="metal",
        name="metal",
        arch="apple7",
        card="M1",
        host=choose_host("metal", host, HOSTS),
        warp=32,
        max_threads=1024,
        shared_bytes=32 << 10,
        shared_dynamic_bytes=32 << 10,
        matrix_unit="simdgroup",
        dtypes=("float16", "float32"),
        native_bf16=False,
        async_copy=False,
        multiprocessors=8,
        registers=0,
        registers_per_thread=0,
        shared_per_multiprocessor=0,
        threads_per_multiprocessor=0,
        blocks_per_multiprocessor=0,
        bandwidth=68.25e9,
        peak=2.6e12,
        most_tensors=31,
    )


def parse(part: str, host: str | None = None) -> list[GpuTarget]:
    """The target of what stands after "metal:": nothing, or its family. ValueError: anything else."""
    if part not in ("", "native", "apple7"):
        raise ValueError(f"unknown architecture metal:{part}: expected metal, the one build for Apple 7 and later")
    return [target(host)]


def runs_here() -> bool:
    """Whether this machine is a Mac with Apple's own processor."""
    return this_host() == "macos-arm64"
