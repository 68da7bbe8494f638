"""Reads ELF files: shared libraries, NVIDIA's cubins and AMD's code objects (64-bit, little-endian).

Source: System V ABI, "Object Files" (gABI), for sections, symbols, notes and dynamic entries.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from llmc.ir.errors import CompileError

# e_machine of the files that are made here.
MACHINES = {62: "x86_64", 183: "aarch64", 190: "cuda", 224: "amdgpu"}
_SYMTAB, _DYNAMIC, _NOTE, _NOBITS, _DYNSYM = 2, 6, 7, 8, 11


class Section(NamedTuple):
    """flags and info as the file has them; size in bytes."""

    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    entry: int


class Symbol(NamedTuple):
    """A name, where it stands (section index, 0 is undefined), its address and size in bytes."""

    name: str
    section: int
    value: int
    size: int
    kind: int


class Elf:
    """An ELF file in memory. Raises CompileError where it is none, or of another kind."""

    def __init__(self, data: bytes, what: str = "file"):
        if data[:6] != b"\x7fELF\x02\x01":
            raise CompileError(f"{what}: expected a 64-bit little-endian ELF file, found {data[:6]!r}", stage="library")
        self.data = data
        self.machine_number, self.flags = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<I", data, 48)[0]
        table, entry, count, names = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
        raw = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry) for i in range(count)]
        strings = raw[names][4] if raw else 0
        self.sections = [
            Section(self._text(strings + name), kind, flags, address, offset, size, link, info, each)
            for name, kind, flags, address, offset, size, link, info, _, each in raw
        ]

    @property
    def machine(self) -> str:
        """ "x86_64" | "aarch64" | "cuda" | "amdgpu", or the number in the header."""
        return MACHINES.get(self.machine_number, str(self.machine_number))

    def bytes_of(self, section: Section) -> bytes:
        return b"" if section.kind == _NOBITS else self.data[section.offset : section.offset + section.size]

    def symbols(self, *, dynamic: bool = False) -> list[Symbol]:
        """The symbols of the file, or those that the loader sees."""
        found = []
        for section in self.sections:
            if section.kind == (_DYNSYM if dynamic else _SYMTAB):
                strings = self.sections[section.link].offset
                for at in range(section.offset, section.offset + section.size, 24):
                    name, info, _, where, value, size = struct.unpack_from("<IBBHQQ", self.data, at)
                    found.append(Symbol(self._text(strings + name), where, value, size, info & 15))
        return found

    def undefined(self) -> list[str]:
        """Names that the loader must find elsewhere."""
        return sorted(s.name for s in self.symbols(dynamic=True) if s.section == 0 and s.name)

    def code(self, symbol: Symbol) -> bytes:
        """The machine code of a function."""
        section = self.sections[symbol.section]
        start = section.offset + symbol.value - section.address
        return self.data[start : start + symbol.size]

    def needed(self) -> list[str]:
        """Libraries that the loader opens with this one."""
        found = []
        for section in self.sections:
            if section.kind == _DYNAMIC:
                strings = self.sections[section.link].offset
                for at in range(section.offset, section.offset + section.size, 16):
                    tag, value = struct.unpack_from("<QQ", self.data, at)
                    if tag == 1:  # DT_NEEDED
                        found.append(self._text(strings + value))
        return found

    def notes(self) -> list[tuple[str, int, bytes]]:
        """(owner, type, content) of every note."""
        found = []
        for section in self.sections:
            at, end = section.offset, section.offset + section.size
            while section.kind == _NOTE and at + 12 <= end:
                name, size, kind = struct.unpack_from("<III", self.data, at)
                content = at + 12 + -(-name // 4) * 4
                found.append((self._text(at + 12), kind, self.data[content : content + size]))
                at = content + -(-size // 4) * 4
        return found

    def _text(self, at: int) -> str:
        return self.data[at : self.data.index(b"\0", at)].decode("utf-8", "replace")
