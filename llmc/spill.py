"""Encoded weights in files beside an artifact in the making: made once, read often, and still there when a compilation
that was interrupted goes on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from llmc.ir.driver import numpy_dtype

__all__ = ["Spill"]

Kinds = Mapping[str, tuple[tuple[int, ...], str]]  # part -> (shape, dtype), see ir.quantized.Format.parts


class Spill:
    """A folder with a file for each weight, its parts one after the other, and small facts in JSON.

    A file has its name once it is complete: what is found is whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, kinds: Kinds) -> dict[str, np.ndarray] | None:
        """The parts of a weight, mapped from its file; None if there is none yet."""
        path = self.folder / quote(name, safe="")
        return mapped(path, kinds) if path.is_file() else None

    def write(self, name: str, kinds: Kinds, pieces: Iterator[tuple[str, int, np.ndarray]]) -> dict[str, np.ndarray]:
        """Write a weight, and return its parts as `find` does. A piece: its part, its first row, its rows."""
        path = self.folder / quote(name, safe="")
        partial = path.with_name(path.name + ".partial")
        starts, at = {}, 0
        for part, (shape, dtype) in kinds.items():
            starts[part] = at
            at += math.prod(shape) * numpy_dtype(dtype).itemsize
        with open(partial, "wb") as file:
            for part, row, rows in pieces:
                (_, *one), _ = kinds[part]
                file.seek(starts[part] + row * math.prod(one) * rows.itemsize)
                file.write(np.ascontiguousarray(rows).view(np.uint8).data)
        partial.rename(path)
        return mapped(path, kinds)

    def once(self, fact: str, make: Callable[[], Any]) -> Any:
        """A fact that JSON can hold, made if it is not there yet."""
        path = self.folder / f"{quote(fact, safe='')}.json"
        if path.is_file():
            return json.loads(path.read_text())
        made = make()
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(made))
        partial.rename(path)
        return made

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def mapped(path: Path, kinds: Kinds) -> dict[str, np.ndarray]:
    parts: dict[str, np.ndarray] = {}
    at = 0
    for part, (shape, dtype) in kinds.items():
        parts[part] = np.memmap(path, numpy_dtype(dtype), "r", at, shape)
        at += parts[part].nbytes
    return parts
