"""How weights lie: panels of output columns, one vector lane to a column.

A weight [columns, depth] becomes [panels][depth][vectors][lanes]; bfloat16, [panels][depth/2][vectors][lanes][2], pairs
of consecutive k in one 32-bit lane. Columns and depth are padded with zeros. With `halves` (a gated activation: the
first half of the columns are gates, the second half what they gate) a panel holds gates and then their partners.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from llmc.targets import CpuTarget

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Rows(Protocol):
    """A weight that is read in row slices."""

    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Panels:
    """The packed form of one weight [columns, depth]."""

    columns: int
    depth: int
    dtype: str
    lanes: int
    vectors: int
    halves: bool = False

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def pair(self) -> int:
        """Consecutive k that share a lane."""
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def steps(self) -> int:
        """Depth in lanes, padded so that 4 k (8 where a lane holds pairs) are always there."""
        return -(-self.depth // (4 * self.pair)) * 4

    @property
    def count(self) -> int:
        """Panels."""
        if self.halves:
            return -(-(self.columns // 2) // (self.width // 2))
        return -(-self.columns // self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.count, self.steps, self.vectors, self.lanes)
        return (*shape, 2) if self.pair == 2 else shape

    def column(self, panel: int, at: int) -> int | None:
        """The weight's row that stands at lane `at` of a panel, or None for padding."""
        if not self.halves:
            column = panel * self.width + at
            return column if column < self.columns else None
        half = self.width // 2
        column = panel * half + at % half
        return column + (at // half) * (self.columns // 2) if column < self.columns // 2 else None

    def pack(self, weight: Rows | np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write panels start … stop of the weight into out [stop - start, *shape[1:]], reading only their rows."""
        stop = self.count if stop is None else stop
        half = self.width // 2
        for panel in range(start, stop):
            rows = np.zeros((self.width, self.steps * self.pair), _NUMPY[self.dtype])
            if self.halves:
                first, last = panel * half, min((panel + 1) * half, self.columns // 2)
                parts = [(0, first, last), (half, first + self.columns // 2, last + self.columns // 2)]
            else:
                parts = [(0, panel * self.width, min((panel + 1) * self.width, self.columns))]
            for at, first, last in parts:
                read = weight[first:last] if isinstance(weight, np.ndarray) else weight.read(first, last)
                rows[at : at + last - first, : self.depth] = read
            lanes = rows.reshape(self.vectors, self.lanes, self.steps, self.pair).transpose(2, 0, 1, 3)
            out[panel - start] = lanes if self.pair == 2 else lanes[..., 0]

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The weight [columns, depth] again."""
        lanes = packed.reshape(self.count, self.steps, self.vectors * self.lanes, self.pair)
        rows = lanes.transpose(0, 2, 1, 3).reshape(self.count, self.width, -1)[..., : self.depth]
        if self.halves:
            half = self.width // 2
            ends = [rows[:, h * half : (h + 1) * half].reshape(-1, self.depth)[: self.columns // 2] for h in (0, 1)]
            return np.concatenate(ends)
        return rows.reshape(-1, self.depth)[: self.columns]


def panels(target: CpuTarget, columns: int, depth: int, dtype: str, *, halves: bool = False) -> Panels:
    """How a weight [columns, depth] of this dtype lies on this target."""
    vectors = {16: 2, 8: 2, 4: 4}[target.lanes]
    return Panels(columns, depth, dtype, target.lanes, vectors, halves)
