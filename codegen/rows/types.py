"""Which tensors are row tensors, and what one token's part of them looks like."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax, tirx

__all__ = ["Row", "Unsupported", "row_of"]


class Unsupported(Exception):
    """An op that can't be said of one token alone: it is lowered as a whole."""


@dataclass(frozen=True)
class Row:
    """One token's part of a tensor: its shape with `times` in the place of times · n, which is axis `axis`.

    tokens: the symbolic dimension n; None for a tensor that is the same for all tokens, whose axis is None too.
    """

    shape: tuple[int, ...]
    dtype: str
    axis: int | None = None
    tokens: tirx.Var | None = None

    @property
    def size(self) -> int:
        size = 1
        for d in self.shape:
            size *= d
        return size

    @property
    def major(self) -> bool:
        """The tokens' parts lie one after the other."""
        return self.axis is None or all(d == 1 for d in self.shape[: self.axis])

    def from_right(self) -> int | None:
        """The token axis, counted from the last."""
        return None if self.axis is None else len(self.shape) - self.axis


def row_of(ty) -> Row | None:
    """The row of a tensor type; None where it has no known shape or more than one symbolic dimension."""
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return None
    shape, axis, tokens = [], None, None
    for i, d in enumerate(ty.shape):
        if isinstance(d, tirx.IntImm):
            shape.append(int(d))
            continue
        variable, times = _multiple(d)
        if axis is not None or variable is None:
            return None
        shape.append(times)
        axis, tokens = i, variable
    return Row(tuple(shape), str(ty.dtype), axis, tokens)


def _multiple(d) -> tuple[tirx.Var | None, int]:
    """n · c as (n, c)."""
    d = tvm.sym.Analyzer().simplify(d)
    if isinstance(d, tirx.Var):
        return d, 1
    if isinstance(d, tirx.Mul):
        for a, b in ((d.a, d.b), (d.b, d.a)):
            if isinstance(a, tirx.Var) and isinstance(b, tirx.IntImm):
                return a, int(b)
    return None, 0
