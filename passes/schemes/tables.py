"""Weights as entries of a table: the scale of every group is searched for the least squared error.

As of integers (rounding.py): with the codes that a tried scale gives, the best scale is s = Σwv / Σv², v being the
codes' values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from llmc.ir.quantized import TABLES, Format

from .rounding import BLOCK, Best, as_groups, empty_parts
from .scheme import Scheme, group_for, stored

__all__ = ["Table"]


@dataclass(frozen=True)
class Table(Scheme):
    """Codes of a table in groups.

    shares: the scales that are tried, as shares of the one with which the largest weight is the table's largest value.
    only: the one size that groups may have, which must divide rows; 0: any of GROUPS, as it fits.
    """

    table: str = "nf4"
    group: int = 0
    scale: str = "float16"
    shares: tuple[float, ...] = (1.0,)
    only: int = 0

    def format(self, depth):
        if self.only and depth % self.only:
            raise ValueError(f"{self.table} has groups of {self.only}, which do not fill rows of {depth}")
        bits = (len(TABLES[self.table]) - 1).bit_length()
        return Format(bits, self.only or group_for(depth, self.group), self.scale, table=self.table)

    def encode(self, rows, importance=None):
        format = self.format(rows.shape[1])
        values, _, _ = _sorted(self.table)
        most = np.float32(max(abs(values[0]), abs(values[-1])))
        parts = empty_parts(format, rows.shape)
        step = max(1, BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            block = np.ascontiguousarray(rows[start : start + step], np.float32)
            groups = block.reshape(-1, format.group or rows.shape[1])
            weights = None if importance is None else as_groups(importance, start, block.shape, groups.shape)
            largest = np.abs(groups).max(1)
            if format.scale == "e8m0":
                scales, numbers = self._powers(groups, largest, weights)
            else:
                scales = numbers = self._scales(groups, largest / most, weights, format)
            codes = self._codes(groups, numbers.astype(np.float32))
            parts["codes"][start : start + step] = codes.reshape(block.shape)
            parts["scales"][start : start + step] = scales.reshape(len(block), -1)
        return parts

    def _scales(self, w, whole, weights, format):
        """The scale of each group, as it is stored."""
        if self.shares == (1.0,):
            return stored(whole, format.scale)
        best = Best(w, weights)
        values, _, _ = _sorted(self.table)
        for share in self.shares:
            best.offer(values[self._places(w, whole * np.float32(share))])
        return stored(best.scale, format.scale)

    def _powers(self, w, largest, weights):
        """Scales that are powers of two: the one by which the largest weight has the exponent of the table's largest
        value (OCP Microscaling Formats v1.0, 6.3), or the next, where that has the smaller error. -> bytes, numbers."""
        values, _, _ = _sorted(self.table)
        top = int(np.floor(np.log2(np.abs(values).max())))
        exponent = np.floor(np.log2(np.where(largest > 0, largest, np.float32(1)))) - top
        tried = [np.exp2(np.clip(exponent + e, -127, 127)).astype(np.float32) for e in (0, 1)]
        errors = []
        for scale in tried:
            error = values[self._places(w, scale)] * scale[:, None] - w
            errors.append(np.einsum("gk,gk->g", error, error if weights is None else error * weights))
        numbers = np.where(errors[1] < errors[0], tried[1], tried[0])
        return (np.log2(numbers) + 127).astype(np.uint8), numbers

    def _places(self, w: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Where in the sorted table the value nearest to each weight stands."""
        _, _, borders = _sorted(self.table)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        x = w * inverse[:, None]
        if len(borders) > 16:
            return np.searchsorted(borders, x.ravel()).reshape(w.shape)
        # Every cell of a grid holds one border at most: what stands before the cell, and perhaps that one.
        low, cells, before = _grid(self.table)
        cell = np.clip((x - low) * np.float32(cells), 0, len(before) - 1).astype(np.int32)
        place = before[cell]
        return place + (x > np.append(borders, np.float32(np.inf))[place])

    def _codes(self, w: np.ndarray, scales: np.ndarray) -> np.ndarray:
        _, codes, _ = _sorted(self.table)
        return codes[self._places(w, scales)]


@cache
def _grid(table: str) -> tuple[np.float32, int, np.ndarray]:
    """(where the first cell begins, cells per 1, borders before each cell): cells narrower than any two borders."""
    _, _, borders = _sorted(table)
    cells = int(np.ceil(2 / np.diff(borders).min()))
    low = np.float32(borders[0] - 1 / cells)
    starts = low + np.arange(int((borders[-1] - low) * cells) + 2, dtype=np.float32) / np.float32(cells)
    # Half a cell earlier: a number that rounding put into the next cell is still compared with the right border.
    return low, cells, np.searchsorted(borders, starts - np.float32(0.25 / cells))


@cache
def _sorted(table: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A table's numbers in rising order, each one's code (of two zeros the positive one's), and the borders between."""
    values = np.asarray(TABLES[table], np.float32)
    numbers, codes = np.unique(values, return_index=True)  # the first of equals; NaN last
    numbers, codes = numbers[~np.isnan(numbers)], codes[~np.isnan(numbers)]
    return numbers, codes.astype(np.uint8), (numbers[1:] + numbers[:-1]) / 2
