"""Executors: one file a kind of machine, and which of them an artifact's target needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..artifact import Manifest, StateGroup, TargetEntry
from ..errors import RequestError
from ..executor import Executor, page_bytes

__all__ = ["open_executor"]

MOST_PAGES = (1 << 31) - 1  # their numbers are int32


def open_executor(
    folder: Path,
    manifest: Manifest,
    target: TargetEntry,
    *,
    cache_tokens: int | None = None,
    device: int = 0,
    batch_invariant: bool = False,
) -> Executor:
    """An artifact's target, ready to run, with a cache of so many tokens.

    cache_tokens None: on a CPU the cache grows on demand, up to half of the free memory; on a GPU it takes what is left
    of 90% of the free memory. device: which of the machine's GPUs. batch_invariant: a sequence's numbers are the same
    bits whatever else is in the step, as they are on a CPU anyway. Raises ArtifactError: damaged, not for this machine,
    too large for the device's memory; RequestError: a device that there is not, or no invariant functions.
    """
    if target.kind != "cpu":
        from .gpu import GpuExecutor

        return GpuExecutor(folder, manifest, target, cache_tokens=cache_tokens, device=device,
                           batch_invariant=batch_invariant)  # fmt: skip
    from .cpu import CpuExecutor, available_bytes

    if device != 0:
        raise RequestError(f"device: the target {target.target} has device 0 only, found {device!r}")
    if cache_tokens is None:
        cache_tokens = int(available_bytes() / 2 / token_bytes(target.state))
    return CpuExecutor(folder, manifest, target, pages_of(target.state, cache_tokens))


def token_bytes(groups: Sequence[StateGroup]) -> float:
    """Bytes of cache that a token takes, over all groups."""
    return sum(page_bytes(g) / g.page_size for g in groups)


def pages_of(groups: Sequence[StateGroup], cache_tokens: int) -> list[int]:
    """Pages of each group, the scratch page included."""
    return [min(-(-cache_tokens // g.page_size) + 1, MOST_PAGES) for g in groups]
