"""CUDA C++ as TVM emits it, made C++ that runs on the software device. Lines stay where they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from llmc.ir.errors import CompileError

from .build import NATIVE
from .entry import ENTRY_POINT, Kernel, entry_point
from .shared import number_declarations

__all__ = ["INCLUDE", "translate"]

INCLUDE = [NATIVE / "cuda"]

_HEADER = re.compile(r"__global__ void [^;{]*\{")
_STATIC_SHARED = re.compile(r"__shared__ (?:alignas|__align__)\((\d+)\) ([\w ]+?) (\w+)\[(\d+)\];")
_DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:(?:alignas|__align__)\(\d+\) )?([\w ]+?) (\w+)\[\];")
_TEXT = r'"(?:[^"\\]|\\.)*"'
_ASSEMBLY = re.compile(
    rf"\b(?:__asm__|asm)\s*(?:__volatile__|volatile)?\s*\(\s*((?:{_TEXT}\s*)+)((?::[^;]*?)?)\)\s*;", re.S
)
_OPERAND = re.compile(r'"[=+]?&?[a-z]"\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)')


def translate(text: str, kernels: Sequence[Kernel], *, strict: bool) -> dict[str, str]:
    """Sources of a library, by file name. Raises CompileError where the device does not know an instruction."""

    def static(found: re.Match, number: int) -> str:
        align, dtype, name, count = found.groups()
        memory = f'device_shared({number}, sizeof({dtype}[{count}]), {align}, "{name}")'
        return f"{dtype} *const {name} = reinterpret_cast<{dtype} *>({memory});"

    text = _DYNAMIC_SHARED.sub(r"\1 *const \2 = reinterpret_cast<\1 *>(device_dynamic_shared());", text)
    text = number_declarations(_STATIC_SHARED, _HEADER, text, static)
    if "__shared__" in text:
        raise CompileError(
            f"the software device does not understand this declaration: {_line_with('__shared__', text)}",
            stage="software_device",
        )
    text = _ASSEMBLY.sub(_instruction, text)
    entries = [
        entry_point(kernel, f"{kernel.name}({_arguments(kernel, text)})", strict=strict, masks=True)
        for kernel in kernels
    ]
    # The shims first; then the text, at its own lines; then the entry points, which have none.
    return {"kernels.cc": "\n".join(['#include "ptx.h"', '#line 1 "kernels"', text, ENTRY_POINT, *entries])}


def _arguments(kernel: Kernel, text: str) -> str:
    """The kernel's arguments, converted to the types that the text gives them."""
    found = re.search(rf"__global__ void (?:__launch_bounds__\([^)]*\) )?{kernel.name}\(([^)]*)\)", text)
    declared = [p for p in (found[1] if found else "").split(",") if p.strip()]
    if found is None or len(declared) != len(kernel.parameters):
        raise CompileError(f"the emitted text holds no kernel {kernel.name} of {len(kernel.parameters)} parameters")
    types = [re.sub(r"\w+\s*$", "", p.replace("__restrict__", "")).strip() for p in declared]
    return ", ".join(f"({t})frame.p{i}" for i, t in enumerate(types))


def _instruction(found: re.Match) -> str:
    """An assembly statement as a call of ptx_<mnemonic>, its operands in the order of the assembly."""
    assembly = "".join(t.encode().decode("unicode_escape") for t in re.findall(r'"((?:[^"\\]|\\.)*)"', found[1]))
    assembly = " ".join(assembly.split()).rstrip("; ")
    mnemonic, _, rest = assembly.partition(" ")
    name = "ptx_" + re.sub(r"[.:]+", "_", mnemonic)
    if ";" in assembly or name not in _known():
        raise CompileError(
            f"the software device does not know the PTX instruction {assembly!r}", stage="software_device"
        )
    operands = _OPERAND.findall(found[2] or "")
    words = [w.strip() for w in re.sub(r"[{}\[\]]", " ", rest).split(",") if w.strip()]
    given = [operands[int(w[1:])] if w.startswith("%") else w for w in words]
    return f"{name}({', '.join(given)});" + "\n" * found[0].count("\n")


@cache
def _known() -> frozenset[str]:
    """Names of the instructions that native/cuda/ptx.h defines."""
    header = (NATIVE / "cuda" / "ptx.h").read_text()
    names = set(re.findall(r"\b(ptx_\w+)\b", header))
    for macro, pattern in (("LOAD", "ptx_ldmatrix_sync_aligned_m8n8_x{}_"), ("LOADS", "ptx_ld_global_")):
        for suffix in re.findall(rf"(?m)^{macro}\((\w*)", header):
            if macro == "LOAD":
                names |= {pattern.format(n) + suffix for n in (1, 2, 4)}
            else:
                names |= {pattern + suffix + width for width in ("v4_b32", "v2_b32", "b32")}
    names |= {f"ptx_cp_async_{c}_shared_global" for c in re.findall(r"(?m)^COPY\((\w+)\)", header)}
    return frozenset(names)


def _line_with(word: str, text: str) -> str:
    return next(line.strip() for line in text.splitlines() if word in line)
