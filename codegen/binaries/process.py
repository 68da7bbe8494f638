"""Builds a GPU target's library in a process of its own.

Three reasons: building for CUDA needs a stand-in for the driver, which no other code may meet; LLVM ends the process it
runs in over some faults; and several targets are built side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import tvm

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget

from ..pipeline import Lowered
from . import cuda


def build(lowered: Lowered, target: GpuTarget, library: Path, sources: Path) -> dict:
    """Compile a module in the kernels form for a GPU: the library, and the zip of what it was made from.

    -> facts of memory (see `library.build`), and "kernels": kernel -> SHA-256 of its machine code or text.
    Raises CompileError, the process's own or one that tells how it ended.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-build-") as scratch:
        folder = Path(scratch)
        modules = {"module": lowered.module, "reference": lowered.reference}
        texts = {name: tvm.ir.save_json(module) for name, module in modules.items() if module is not None}
        for name, text in texts.items():
            (folder / f"{name}.json").write_text(text)
        request = {
            "target": asdict(target),
            "modules": {name: str(folder / f"{name}.json") for name in texts},
            "library": str(library.resolve()),
            "sources": str(sources.resolve()),
            "report": str(folder / "report.json"),
        }
        (folder / "request.json").write_text(json.dumps(request))
        environment = cuda.environment(folder) if target.kind == "cuda" else dict(os.environ)
        command = [sys.executable, "-m", "llmc.codegen.binaries.worker", str(folder / "request.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not (folder / "report.json").is_file():
            raise CompileError(
                f"building for {target.name} ended with exit code {done.returncode}: {done.stderr.strip()[-2000:]}",
                stage="library",
            )
        report = json.loads((folder / "report.json").read_text())
    if "error" in report:
        raise CompileError(report["error"], stage=report["stage"] or "library", op=report["op"])
    return report
