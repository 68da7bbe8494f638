"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A Linear [o, i] is stored as (AutoGPTQ, nn_modules/qlinear; GPTQModel, "checkpoint_format"):
  qweight  int32 [i * bits / 32, o]       codes of one output down a column, a stream of bits, the lowest first
  qzeros   int32 [groups, o * bits / 32]  zero points; "gptq" (v1) stores them less one, "gptq_v2" as they are
  scales   [groups, o]
  g_idx    int32 [i]                      the group of every input
with weight[o, i] = (code - zero[g_idx[i], o]) * scales[g_idx[i], o].

With "desc_act" the groups are not runs of neighbouring inputs: the inputs are put in the order of their groups, and
that order becomes the weight's.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.frontend.quantized import packing
from llmc.frontend.quantized.source import INSTEAD, Source, group_of
from llmc.frontend.quantized.tensor import Computed, regroup
from llmc.frontend.weights import LazyTensor, Stored
from llmc.ir.errors import SourceError
from llmc.ir.quantized import Format

BITS = (3, 4, 8)
FLOATS = ("float16", "bfloat16", "float32")


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the weights of GPTQ's modules into `source`."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise SourceError(f"gptq: expected the layout gptq or gptq_v2, found {layout}: not supported{INSTEAD}")
    for module in source.modules(".qweight"):
        own = _settings(config, module)
        bits, size = own.get("bits"), own.get("group_size", -1)
        if bits not in BITS:
            raise SourceError(f"{module}: expected gptq in 3, 4 or 8 bits, found {bits}: not supported{INSTEAD}")
        _linear(source, module, bits, size, first=1 if layout == "gptq" else 0)


def _settings(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config's settings for a module: GPTQModel's "dynamic" has rules by name, "+:REGEX" or "REGEX"."""
    for rule, own in (config.get("dynamic") or {}).items():
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), module):
            return {**config, **own}
    return config


def _linear(source: Source, module: str, bits: int, size: int, first: int) -> None:
    words = source.take(f"{module}.qweight", (-1, -1), ("int32",))
    depth, columns = words.shape[0] * 32 // bits, words.shape[1]
    block = group_of(module, size, depth)
    groups = -(-depth // block)
    scales = source.take(f"{module}.scales", (groups, columns), FLOATS)
    packed = source.take(f"{module}.qzeros", (groups, -(-columns * bits // 32)), ("int32",))
    members = source.find(f"{module}.g_idx")
    inputs = None if members is None else input_order(f"{module}.g_idx", members, block, depth)
    order = None if inputs is None else Stored(inputs.astype(np.int32))

    scales, group = regroup(scales.transpose(0, 1), block, depth)
    codes = packing.along_columns(words, bits, inputs)
    middle = 1 << (bits - 1)
    if _all_are(packed, bits, columns, middle - first):
        format, parts = Format(bits, group, scales.dtype, offset=middle), [codes, scales]
    else:
        zeros, _ = regroup(_zeros(packed, bits, columns, first), block, depth)
        format, parts = Format(bits, group, scales.dtype, zeros=True), [codes, scales, zeros]
    source.put(f"{module}.weight", format, parts, order=order)


def _all_are(packed: LazyTensor, bits: int, columns: int, code: int) -> bool:
    """Whether packed zero points [groups, o * bits / 32] are one and the same."""
    stream = np.unpackbits(np.full(columns, code, np.uint8)[:, None], axis=1, bitorder="little")[:, :bits]
    words = np.zeros(packed.shape[1] * 32, np.uint8)
    words[: stream.size] = stream.reshape(-1)
    return bool((packed.read() == np.packbits(words, bitorder="little").view(np.int32)).all())


def _zeros(packed: LazyTensor, bits: int, columns: int, first: int) -> LazyTensor:
    """Zero points [o, groups] of packed ones; first: what was taken off each before it was packed.

    Where a zero point of 0 was packed as -1, the word as a whole was decreased (GPTQModel's conversion of layouts), so
    it is increased as a whole; 3 bits lie across words and are increased one by one.
    """
    if 32 % bits == 0:
        ones = sum(1 << at for at in range(0, 32, bits))
        return packing.across(packed, bits, columns, plus=first * ones)
    codes, most = packing.across(packed, bits, columns), (1 << bits) - 1
    return Computed(codes.shape, "uint8", lambda start, stop: (codes.read(start, stop) + first) & most)


def input_order(name: str, members: LazyTensor, block: int, depth: int) -> np.ndarray | None:
    """The inputs in the order of their groups, [i]; None where they are in that order already.

    members: the group of every input. SourceError where groups are not all of `block` inputs.
    """
    of_input = members.read()
    if of_input.shape != (depth,):
        raise SourceError(f"{name}: expected shape [{depth}], found {list(of_input.shape)}")
    in_order = np.arange(depth) // block
    if np.array_equal(of_input, in_order):
        return None
    order = np.argsort(of_input, kind="stable")
    if not np.array_equal(of_input[order], in_order):
        raise SourceError(f"{name}: expected {block} inputs in every group, found other numbers of them")
    return order
