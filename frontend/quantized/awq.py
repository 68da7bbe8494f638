"""AWQ checkpoints, as AutoAWQ writes them: 4 bits with zero points.

A Linear [o, i] in groups of g inputs, weight[o, i] = (code - zero) * scale (AutoAWQ, modules/linear):
  version "gemm": qweight int32 [i, o / 8], qzeros int32 [i / g, o / 8], scales [i / g, o]. A word holds eight
    neighbouring outputs, the lowest bits first, in the order 0, 2, 4, 6, 1, 3, 5, 7.
  version "gemv": qweight int32 [o, i / 8], qzeros int32 [o, w], scales [o, 8 * w]. A word holds eight neighbouring
    inputs (or groups) in their own order; w is i / g / 8 rounded up, more for groups below 128, and what is beyond
    i / g groups is filler.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.frontend.quantized import packing
from llmc.frontend.quantized.source import INSTEAD, Source, group_of
from llmc.frontend.quantized.tensor import regroup
from llmc.ir.errors import SourceError
from llmc.ir.quantized import Format

# In the word the outputs lie in the order 0, 2, 4, 6, 1, 3, 5, 7: output j is found at _PLACES[j].
_PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
FLOATS = ("float16", "bfloat16", "float32")


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the weights of AWQ's modules into `source`."""
    bits = config.get("bits", config.get("w_bit"))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4:
        raise SourceError(f"awq: expected 4 bits, found {bits}: not supported{INSTEAD}")
    layouts = {"gemm": _gemm, "gemv": _gemv}
    if version not in layouts:
        raise SourceError(f"awq: expected the layout gemm or gemv, found {version}: not supported{INSTEAD}")
    for module in source.modules(".qweight"):
        layouts[version](source, module, config.get("group_size", config.get("q_group_size", 128)))


def _gemm(source: Source, module: str, size: int) -> None:
    words = source.take(f"{module}.qweight", (-1, -1), ("int32",))
    depth, columns = words.shape[0], words.shape[1] * 8
    block = group_of(module, size, depth)
    groups = -(-depth // block)
    scales = source.take(f"{module}.scales", (groups, columns), FLOATS)
    zeros = source.take(f"{module}.qzeros", (groups, words.shape[1]), ("int32",))
    codes, zeros = (packing.across(each, 4, columns, places=_PLACES) for each in (words, zeros))
    _put(source, module, codes, scales.transpose(0, 1), zeros, block)


def _gemv(source: Source, module: str, size: int) -> None:
    words = source.take(f"{module}.qweight", (-1, -1), ("int32",))
    columns, depth = words.shape[0], words.shape[1] * 8
    block = group_of(module, size, depth)
    groups = -(-depth // block)
    zeros = source.take(f"{module}.qzeros", (columns, -1), ("int32",))
    scales = source.take(f"{module}.scales", (columns, zeros.shape[1] * 8), FLOATS)
    if zeros.shape[1] * 8 < groups:
        raise SourceError(
            f"{module}.qzeros: expected zero points of {groups} groups, found room for {zeros.shape[1] * 8}"
        )
    codes, zeros = packing.along_rows(words, 4, depth), packing.along_rows(zeros, 4, groups)
    _put(source, module, codes, scales.narrow(1, 0, groups), zeros, block)


def _put(source: Source, module: str, codes, scales, zeros, block: int) -> None:
    depth = codes.shape[-1]
    scales, group = regroup(scales, block, depth)
    zeros, _ = regroup(zeros, block, depth)
    source.put(f"{module}.weight", Format(4, group, scales.dtype, zeros=True), [codes, scales, zeros])
