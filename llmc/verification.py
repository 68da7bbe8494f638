"""llmc.verify: an artifact's kernels for a GPU, executed on the software device and compared with the reference."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.ir.errors import CompileError
from llmc.runtime import artifact
from llmc.runtime.errors import ArtifactError

__all__ = ["Report", "verify"]

TIME_LIMIT = 4 * 3600  # seconds: kernels run a thread at a time


@dataclass(frozen=True)
class Report:
    """What was run and how far it came out from the reference. str() is a table of it.

    steps: of each step what it was, its tokens, its error and its seconds; errors are of the spread of the reference's
    logits (largest less smallest). bound: the largest error that is right. fault: what a kernel did wrong, "" if none.
    """

    artifact: str
    target: str
    dtype: str
    kernels: int
    bound: float
    steps: tuple[dict[str, Any], ...]
    fault: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault and bool(self.steps) and all(step["error"] <= self.bound for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, and "passed"; the error of numbers that are not finite is None, as JSON has it."""
        steps = [s | {"error": s["error"] if math.isfinite(s["error"]) else None} for s in self.steps]
        return {**asdict(self), "steps": steps, "passed": self.passed}

    def __str__(self) -> str:
        lines = [f"{self.artifact}: {self.target}, {self.dtype}, {self.kernels} kernels, software device, strict"]
        for step in self.steps:
            wrong = "" if step["error"] <= self.bound else f"   more than {self.bound:.1e}"
            lines.append(
                f"  {step['name']:30} {step['tokens']:4} tokens   error {step['error']:.1e} of the spread   "
                f"{step['seconds']:6.1f} s{wrong}"
            )
        if self.fault:
            lines.append(f"  fault: {self.fault}")
        lines.append("passed" if self.passed else "FAILED")
        return "\n".join(lines)


def verify(path: str | Path, target: str) -> Report:
    """Run every kernel of an artifact's GPU target on the software device, in steps of prefill, prefill beside decode,
    and decode, from copied pages too, and compare the logits with those of plain loops on this CPU. Once more with the
    functions for `batch_invariant`, if it has such: a sequence by itself must give the same bits as in the batch.

    path: the artifact; target: one of its targets ("cuda:sm_90", or "cuda" where it has one of that kind). The kernels
    are those of the artifact's src/ folder, from which its library was made. Any machine will do.

    Raises ArtifactError: not an artifact, damaged, no such target, a CPU's target (which needs no stand-in: load it);
    CompileError: the software device can't be built here, or does not know something that a kernel says; the artifact
    has no loops to compare with.
    """
    folder = Path(path)
    manifest = artifact.read(folder)
    entry = choose(manifest, target)
    artifact.check(folder, manifest)
    with tempfile.TemporaryDirectory(prefix="llmc-verify-") as scratch:
        answer = Path(scratch) / "report.json"
        # A process of its own: it takes the place of TVM's device, and a kernel may end it.
        command = [sys.executable, "-m", "llmc.verification_worker", str(folder), entry.target, entry.host, str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
        if not answer.is_file():
            raise CompileError(
                f"the software device ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}",
                stage="software_device",
            )
        found = json.loads(answer.read_text())
    if "error" in found:
        raise CompileError(found["error"], stage="software_device")
    return Report(
        artifact=manifest.name,
        target=entry.target,
        dtype=entry.dtype,
        kernels=len(entry.sources.kernels) if entry.sources else 0,
        bound=found["bound"],
        steps=tuple(found["steps"]),
        fault=found["fault"],
    )


def choose(manifest: artifact.Manifest, target: str) -> artifact.TargetEntry:
    """One of the artifact's GPU targets by its name or its kind. Raises ArtifactError."""
    named = [t for t in manifest.targets if target in (t.target, t.kind)]
    there = ", ".join(t.target for t in manifest.targets)
    if not named:
        raise ArtifactError(f"{manifest.name}: no target {target!r} in this artifact; it has: {there}")
    if len(named) > 1 and target not in (t.target for t in named):
        raise ArtifactError(f"{manifest.name}: {target!r} is several of its targets: name one of {there}")
    [entry, *_] = named
    if entry.sources is None:
        raise ArtifactError(
            f"{manifest.name}: {entry.target} is a CPU's: there is no device to stand in for; "
            "load it, or compile with --verify"
        )
    return entry
