"""Checkpoints that are quantized already: the weights that their config describes, as they are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmc.frontend.quantized import awq, bitsandbytes, compressed_tensors, fp8, gptq, kv_scales, mxfp4
from llmc.frontend.quantized.source import INSTEAD, Source
from llmc.frontend.quantized.tensor import QuantizedTensor
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError

__all__ = ["METHODS", "QuantizedTensor", "joined_as_floats", "orient", "read", "take_config"]

METHODS: dict[str, Callable[[Mapping[str, Any], Source], None]] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": fp8.read,
    "mxfp4": mxfp4.read,
}


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by published name, quantized weights as QuantizedTensors under the names of plain ones.

    notes: what a user should know of how they are computed with. facts: JSON-able facts for the manifest,
    "quantized_by" and, if the checkpoint has them, "kv_scales": attention module -> {"k": scale, "v": scale}.
    """

    tensors: dict[str, LazyTensor]
    notes: list[str]
    facts: dict[str, Any]


def take_config(config) -> dict[str, Any] | None:
    """Take the quantization_config off a transformers config, so that a plain model is built from it.

    None for a model that is not quantized. SourceError for a method that is not known.
    """
    found: dict[str, Any] | None = None
    for each in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", "compression_config"):
            settings = each.__dict__.pop(key, None)
            if settings:
                found = found or (settings if isinstance(settings, dict) else settings.to_dict())
    if found is None:
        return None
    method = found.get("quant_method")
    if method not in METHODS:
        raise SourceError(
            f"expected a checkpoint quantized by {', '.join(sorted(METHODS))}; found one quantized by {method}: not "
            f"supported{INSTEAD}"
        )
    return found


def read(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], dtype: str) -> Checkpoint:
    """A quantized checkpoint, its weights ready to be asked for their parts.

    tensors: by published name. dtype: the dtype that quantized weights stand for. Weights that the checkpoint keeps in
    floats stay as they are. SourceError names what is missing, misshapen or not supported.
    """
    source, method = Source(tensors, dtype), config["quant_method"]
    scales = kv_scales.take(source)
    METHODS[method](config, source)
    facts = {"quantized_by": method} | ({"kv_scales": scales} if scales else {})
    return Checkpoint(source.tensors, list(source.notes), facts)


def orient(model: nn.Module, weights: dict[str, LazyTensor]) -> None:
    """Turn the quantized weights of modules that keep theirs as [i, o] (GPT-2's Conv1D), in place."""
    for path, module in model.named_modules():
        name = f"{path}.weight"
        weight = weights.get(name)
        if isinstance(module, Conv1D) and isinstance(weight, QuantizedTensor) and not weight.turned:
            weights[name] = weight.turn()


def joined_as_floats(weights: Mapping[str, LazyTensor]) -> list[str]:
    """Weights that are put together from quantized ones of several formats or orders, and are floats for that."""
    return [name for name, weight in weights.items() if not isinstance(weight, QuantizedTensor) and _holds(weight)]


def _holds(tensor: LazyTensor) -> bool:
    """Whether a tensor is made of quantized ones."""
    inner = [*vars(tensor).get("parts", []), *([vars(tensor)["whole"]] if "whole" in vars(tensor) else [])]
    return any(isinstance(part, QuantizedTensor) or _holds(part) for part in inner)
