"""Checkpoints in 8-bit floats (E4M3): a weight [o, i] and the scales that multiply it.

  fp8         (DeepSeek-V3, Qwen3; transformers, FineGrainedFP8Config): X.weight_scale_inv [o / 128, i / 128], rounded
              up, one for every block of "weight_block_size"; without that, or as X.weight_scale, one number.
              The name says inverse; it multiplies (DeepSeek-V3, inference/kernel.py, weight_dequant)
  fbgemm_fp8  X.weight_scale [o, 1]
  modelopt    with "quant_algo": "FP8": X.weight_scale, one number
Their kernels round activations to 8-bit floats too (by X.input_scale, or token by token). Here weights alone are in 8
bits: activations are read as they are, which is nearer to the model that was quantized. Rounding them is the price of
products between 8-bit floats (the scheme fp8-a8); by a scale that is fixed it cuts off what exceeds it too.
"""

from collections.abc import Mapping
from typing import Any

from llmc.frontend.quantized import packing, scales
from llmc.frontend.quantized.source import INSTEAD, Source
from llmc.ir.errors import SourceError
from llmc.ir.quantized import Format


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the weights that are stored as 8-bit floats into `source`."""
    method, algorithm = config["quant_method"], config.get("quant_algo")
    if method == "modelopt" and algorithm != "FP8":
        raise SourceError(f"modelopt: expected the algorithm FP8, found {algorithm}: not supported{INSTEAD}")
    block = config.get("weight_block_size")
    for name in [name for name, tensor in source.tensors.items() if tensor.dtype.startswith("float8_e")]:
        if source.tensors[name].dtype != "float8_e8m0fnu":
            weight(source, name, block)
    for module in source.modules(".input_scale"):
        source.take(f"{module}.input_scale")
    for module in source.modules(".input_scale_ub"):
        source.take(f"{module}.input_scale_ub")
    how = config.get("activation_scheme", "static" if method == "modelopt" else "dynamic")
    source.note(f"{method}: weights are in 8-bit floats; activations are not rounded to them ({how} in the checkpoint)")


def weight(source: Source, name: str, block=None) -> None:
    """Put one weight, of any name, into `source`; its scales are NAME_scale_inv or NAME_scale."""
    codes = source.take(name)
    if codes.dtype != "float8_e4m3fn" or codes.ndim < 2:
        raise SourceError(
            f"{name}: expected a matrix of float8_e4m3fn, found {codes.dtype} {list(codes.shape)}: not supported"
            f"{INSTEAD}"
        )
    scale_name = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in source.tensors), "")
    found = source.take(scale_name or f"{name}_scale_inv")
    # Stacked experts [e, i, o] with scales of outputs [e, 1, o] (Llama-4): the transpose of what a format describes.
    turned = found.ndim == 3 and block is None and found.shape == (codes.shape[0], 1, codes.shape[2])
    if turned:
        codes, found = codes.transpose(1, 2), found.transpose(1, 2)
    per_group, group, kind = scales.of_groups(scale_name, found, codes.shape, block if found.numel() > 1 else None)
    format = Format(8, group, kind, table="e4m3")
    source.put(name, format, [packing.as_bytes(codes), per_group], turned=turned)
