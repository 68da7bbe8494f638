"""LLMC_DEBUG: how much the pipeline says of itself on stderr."""

import os
import sys

__all__ = ["debug_level", "log"]


def debug_level() -> int:
    """LLMC_DEBUG as a number: 1 stages with their times, 2 also passes, 3 also the diff of every pass, 4 also the
    kernels; 0 where it is unset or no number."""
    value = os.environ.get("LLMC_DEBUG", "")
    return int(value) if value.isdigit() else 0


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
