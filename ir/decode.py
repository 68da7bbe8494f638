"""What `ir.quantized.dequantize` says, in numpy: for those who read weights in few bits without a program."""

import ml_dtypes
import numpy as np

from llmc.ir.quantized import TABLES, Format

__all__ = ["decode"]


def decode(format: Format, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """The weights [..., o, i] float32 of parts in memory: what `ir.quantized.dequantize` says, in numpy."""

    group = format.group or codes.shape[-1]

    def by_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(*codes.shape[:-1], -1, group)

    if format.table:
        numbers = np.asarray(TABLES[format.table], np.float32)[codes]
    else:
        numbers = codes.astype(np.float32)
        by_group(numbers)[...] -= np.float32(format.offset) if zeros is None else zeros[..., None].astype(np.float32)
    if format.scale == "e8m0":
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    by_group(numbers)[...] *= scales[..., None].astype(np.float32)
    return numbers
