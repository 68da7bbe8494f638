"""Checkpoints that are quantized already: the weights that their config describes, as they are stored."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmc.frontend.quantized import awq, gptq
from llmc.frontend.quantized.source import INSTEAD, Source
from llmc.frontend.quantized.tensor import QuantizedTensor
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError

__all__ = ["METHODS", "QuantizedTensor", "orient", "read", "take_config"]

METHODS: dict[str, Callable[[Mapping[str, Any], Source], None]] = {
    "awq": awq.read,
    "gptq": gptq.read,
}


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


def read(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], dtype: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """The checkpoint with its quantized weights as QuantizedTensors, under the names of plain ones; and notes.

    tensors: by published name. dtype: the dtype that quantized weights stand for. Weights that the checkpoint keeps in
    floats stay as they are. SourceError names what is missing, misshapen or not supported.
    """
    source = Source(tensors, dtype)
    METHODS[config["quant_method"]](config, source)
    return source.tensors, list(source.notes)


def orient(model: nn.Module, weights: dict[str, LazyTensor]) -> None:
    """Turn the quantized weights of modules that keep theirs as [i, o] (GPT-2's Conv1D), in place."""
    for path, module in model.named_modules():
        name = f"{path}.weight"
        weight = weights.get(name)
        if isinstance(module, Conv1D) and isinstance(weight, QuantizedTensor) and not weight.turned:
            weights[name] = weight.turn()
