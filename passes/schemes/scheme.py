"""What a quantization scheme is: how one weight is encoded, and the facts that the program and its kernels need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ir.quantized import Format

__all__ = ["GROUPS", "Options", "Scheme", "group_for"]

GROUPS = (128, 64, 32, 16)  # sizes of groups that kernels know


@dataclass(frozen=True)
class Options:
    """What may follow a scheme's name: -g64 (group), -zp (zero points), -a8 (activations in 8 bits)."""

    group: int | None = None
    zeros: bool = False
    activation: bool = False


@dataclass(frozen=True)
class Scheme:
    """One way to store a weight. A subclass says how: `format` and `encode`; decoding is `ir.quantized.dequantize`.

    name        as `parse` takes it
    activation  None: products take activations as they are; else the group of `round_activation` (0: a whole token)
    ordered     the weight's inputs are taken in an order of its own, a parameter NAME:order int32 [depth]
    scaled      the weight's inputs are multiplied by the parameter SCALED:inverse_scale float32 [depth], which weights
                that read one activation share: SCALED is the first of them; "": as they are
    """

    name: str
    activation: int | None = None
    ordered: bool = False
    scaled: str = ""

    def format(self, depth: int) -> Format:
        """The format of weights with rows of `depth`. ValueError where such rows can't be stored."""
        raise NotImplementedError

    def rounding(self, depth: int) -> int | None:
        """The group of `round_activation` for products with rows of `depth`: the weight's own where groups round."""
        return self.format(depth).group if self.activation else self.activation

    def encode(self, rows: np.ndarray, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The parts of rows [r, depth] float32, in the format's order.

        importance: [depth] or [r, depth], what a squared error of each weight counts; None: all the same.
        """
        raise NotImplementedError


def group_for(depth: int, wanted: int) -> int:
    """The group that rows of `depth` get where `wanted` is asked: itself, or the largest smaller one of GROUPS that
    fills a row; 0 (a whole row) where none does."""
    return next((g for g in (wanted, *GROUPS) if g and g <= wanted and depth % g == 0), 0)


def stored(scales: np.ndarray, dtype: str) -> Any:
    """Scales as they will be read: rounded to their dtype, none beyond its range; 1 where all weights are zeros."""
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    info = ml_dtypes.finfo(kind)
    least, most = float(info.smallest_normal if dtype == "float32" else info.smallest_subnormal), float(info.max)
    size = np.where(scales == 0, 1, np.clip(np.abs(scales), least, most))
    return np.where(scales < 0, -size, size).astype(kind)
