"""Scales for a cache in 8-bit floats, as some quantized checkpoints have them: one for keys, one for values a layer.

They are read and not used. Such a scale was measured on some text after training, for kernels whose cache has no room
for scales; nothing in the weights depends on it. A cache here has a scale for each token and head, with which the
largest number of a vector is always the largest that a code can say: a fixed one can only cut off what is larger than
the text that it was measured on had, or leave small vectors to the few codes next to zero. What it would save are the
scales themselves, 4 bytes a vector.
"""

import re

from llmc.frontend.quantized.source import Source
from llmc.ir.errors import SourceError

# vLLM's names (k_scale), those of compressed-tensors (k_proj.output_scale) and of ModelOpt (k_proj.k_scale).
_NAMES = re.compile(r"^(?P<layer>.*?)\.(?:[kv]_proj\.)?(?P<which>[kv])(?:_proj\.output)?_scale$")
_OTHERS = re.compile(r"\.(q_scale|prob_scale|[kv]_zero_point|[kv]_proj\.output_zero_point)$")


def take(source: Source) -> dict[str, dict[str, float]]:
    """Take these scales out of a checkpoint: attention module -> {"k": scale, "v": scale}."""
    found: dict[str, dict[str, float]] = {}
    for name in list(source.tensors):
        match = _NAMES.match(name)
        if match:
            scale = source.take(name)
            if scale.numel() != 1:
                raise SourceError(f"{name}: expected one scale for a layer, found shape {list(scale.shape)}")
            found.setdefault(match["layer"], {})[match["which"]] = float(scale.read().reshape(()))
        elif _OTHERS.search(name):
            source.take(name)
    if found:
        source.note(
            f"the checkpoint's scales for a cache in 8-bit floats ({len(found)} layers) are in the manifest and not "
            "used: a quantized cache scales every token by itself"
        )
    return found
