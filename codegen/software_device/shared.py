"""Declarations of shared memory in a text, numbered kernel by kernel."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable

__all__ = ["number_declarations"]


def number_declarations(
    declaration: re.Pattern, header: re.Pattern, text: str, replace: Callable[[re.Match, int], str]
) -> str:
    """Replace every declaration, given its number among those of its kernel. header: where a kernel begins."""
    starts = [found.start() for found in header.finditer(text)]
    seen: Counter = Counter()

    def numbered(found: re.Match) -> str:
        kernel = bisect_right(starts, found.start())
        seen[kernel] += 1
        return replace(found, seen[kernel] - 1)

    return declaration.sub(numbered, text)
