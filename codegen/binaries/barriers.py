"""Looks at AMD's machine code for barriers that don't wait.

What a wave wrote to shared memory must have arrived before it tells the others to go on.

Source: AMD's instruction set documents: s_waitcnt with lgkmcnt (CDNA, RDNA 3), s_wait_dscnt (RDNA 4) wait until at most
so many accesses to shared memory are under way; s_barrier, or s_barrier_signal on RDNA 4, is the barrier.
"""

from __future__ import annotations

import re

from llmc.ir.errors import CompileError

_LABEL = re.compile(r"^([\w.$]+):")
_BRANCH = re.compile(r"^s_c?branch\w*\s+(\S+)")
_WAIT = re.compile(r"^s_waitcnt\b.*lgkmcnt\(0\)|^s_wait_(dscnt|loadcnt_dscnt|storecnt_dscnt) (0x0|0)$|^s_waitcnt 0$")
_WRITE = re.compile(r"^ds_(write|store|add|min|max|and|or|xor|inc|dec|wrxchg|storexchg|cmpst|cmpstore)")
_END = re.compile(r"^s_(branch|endpgm|setpc)")


def check_barriers(assembly: str) -> None:
    """Raises CompileError naming the kernel where a barrier can be reached with a write to shared memory under way."""
    for name, lines in functions(assembly).items():
        line = unawaited(lines)
        if line is not None:
            raise CompileError(
                f"{name}: the barrier at instruction {line} does not wait for writes to shared memory: other waves "
                "could read old values; this is a fault of the compiler",
                stage="library",
            )


def functions(assembly: str) -> dict[str, list[str]]:
    """Function -> its labels and instructions, comments and directives taken away."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for raw in assembly.splitlines():
        line = raw.split(";")[0].strip()
        label = _LABEL.match(line)
        if label and not label[1].startswith(("BB", ".L")):
            lines = found.setdefault(label[1], [])
        elif label or (line and not line.startswith(".")):
            lines.append(line)
    return found


def count_barriers(lines: list[str]) -> int:
    """How many barriers stand in a function."""
    return sum(line.split()[0] in ("s_barrier", "s_barrier_signal") for line in lines)


def unawaited(lines: list[str]) -> int | None:
    """Index of a barrier that is reached on some path with a write under way, or None.

    Blocks are worked on until nothing changes: a write is under way at a block's beginning if it is at the end of one
    that leads there.
    """
    starts = sorted({0, *(i for i, line in enumerate(lines) if _LABEL.match(line)), *_after_branches(lines)})
    at = {_LABEL.match(lines[i])[1]: i for i in starts if i < len(lines) and _LABEL.match(lines[i])}  # type: ignore[index]
    ends = dict(zip(starts, [*starts[1:], len(lines)], strict=True))
    under_way = dict.fromkeys(starts, False)
    todo = list(starts)
    while todo:
        start = todo.pop()
        writing = under_way[start]
        for i in range(start, ends[start]):
            if _WRITE.match(lines[i]):
                writing = True
            elif _WAIT.match(lines[i]):
                writing = False
            elif lines[i].split()[0] in ("s_barrier", "s_barrier_signal") and writing:
                return i
        last = lines[ends[start] - 1] if ends[start] > start else ""
        branch = _BRANCH.match(last)
        following = [at[branch[1]]] if branch and branch[1] in at else []
        if not _END.match(last) and ends[start] in under_way:
            following.append(ends[start])
        for each in following:
            if writing and not under_way[each]:
                under_way[each] = True
                todo.append(each)
    return None


def _after_branches(lines: list[str]) -> list[int]:
    return [i + 1 for i, line in enumerate(lines[:-1]) if _BRANCH.match(line) or _END.match(line)]
