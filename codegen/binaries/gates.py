"""What a GPU will find in a kernel: registers, spills, shared memory, matrix instructions, wide loads, occupancy.

Read from what comes out, not from what was meant: NVIDIA's machine code through cuobjdump and nvdisasm, AMD's through
the notes of the code object and its assembly, Metal's from the source.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget, toolchains

from .barriers import functions
from .device_code import DeviceCode
from .elf import Elf
from .metal import shared_bytes
from .msgpack import unpack

AMD_METADATA = 32  # type of the note: NT_AMDGPU_METADATA
# Multiplications on the matrix units, and loads of 16 bytes from the device's memory, as each language spells them.
MATRIX = {
    "cuda": re.compile(r"\b(?:HMMA|HGMMA|IMMA|QMMA|UTCHMMA)\b"),
    "amdgpu": re.compile(r"\bv_(?:mfma|wmma|smfmac)_\w+"),
    "msl": re.compile(r"\bsimdgroup_multiply_accumulate\("),
}
WIDE = {
    "cuda": re.compile(r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG\b"),
    "amdgpu": re.compile(r"\b(?:global|flat|buffer)_load_(?:dwordx4|b128)\b"),
    "msl": re.compile(r"=[^=;]*\*\(device (?:uint4|int4|float4)\*\)"),
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel. registers: of a thread. spilled: bytes of a thread's registers that live in memory. shared: bytes
    of a block, without what a launch asks for. threads: of a block. matrix, wide_loads: how many such instructions
    stand in it. occupancy: share of a multiprocessor's threads that can be resident, None where it isn't known.
    """

    registers: int | None
    spilled: int | None
    shared: int
    threads: int | None
    matrix: int
    wide_loads: int
    occupancy: float | None


def resources(code: DeviceCode, target: GpuTarget) -> dict[str, Resources]:
    """kernel -> what it takes. CompileError: NVIDIA's tools are missing (it says what to install)."""
    read = {"cuda": _cuda, "amdgpu": _amd, "msl": _metal}[target.language]
    return dict(sorted(read(code, target).items()))


def table(found: dict[str, Resources]) -> str:
    """For people: a line a kernel."""
    rows: list[tuple[str, ...]] = [
        ("kernel", "registers", "spilled", "shared", "threads", "occupancy", "matrix", "16-byte loads")
    ]
    for name, r in found.items():
        numbers = ("" if n is None else str(n) for n in (r.registers, r.spilled, r.shared, r.threads))
        share = "" if r.occupancy is None else f"{r.occupancy:.0%}"
        rows.append((name, *numbers, share, str(r.matrix), str(r.wide_loads)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    return "".join(line(row) + "\n" for row in rows)


def occupancy(target: GpuTarget, registers: int, shared: int, threads: int) -> float:
    """Share of a multiprocessor's threads that can be resident at once.

    Sources: NVIDIA, "CUDA C++ Best Practices Guide" and its occupancy calculator (registers of a warp are given out by
    256; 1 KB of shared memory is the system's, and counted in `shared` where a kernel has any); AMD's instruction set
    documents and LLVM's tables of registers (given out by 8 on CDNA, by 24 on RDNA).
    """
    warps = -(-threads // target.warp)
    if target.language == "cuda":
        given = -(-registers * target.warp // 256) * 256
        by_registers = target.registers // max(given, 1) // warps
        by_shared = target.shared_per_multiprocessor // max(shared, 1024)
    else:
        lanes = target.registers // target.warp  # registers of a lane, over all SIMDs
        simds = 4 if target.warp == 64 else 2
        step = 8 if target.warp == 64 else 24
        given = max(-(-registers // step) * step, step)
        by_registers = simds * (lanes // simds // given) // warps
        by_shared = target.shared_per_multiprocessor // shared if shared else target.blocks_per_multiprocessor
    most = target.threads_per_multiprocessor // (warps * target.warp)
    blocks = min(by_registers, by_shared, most, target.blocks_per_multiprocessor)
    return blocks * warps * target.warp / target.threads_per_multiprocessor


def _counts(text: str, language: str) -> tuple[int, int]:
    """Matrix instructions and 16-byte loads in a kernel's text."""
    return len(MATRIX[language].findall(text)), len(WIDE[language].findall(text))


def _tool(name: str, *arguments: str) -> str:
    tool = toolchains.locate("nvidia.cu13", f"bin/{name}")
    if tool is None:
        raise CompileError(
            f"reading NVIDIA's machine code needs {name}, which is not installed: {toolchains.DISASSEMBLER.advice}",
            stage="library",
        )
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{name} failed: {done.stderr.strip()[-500:]}", stage="library")
    return done.stdout


def _cuda(code: DeviceCode, target: GpuTarget) -> dict[str, Resources]:
    found = {}
    for binary in code.binaries:
        with tempfile.TemporaryDirectory(prefix="llmc-gates-") as folder:
            cubin = Path(folder) / "kernels.cubin"
            cubin.write_bytes(binary)
            usage = _tool("cuobjdump", "-res-usage", str(cubin))
            assembly = _tool("nvdisasm", "-c", str(cubin))
        parts = re.split(r"^\.text\.(\w+):$", assembly, flags=re.MULTILINE)
        texts = dict(zip(parts[1::2], parts[2::2], strict=True))
        pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for name, registers, stack, shared, local in re.findall(pattern, usage):
            threads = code.threads.get(name)
            full = occupancy(target, int(registers), int(shared), threads) if threads else None
            spilled = int(stack) + int(local)
            matrix, wide = _counts(texts.get(name, ""), "cuda")
            found[name] = Resources(int(registers), spilled, int(shared), threads, matrix, wide, full)
    return found


def _amd(code: DeviceCode, target: GpuTarget) -> dict[str, Resources]:
    texts: dict[str, list[str]] = {}
    for name, text in code.sources.items():
        if name.endswith(".s"):
            texts |= functions(text)
    found = {}
    for binary in code.binaries:
        for owner, kind, note in Elf(binary, "code object").notes():
            if (owner, kind) != ("AMDGPU", AMD_METADATA):
                continue
            for kernel in unpack(note)["amdhsa.kernels"]:
                name, shared = kernel[".name"], kernel[".group_segment_fixed_size"]
                registers = kernel[".vgpr_count"]  # on CDNA with those that hold sums of the matrix units
                threads = code.threads.get(name)
                full = occupancy(target, registers, shared, threads) if threads else None
                matrix, wide = _counts("\n".join(texts.get(name, [])), "amdgpu")
                spilled = kernel[".private_segment_fixed_size"]
                found[name] = Resources(registers, spilled, shared, threads, matrix, wide, full)
    return found


def _metal(code: DeviceCode, target: GpuTarget) -> dict[str, Resources]:
    del target
    found = {}
    for name, source in code.kernels.items():
        text = source.decode()
        matrix, wide = _counts(text, "msl")
        found[name] = Resources(None, None, shared_bytes(text), None, matrix, wide, None)
    return found
