"""Lines of a library's places, from its debug information."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path

__all__ = ["line_of"]


def line_of(library: Path, place: int) -> int:
    """The line of the kernel's text that an offset in the library belongs to; 0 if none is known."""
    starts, lines = _table(library)
    index = bisect_right(starts, place) - 1
    return lines[index] if index >= 0 else 0


@cache
def _table(library: Path) -> tuple[list[int], list[int]]:
    from elftools.elf.elffile import ELFFile  # read when something went wrong, and only then

    rows: list[tuple[int, int]] = []
    with library.open("rb") as file:
        debug = ELFFile(file).get_dwarf_info()
        for unit in debug.iter_CUs():
            program = debug.line_program_for_CU(unit)
            for entry in program.get_entries() if program else ():
                state = entry.state
                if state is not None:
                    rows.append((state.address, 0 if state.end_sequence else state.line))
    rows.sort(key=lambda row: row[0])
    return [address for address, _ in rows], [line for _, line in rows]
