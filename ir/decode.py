"""What `ir.quantized.dequantize` says, in numpy: for those who read weights in few bits without a program."""

import ml_dtypes
import numpy as np

from llmc.ir.quantized import TABLES, Format

__all__ = ["decode"]


def decode(format: Format, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """The weights [..., o, i] float32 of parts in memory: what `ir.quantized.dequantize` says, in numpy."""

    def per_weight(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, format.group, axis=-1) if format.group else x

    if format.table:
        numbers = np.asarray(TABLES[format.table], np.float32)[codes]
    else:
        numbers = codes.astype(np.float32)
        numbers -= np.float32(format.offset) if zeros is None else per_weight(zeros.astype(np.float32))
    if format.scale == "e8m0":
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return numbers * per_weight(scales.astype(np.float32))
