"""Scales as checkpoints have them (of tensors, rows, groups of a row, blocks), as scales of groups of a row."""

from collections.abc import Sequence

import numpy as np

from llmc.frontend.quantized import packing
from llmc.frontend.quantized.tensor import Computed, regroup
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError

FLOATS = ("float16", "bfloat16", "float32")


def of_groups(
    name: str, scales: LazyTensor, shape: Sequence[int], block: Sequence[int] | None = None
) -> tuple[LazyTensor, int, str]:
    """(scales [..., o, groups], group, the format's name for their dtype) of a weight [..., o, i].

    name: of the scales. scales: one number, or [..., o], [..., o, 1], [..., o, i / g]; with block = (r, c) one number
    for every block of r rows and c columns, [..., o / r, i / c] rounded up. float16, bfloat16, float32, or powers of
    two as uint8 or float8_e8m0fnu.
    """
    if scales.dtype in ("uint8", "float8_e8m0fnu"):
        scales, kind = packing.as_bytes(scales), "e8m0"
    elif scales.dtype in FLOATS:
        kind = scales.dtype
    else:
        raise SourceError(f"{name}: expected scales in {', '.join(FLOATS)} or powers of two, found {scales.dtype}")
    *leading, columns, depth = shape
    if scales.numel() == 1 and len(shape) == 2:
        one = scales.reshape(1, 1)
        return Computed((columns, 1), scales.dtype, lambda low, high: np.repeat(one.read(), high - low, 0)), 0, kind
    if block is not None:
        rows, width = block
        expected = (*leading, -(-columns // rows), -(-depth // width))
        if scales.shape != expected:
            raise SourceError(f"{name}: expected shape {list(expected)}, found {list(scales.shape)}")
        return *regroup(_every_row(scales, columns, rows), width, depth), kind
    if scales.shape == (*leading, columns):
        scales = scales.reshape(*leading, columns, 1)
    if scales.shape[:-1] != (*leading, columns) or depth % scales.shape[-1]:
        raise SourceError(
            f"{name}: expected scales of rows, or of groups of them, of a weight {list(shape)}, found shape "
            f"{list(scales.shape)}"
        )
    return *regroup(scales, depth // scales.shape[-1], depth), kind


def _every_row(scales: LazyTensor, columns: int, rows: int) -> LazyTensor:
    """Scales [..., o, b] of scales [..., o / rows, b]."""
    shape = (*scales.shape[:-2], columns, scales.shape[-1])

    def read(start: int, stop: int) -> np.ndarray:
        if len(shape) > 2:
            return np.repeat(scales.read(start, stop), rows, axis=-2)[..., :columns, :]
        first = start // rows
        spread = np.repeat(scales.read(first, -(-stop // rows)), rows, axis=0)
        return spread[start - first * rows : stop - first * rows]

    return Computed(shape, scales.dtype, read)
