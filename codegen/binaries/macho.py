"""Reads Mach-O files: dynamic libraries for Macs with Apple's own processor.

Sources: Apple's open headers mach-o/loader.h (load commands, opcodes of bindings), and kern/cs_blobs.h of XNU (code
signatures). Numbers of a signature are big-endian, all others little-endian.
"""

from __future__ import annotations

import hashlib
import struct

from llmc.ir.errors import CompileError

_ARM64, _DYLIB = 0x0100000C, 6
_LOAD_DYLIB, _CODE_SIGNATURE, _DYLD_INFO, _BUILD_VERSION = 0xC, 0x1D, 0x22, 0x32
_SUPERBLOB, _CODE_DIRECTORY, _ADHOC, _SHA256 = 0xFADE0CC0, 0xFADE0C02, 0x2, 2


class MachO:
    """A dynamic library in memory. Raises CompileError where it is none, or not for arm64.

    minimum: the oldest macOS that loads it, as (major, minor). needed: libraries opened with it.
    bound: C name (without the underscore in front) -> number of the library that it is taken from, counted from 1; FLAT
    for those that are looked up among everything that is loaded.
    """

    FLAT = -2

    def __init__(self, data: bytes, what: str = "file"):
        magic, machine, _, kind, commands = struct.unpack_from("<IIIII", data, 0) if len(data) >= 32 else (0,) * 5
        if (magic, machine, kind) != (0xFEEDFACF, _ARM64, _DYLIB):
            raise CompileError(f"{what}: expected a Mach-O library for arm64, found {data[:16].hex()}", stage="library")
        self.data = data
        self.minimum: tuple[int, int] = (0, 0)
        self.needed: list[str] = []
        self.bound: dict[str, int] = {}
        self.signature: bytes | None = None
        at = 32
        for _ in range(commands):
            command, size = struct.unpack_from("<II", data, at)
            self._read(command & 0x7FFFFFFF, at)
            at += size

    def _read(self, command: int, at: int) -> None:
        """One load command."""
        data = self.data
        if command == _BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            self.minimum = (version >> 16, version >> 8 & 255)
        elif command == _LOAD_DYLIB:
            self.needed.append(self._text(at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == _CODE_SIGNATURE:
            start, size = struct.unpack_from("<II", data, at + 8)
            self.signature = data[start : start + size]
        elif command == _DYLD_INFO:
            _, _, bind, bind_size, _, _, lazy, lazy_size = struct.unpack_from("<8I", data, at + 8)
            self._bindings(bind, bind + bind_size)
            self._bindings(lazy, lazy + lazy_size)

    def _bindings(self, at: int, end: int) -> None:
        """What the loader is told to find, and where: a small program of opcodes with a number in their lower half."""
        library, name = 0, ""
        while at < end:
            opcode, number, at = self.data[at] & 0xF0, self.data[at] & 0x0F, at + 1
            if opcode == 0x10:  # library by a small number
                library = number
            elif opcode == 0x20:  # library by a large one
                library, at = self._number(at)
            elif opcode == 0x30:  # a special place, by a negative number
                library = number - 16 if number else 0
            elif opcode == 0x40:  # name
                name = self._text(at)
                at += len(name) + 1
            elif opcode in (0x60, 0x70, 0x80, 0xA0, 0xC0):  # addresses: addend, segment, distances
                _, at = self._number(at)
                if opcode == 0xC0:
                    _, at = self._number(at)
            if opcode in (0x90, 0xA0, 0xB0, 0xC0):  # bind
                self.bound[name.removeprefix("_")] = library

    def _number(self, at: int) -> tuple[int, int]:
        """A number of seven bits a byte, the lowest first; -> it, and where it ends."""
        value = shift = 0
        while True:
            byte, at = self.data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    def _text(self, at: int) -> str:
        return self.data[at : self.data.index(b"\0", at)].decode()

    def check_signature(self) -> None:
        """Raises CompileError unless the file bears an ad-hoc signature whose hashes are those of its pages.

        macOS refuses a library for arm64 that has none, and ends a process that touches a page of another hash.
        """
        directory = self._code_directory()
        (flags, hashes, _, _, pages, limit) = struct.unpack_from(">6I", directory, 12)
        size, kind, _, page = directory[36:40]
        if not flags & _ADHOC or kind != _SHA256:
            raise CompileError(
                f"code signature: expected an ad-hoc one of SHA-256, found flags {flags:#x}, hash {kind}",
                stage="library",
            )
        for i in range(pages):
            content = self.data[i << page : min((i + 1) << page, limit)]
            if hashlib.sha256(content).digest()[:size] != directory[hashes + i * size : hashes + (i + 1) * size]:
                raise CompileError(
                    f"code signature: page {i} was changed after it was signed; link the library again", stage="library"
                )

    def _code_directory(self) -> bytes:
        blob = self.signature
        if blob is None or struct.unpack_from(">I", blob)[0] != _SUPERBLOB:
            raise CompileError(
                "code signature: expected one, found none: macOS would refuse the library", stage="library"
            )
        for i in range(struct.unpack_from(">I", blob, 8)[0]):
            _, start = struct.unpack_from(">II", blob, 12 + 8 * i)
            magic, size = struct.unpack_from(">II", blob, start)
            if magic == _CODE_DIRECTORY:
                return blob[start : start + size]
        raise CompileError("code signature: expected a code directory, found none", stage="library")
