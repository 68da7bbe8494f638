"""A weight in few bits, as those who encode it with care hand it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.ir.decode import decode
from llmc.ir.quantized import Format

__all__ = ["Array", "Encoded"]


class Array:
    """An array, in memory or mapped, that is read as a checkpoint's tensors are."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, str(array.dtype)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.array[start:stop]


class Encoded:
    """A weight that is stored in parts, readable as the floats that these stand for.

    format      see ir.quantized.Format
    parts       tensors of codes, scales and (if the format has them) zeros, of a weight [..., o, i]
    activation  the group in which its products' activations are rounded to 8 bits; None: they are not
    turned      the parameter is [..., i, o]
    scaled      the weight that its inputs' factors are named after (see Scheme.scaled); "": they have none
    inverse_scale  these factors, float32 [i]
    shape       of the parameter; read(start, stop) gives float32 rows of it
    """

    def __init__(
        self,
        format: Format,
        parts: Mapping[str, Any],
        *,
        activation: int | None = None,
        turned: bool = False,
        scaled: str = "",
        inverse_scale: Any = None,
    ):
        self.format, self.parts, self.activation, self.turned = format, dict(parts), activation, turned
        self.dtype, self.order = "float32", None
        self.scaled, self.inverse_scale = scaled, inverse_scale
        *others, o, i = self.parts["codes"].shape
        self.shape = (*others, i, o) if turned else (*others, o, i)

    @classmethod
    def of(cls, format: Format, parts: Mapping[str, np.ndarray], **options: Any) -> Encoded:
        """From arrays."""
        return cls(format, {name: Array(part) for name, part in parts.items()}, **options)

    @property
    def nbytes(self) -> float:
        """What it takes where codes are packed, in bytes."""
        shape = self.parts["codes"].shape
        return float(np.prod(shape)) * self.format.bits_per_weight(shape[-1]) / 8

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = slice(None) if self.turned and len(self.shape) == 2 else slice(start, stop)
        first, last = rows.start or 0, self.parts["codes"].shape[0] if rows.stop is None else rows.stop
        weight = decode(self.format, *(part.read(first, last) for part in self.parts.values()))
        weight = weight if self.inverse_scale is None else weight * self.inverse_scale.read()
        if not self.turned:
            return weight
        weight = weight.swapaxes(-1, -2)
        return weight[start:stop] if weight.ndim == 2 else weight
