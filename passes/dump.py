"""Write what each pass changed: the hook behind `--dump DIR`."""

from __future__ import annotations

from pathlib import Path

import tvm

from llmc.ir.text import diff
from llmc.passes.pipeline import Pass

__all__ = ["Dump"]


class Dump:
    """A hook for the pass manager: `03-page_attention.diff` in a folder, one file a pass that changed something."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, index: int, current: Pass, before: tvm.IRModule, after: tvm.IRModule) -> None:
        if after.same_as(before):
            return
        changes = diff(before, after, current.name)
        if changes:
            (self.folder / f"{index:02d}-{current.name}.diff").write_text(changes)
