"""The Metal shading language as TVM emits it, made C++ that runs on the software device. Lines stay where they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmc.ir.errors import CompileError

from .build import NATIVE
from .entry import ENTRY_POINT, Kernel, entry_point
from .shared import number_declarations

__all__ = ["INCLUDE", "translate"]

INCLUDE = [NATIVE / "metal"]

_HEADER = re.compile(r"(?m)^kernel void (\w+)\((.*?)\)\s*\{", re.S)
_SHARED = re.compile(r"(?m)^(\s*)threadgroup ([\w ]+?) (\w+)\[(\d+)\];")
_UNION = re.compile(r"union __TVMArgUnion \{.*?\};", re.S)
_VECTOR = r"(?:half|float|bool|char|uchar|short|ushort|int|uint|long|ulong)[234]"


def translate(text: str, kernels: Sequence[Kernel], *, strict: bool) -> dict[str, str]:
    """Sources of a library, by file name. Raises CompileError for a declaration that is not understood."""
    headers = {found[1]: found[2] for found in _HEADER.finditer(text)}
    structs = dict(re.findall(r"struct (\w+_args_t) \{(.*?)\};", text, re.S))
    entries = []
    for kernel in kernels:
        if kernel.name not in headers:
            message = f"the emitted text holds no kernel {kernel.name}"
            raise CompileError(message, stage="software_device")
        call = _call(kernel, headers[kernel.name], structs)
        entries.append(entry_point(kernel, call, strict=strict, masks=False, whole_buffers=True))
    text = _code(text)
    return {
        "kernels.cc": "\n".join(['#include "metal_stdlib"', '#line 1 "kernels"', text, _PLAIN, ENTRY_POINT, *entries])
    }


# The entry points are no Metal.
_PLAIN = "#undef kernel\n#undef device\n#undef constant\n#undef thread"


def _code(text: str) -> str:
    def static(found: re.Match, number: int) -> str:
        indent, dtype, name, count = found.groups()
        memory = f'device_shared({number}, sizeof({dtype}[{count}]), alignof({dtype}), "{name}")'
        return f"{indent}{dtype} *const {name} = reinterpret_cast<{dtype} *>({memory});"

    text = number_declarations(_SHARED, _HEADER, text, static)
    text = re.sub(r"\bthreadgroup (?=[\w ]+\*)", "", text)  # of pointers
    if re.search(r"\bthreadgroup\b(?!_)", text):
        line = next(line.strip() for line in text.splitlines() if re.search(r"\bthreadgroup\b(?!_)", line))
        raise CompileError(f"the software device does not understand this declaration: {line}", stage="software_device")
    text = re.sub(r"\[\[.*?\]\]", "", text, flags=re.S)
    # Every kernel brings the same union: one is enough.
    first = _UNION.search(text)
    if first:
        text = text[: first.end()] + _UNION.sub(lambda u: "\n" * u[0].count("\n"), text[first.end() :])
    text = re.sub(rf"\(\s*({_VECTOR})\s*\)(?=\s*[\w(])", r"metal_cast<\1>{}->*", text)
    return re.sub(rf"(?<![\w<])({_VECTOR})\(", r"metal_make<\1>(", text)


def _call(kernel: Kernel, header: str, structs: dict[str, str]) -> str:
    """Statements that call the kernel: buffers by their order, scalars in one structure, its block and thread."""
    tensors = iter(i for i, p in enumerate(kernel.parameters) if p.is_tensor)
    before, arguments = [], []
    for parameter in filter(None, (p.strip() for p in re.sub(r"\[\[(.*?)\]\]", r"@\1", header).split(","))):
        declared, _, attribute = parameter.partition("@")
        dtype, _, _ = declared.strip().rpartition(" ")
        if dtype.startswith("device "):
            arguments.append(f"({dtype.removeprefix('device ')})frame.p{next(tensors)}")
        elif dtype.startswith("constant "):
            struct = dtype.removeprefix("constant ").rstrip("& ")
            before.append(f"{struct} scalars{{}};")
            fields = re.findall(r"(\w+)(?:\[2\])?;", structs[struct])  # 32-bit integers are one half of a pair
            numbers = [i for i, p in enumerate(kernel.parameters) if not p.is_tensor]
            before += [
                f"__builtin_memcpy(&scalars.{field}, &frame.p{i}, sizeof frame.p{i});"
                for field, i in zip(fields, numbers, strict=True)
            ]
            arguments.append("scalars")
        else:
            of = "device_block" if attribute.strip().startswith("threadgroup_position") else "device_thread"
            axes = ", ".join(f"{of}({axis})" for axis in range(int(dtype[-1]) if dtype[-1].isdigit() else 1))
            arguments.append(f"{dtype}{{{axes}}}")
    return f"{' '.join(before)} {kernel.name}({', '.join(arguments)})"
