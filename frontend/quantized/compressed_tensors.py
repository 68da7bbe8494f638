"""Checkpoints of compressed-tensors (llm-compressor, vLLM).

"config_groups" say how modules are stored (compressed_tensors, compressors): by name, by "re:" expression, or all
("Linear") but those of "ignore".
  pack-quantized   X.weight_packed int32 [o, i * bits / 32], a row a stream of bits of w + 2 ** (bits - 1);
                   X.weight_scale [o, groups]; X.weight_shape [o, i]; without symmetry X.weight_zero_point
                   int32 [o * bits / 32, groups], packed down the columns; X.weight_g_idx [i], the group of every input
  int-quantized    X.weight int8 [o, i]; X.weight_scale [1], [o, 1] or [o, groups]; X.weight_zero_point int8 alike
  float-quantized  X.weight float8_e4m3fn; X.weight_scale [1], [o, 1], [o, groups] or of blocks
  mxfp4-pack-quantized  X.weight_packed uint8 [o, i / 2], lower four bits first; X.weight_scale uint8 [o, i / 32]
weight = (code - zero) * scale. Activations that a group rounds to symmetric int8 token by token are rounded here too,
to max / 127 (there to max / 127.5); other roundings of activations are left out, and a note says so.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.frontend.quantized import fp8, mxfp4, packing, scales
from llmc.frontend.quantized.gptq import BITS, input_order
from llmc.frontend.quantized.source import INSTEAD, Source
from llmc.frontend.quantized.tensor import Computed
from llmc.frontend.weights import LazyTensor, Stored
from llmc.ir.errors import SourceError
from llmc.ir.quantized import Format


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the weights of the config's groups into `source`."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise SourceError(f"compressed-tensors: expected no sparsity, found {sparsity}: not supported{INSTEAD}")
    modules = dict.fromkeys([*source.modules(".weight_packed"), *source.modules(".weight_scale")])
    for module in modules:
        group = _group(config, module)
        layout = group.get("format") or config.get("format")
        if layout not in LAYOUTS:
            raise SourceError(
                f"{module}: expected a format of compressed-tensors among {', '.join(LAYOUTS)}, found {layout}: not "
                f"supported{INSTEAD}"
            )
        LAYOUTS[layout](source, module, group["weights"], _activation(source, group.get("input_activations")))
        for left in ("input_scale", "input_zero_point", "input_g_idx"):
            source.find(f"{module}.{left}")


def _group(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config group of a module: the one that names it, else the one whose expression fits, else that of a class."""
    found: dict[int, Mapping[str, Any]] = {}
    for group in (config.get("config_groups") or {}).values():
        if not isinstance(group, dict) or not group.get("weights"):
            continue
        for target in group.get("targets") or []:
            if target == module:
                found.setdefault(0, group)
            elif target.startswith("re:"):
                if re.match(target.removeprefix("re:"), module):
                    found.setdefault(1, group)
            elif "." not in target:  # the name of a class: what is stored in few bits is of it
                found.setdefault(2, group)
    if not found:
        raise SourceError(f"{module}: expected a group in config_groups that says how it is stored, found none")
    return found[min(found)]


def _activation(source: Source, settings: Mapping[str, Any] | None) -> int | None:
    """The group of `round_activation` that does what the config says of activations; None for none."""
    if not settings:
        return None
    kind, bits = settings.get("type", "int"), settings.get("num_bits", 8)
    strategy, symmetric = settings.get("strategy"), settings.get("symmetric", True)
    if (kind, bits, symmetric, settings.get("dynamic")) == ("int", 8, True, True):
        if strategy == "token":
            return 0
        if strategy == "group" and settings.get("group_size"):
            return int(settings["group_size"])
    how = "dynamic" if settings.get("dynamic") else "static"
    source.note(
        f"compressed-tensors: activations are not rounded ({how} {kind}{bits} per {strategy} in the checkpoint)"
    )
    return None


def _packed(source: Source, module: str, weights: Mapping[str, Any], activation: int | None) -> None:
    bits = weights.get("num_bits")
    if bits not in BITS or weights.get("type", "int") != "int":
        raise SourceError(
            f"{module}: expected integers of 3, 4 or 8 bits, found {weights.get('type')}{bits}: not supported{INSTEAD}"
        )
    columns, depth = (int(size) for size in source.take(f"{module}.weight_shape", (2,)).read())
    words = source.take(f"{module}.weight_packed", (columns, -(-depth * bits // 32)), ("int32",))
    found = source.take(f"{module}.weight_scale")
    per_group, group, kind = scales.of_groups(f"{module}.weight_scale", found, (columns, depth))
    members = source.find(f"{module}.weight_g_idx")
    inputs = None
    if members is not None and not (members.read() == -1).all():  # -1: made, and never set
        inputs = input_order(f"{module}.weight_g_idx", members, group or depth, depth)
    order = None if inputs is None else Stored(inputs.astype(np.int32))
    codes = packing.along_rows(words, bits, depth, inputs)
    stored = source.find(f"{module}.weight_zero_point")
    if weights.get("symmetric", True):
        format, parts = Format(bits, group, kind, offset=1 << (bits - 1)), [codes, per_group]
    else:
        zeros = _zeros(module, stored, bits, columns, per_group.shape[1])
        format, parts = Format(bits, group, kind, zeros=True), [codes, per_group, zeros]
    source.put(f"{module}.weight", format, parts, order=order, activation=activation)


def _zeros(module: str, stored: LazyTensor | None, bits: int, columns: int, groups: int) -> LazyTensor:
    """Zero points [o, groups] uint8 of packed ones, or of int8 as the first versions left them."""
    name = f"{module}.weight_zero_point"
    if stored is None:
        raise SourceError(f"{name}: expected this part of a quantized weight, found no such tensor")
    if stored.dtype == "int8" and stored.shape == (columns, groups):
        middle = np.uint8(1 << (bits - 1))
        return Computed(stored.shape, "uint8", lambda start, stop: stored.read(start, stop).view(np.uint8) + middle)
    expected = (-(-columns * bits // 32), groups)
    if (stored.dtype, stored.shape) != ("int32", expected):
        raise SourceError(f"{name}: expected int32 {list(expected)}, found {stored.dtype} {list(stored.shape)}")
    return packing.down(stored, bits, columns)


def _integers(source: Source, module: str, weights: Mapping[str, Any], activation: int | None) -> None:
    codes = source.take(f"{module}.weight", (-1, -1), ("int8",))
    found = source.take(f"{module}.weight_scale")
    per_group, group, kind = scales.of_groups(f"{module}.weight_scale", found, codes.shape)
    stored = source.find(f"{module}.weight_zero_point")
    format, parts = Format(8, group, kind, offset=128), [packing.unsigned(codes), per_group]
    if not weights.get("symmetric", True):
        if stored is None or stored.dtype != "int8" or stored.numel() not in (1, found.numel()):
            what = "no such tensor" if stored is None else f"{stored.dtype} {list(stored.shape)}"
            raise SourceError(f"{module}.weight_zero_point: expected int8 {list(found.shape)}, found {what}")
        filled = np.broadcast_to(stored.read().reshape(-1, per_group.shape[1]), per_group.shape)
        zeros = Stored(np.ascontiguousarray(filled).view(np.uint8) ^ 128)
        format, parts = Format(8, group, kind, zeros=True), [*parts, zeros]
    source.put(f"{module}.weight", format, parts, activation=activation)


def _floats(source: Source, module: str, weights: Mapping[str, Any], activation: int | None) -> None:
    blocks = weights.get("block_structure") if weights.get("strategy") == "block" else None
    fp8.weight(source, f"{module}.weight", blocks)


def _naive(source: Source, module: str, weights: Mapping[str, Any], activation: int | None) -> None:
    store = _floats if weights.get("type") == "float" else _integers
    store(source, module, weights, activation)


def _mxfp4(source: Source, module: str, weights: Mapping[str, Any], activation: int | None) -> None:
    packed = source.take(f"{module}.weight_packed", (-1, -1), ("uint8",))
    columns, depth = packed.shape[0], packed.shape[1] * 2
    powers = source.take(f"{module}.weight_scale", (columns, -(-depth // 32)), ("uint8",))
    source.put(f"{module}.weight", mxfp4.FORMAT, [packing.along_rows(packed, 4, depth), powers])


LAYOUTS = {
    "pack-quantized": _packed,
    "int-quantized": _integers,
    "float-quantized": _floats,
    "naive-quantized": _naive,
    "mxfp4-pack-quantized": _mxfp4,
}
