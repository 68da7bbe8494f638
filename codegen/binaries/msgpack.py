"""Reads MessagePack, in which code objects of AMD describe their kernels.

Sources: the MessagePack specification; LLVM, "User Guide for AMDGPU Backend", section "Code Object Metadata".
"""

from __future__ import annotations

import struct
from typing import Any

_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_COUNTS = {0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def unpack(data: bytes) -> Any:
    """The value that stands at the beginning of `data`. ValueError: a type that metadata doesn't use."""
    return _value(data, 0)[0]


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """-> the value at `at`, and where it ends."""
    tag, at = data[at], at + 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag < 0x90:
        return _map(data, at, tag & 15)
    if tag < 0xA0:
        return _list(data, at, tag & 15)
    if tag < 0xC0:
        return _text(data, at, tag & 31)
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    form = _NUMBERS.get(tag) or _LENGTHS.get(tag) or _COUNTS.get(tag)
    if form is None:
        raise ValueError(f"MessagePack: unexpected type 0x{tag:02x} at byte {at - 1}")
    number, at = struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if tag in _NUMBERS:
        return number, at
    if tag in _LENGTHS:
        return _text(data, at, number) if tag >= 0xD9 else (data[at : at + number], at + number)
    return _list(data, at, number) if tag in (0xDC, 0xDD) else _map(data, at, number)


def _text(data: bytes, at: int, size: int) -> tuple[str, int]:
    return data[at : at + size].decode(), at + size


def _list(data: bytes, at: int, count: int) -> tuple[list, int]:
    values = []
    for _ in range(count):
        value, at = _value(data, at)
        values.append(value)
    return values, at


def _map(data: bytes, at: int, count: int) -> tuple[dict, int]:
    pairs, at = _list(data, at, 2 * count)
    return dict(zip(pairs[::2], pairs[1::2], strict=True)), at
