"""MXFP4 as gpt-oss ships it: the experts of a layer in 4-bit floats (E2M1), every 32 with a power of two.

  X_blocks  uint8 [e, o, i / 32, 16]   two codes a byte, the lower four bits first
  X_scales  uint8 [e, o, i / 32]       2 ** (byte - 127)
for a parameter X [e, i, o] (gpt_oss/torch/weights.py; OCP Microscaling Formats v1.0): the transpose of what is stored.
Gate and up are interleaved along o, as the model's own code expects them.
"""

from collections.abc import Mapping
from typing import Any

from llmc.frontend.quantized import packing
from llmc.frontend.quantized.source import Source
from llmc.ir.quantized import Format

FORMAT = Format(4, 32, "e8m0", table="e2m1")


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the experts' weights into `source`."""
    for name in source.modules("_blocks"):
        blocks = source.take(f"{name}_blocks", (-1, -1, -1, 16), ("uint8",))
        *rows, groups, _ = blocks.shape
        scales = source.take(f"{name}_scales", (*rows, groups), ("uint8",))
        codes = packing.along_rows(blocks.reshape(*rows, groups * 16), 4, groups * 32)
        source.put(name, FORMAT, [codes, scales], turned=True)
