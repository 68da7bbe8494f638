"""What a kernel did that has no meaning on a device, in words."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DeviceFault", "Fault", "Source", "describe"]


class DeviceFault(Exception):
    """A kernel did what has no meaning on a device, or what its result may not depend on.

    fault: "bounds", "uninitialised", "race", "barrier", "shuffle", "alignment", "copy" (memory touched that an
    asynchronous copy has not been waited for), "binding", "launch", "lanes", "index", "unsupported", "crash" or "time".
    kernel: its name. line: of the emitted text, from 1; 0 where none is known. text: that line.
    block, thread: (x, y, z) of the lane that was caught.
    """

    def __init__(self, message, fault="", kernel="", line=0, text="", block=(0, 0, 0), thread=(0, 0, 0)):
        super().__init__(message)
        self.fault, self.kernel, self.line, self.text = fault, kernel, line, text
        self.block, self.thread = tuple(block), tuple(thread)

    def __reduce__(self):
        return DeviceFault, (self.args[0], self.fault, self.kernel, self.line, self.text, self.block, self.thread)


@dataclass(frozen=True)
class Source:
    """The emitted text of a kernel's module, and the line of a place in its library."""

    text: str
    line_of: Callable[[int], int]

    def line(self, number: int) -> str:
        lines = self.text.splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""


class _Size(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __iter__(self):
        return iter((self.x, self.y, self.z))

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class Fault(ctypes.Structure):
    """`Fault` of native/state.h."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("kind", "access", "other_access", "lines")],
        *[(name, ctypes.c_uint64) for name in ("place", "other_place")],
        *[(name, _Size) for name in ("block", "thread", "other_block", "other_thread")],
        *[(name, ctypes.c_int64) for name in ("offset", "bytes", "size")],
        *[(name, ctypes.c_char_p) for name in ("kernel", "memory", "detail")],
    ]


# As `FaultKind` and `AccessKind` in native/state.h number them.
_KINDS = (
    *("", "bounds", "uninitialised", "race", "barrier", "shuffle", "alignment", "copy", "binding", "launch"),
    *("lanes", "index", "unsupported"),
)
_ACCESSES = ("reads", "writes", "changes", "has a copy under way to")
_EARLIER = ("read", "wrote", "changed", "started a copy to")


def describe(fault: Fault, source: Source | None) -> DeviceFault:
    """The exception of a fault that the machine has recorded."""
    kind = _KINDS[fault.kind]
    kernel = _text(fault.kernel) or "?"
    line = _line(fault.place, fault, source)
    said = source.line(line) if source else ""
    other = f"thread {fault.other_thread} of block {fault.other_block}"
    other_line = _line(fault.other_place, fault, source)
    if other_line:
        other += f" at line {other_line} ({source.line(other_line) if source else ''})"
    what = _WORDS[kind](fault, other)
    where = f"line {line}: {said}" if line else "its launch"
    who = f"block {fault.block}, thread {fault.thread}"
    message = f"{kind}: kernel {kernel}, {who}, {where}\n{what}"
    return DeviceFault(message, kind, kernel, line, said, tuple(fault.block), tuple(fault.thread))


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if value else ""


def _line(place: int, fault: Fault, source: Source | None) -> int:
    if not place or source is None:
        return 0
    return place if fault.lines else source.line_of(place)


def _memory(fault: Fault) -> str:
    return f"{fault.bytes} bytes at offset {fault.offset} of {_text(fault.memory) or 'memory'} ({fault.size} bytes)"


def _bounds(f: Fault, _) -> str:
    if not f.memory:
        address = f.offset & (1 << 64) - 1
        return f"it {_ACCESSES[f.access]} {f.bytes} bytes at {address:#x}, which is no argument of this launch"
    return f"it {_ACCESSES[f.access]} {_memory(f)}: out of bounds"


def _race(f: Fault, other: str) -> str:
    return (
        f"it {_ACCESSES[f.access]} {_memory(f)}, which {other} {_EARLIER[f.other_access]}; no barrier that both pass "
        f"stands between (blocks of one launch are never ordered)"
    )


def _barrier(f: Fault, other: str) -> str:
    return f"it waits at a barrier that {other} does not reach: that thread {_text(f.detail)}"


def _lanes(f: Fault, other: str) -> str:
    if f.detail:
        return _text(f.detail)
    return f"it waits for other threads of its warp, and {other} does not take part"


_WORDS: dict[str, Callable[[Fault, str], str]] = {
    "bounds": _bounds,
    "uninitialised": lambda f, _: f"it {_ACCESSES[f.access]} {_memory(f)}, which nothing has written",
    "race": _race,
    "barrier": _barrier,
    "shuffle": lambda f, _: f"it takes the value of lane {f.offset} of its warp, which does not take part",
    "alignment": lambda f, _: (
        f"it {_ACCESSES[f.access]} {_memory(f)}, which is not aligned to the access's size"
        if f.memory
        else f"it uses the address {f.offset & (1 << 64) - 1:#x}, which is not aligned to its type"
    ),
    "copy": lambda f, other: (
        f"it {_ACCESSES[f.access]} {_memory(f)} while an asynchronous copy to it is under way, which {other} started "
        f"and has not waited for"
    ),
    "binding": lambda f, _: f"argument {_text(f.memory)}: {_text(f.detail)}",
    "launch": lambda f, _: (
        f"a grid of {f.block} blocks of {f.thread} threads: expected at least one of each, at most 1024 threads a "
        f"block, and at most 65535 blocks along y and z"
    ),
    "lanes": _lanes,
    "index": lambda f, _: f"index {f.offset} lies outside an array of registers or shared memory",
    "unsupported": lambda f, _: _text(f.detail),
}
