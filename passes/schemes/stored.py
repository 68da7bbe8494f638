"""Weights that are quantized already, by a checkpoint or a calibration: nothing is left to encode."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.quantized import Format

from .scheme import Scheme

__all__ = ["Stored"]


@dataclass(frozen=True)
class Stored(Scheme):
    """The format that is there."""

    stored: Format | None = None

    def format(self, depth):
        if self.stored is None:
            raise ValueError(f"expected a format, found none ({self.name})")
        self.stored.parts((1, depth))  # ValueError where groups do not fill a row
        return self.stored

    def encode(self, rows, importance=None):
        raise TypeError(f"{self.name}: these weights are encoded already: their parts are stored")
