"""bitsandbytes checkpoints: NF4, and the int8 of LLM.int8().

NF4 (bitsandbytes, functional.py, QuantState.as_dict): a weight [o, i] in row-major order, `blocksize` elements a scale
  X.weight               uint8 [o * i / 2, 1]   two codes a byte, the upper four bits first
  X.weight.absmax        float32 [blocks]; with double quantization uint8, the codes of
                         absmax[b] = nested_quant_map[code] * nested_absmax[b / nested_blocksize] + nested_offset
  X.weight.quant_map     float32 [16]           NF4's table
  X.weight.quant_state.bitsandbytes__nf4   uint8: JSON with shape, blocksize, nested_blocksize, nested_offset
int8 (integrations/bitsandbytes.py): X.weight int8 [o, i], X.SCB float32 [o]; weight[o, i] = code * SCB[o] / 127.

LLM.int8() multiplies columns of activations beyond `llm_int8_threshold` in float16 and the others in int8: that is
done to activations when a product is computed, and nothing of it is in the checkpoint. Here all activations are read
as they are.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmc.frontend.quantized import packing
from llmc.frontend.quantized.source import INSTEAD, Source
from llmc.frontend.quantized.tensor import Computed, regroup
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError
from llmc.ir.quantized import TABLES, Format

STATE = ".quant_state.bitsandbytes__"


def read(config: Mapping[str, Any], source: Source) -> None:
    """Put the weights in NF4 and int8 into `source`."""
    for name in [name for name in source.tensors if STATE in name]:
        weight, _, kind = name.partition(STATE)
        if kind != "nf4":
            raise SourceError(f"{weight}: expected nf4, found {kind}: not supported{INSTEAD}")
        _nf4(source, weight, name)
    columns = list(source.modules(".SCB"))
    for module in columns:
        _int8(source, module)
    if columns:
        source.note("bitsandbytes: weights are in int8; activations are not rounded, so none counts as an outlier")


def _nf4(source: Source, name: str, state_name: str) -> None:
    try:
        state = json.loads(source.take(state_name).read().tobytes())
        columns, depth = (int(size) for size in state["shape"])
        block = int(state["blocksize"])
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if "nested_offset" in state else None
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{state_name}: expected JSON with the shape and blocksize of a matrix, found none") from None
    table = source.take(f"{name}.quant_map", (16,), ("float32",)).read()
    if not np.allclose(table, TABLES["nf4"], rtol=0, atol=1e-6):
        raise SourceError(f"{name}.quant_map: expected the values of nf4, found others: not supported{INSTEAD}")
    packed = source.take(name, None, ("uint8",)).reshape(-1)
    if packed.numel() != -(-columns * depth // 2):
        raise SourceError(f"{name}: expected {-(-columns * depth // 2)} bytes, found {packed.numel()}")
    blocks = -(-columns * depth // block)
    scales = _scales(source, name, blocks, nested)
    per_group, group = _of_rows(scales, block, columns, depth)
    source.put(name, Format(4, group, "float32", table="nf4"), [_codes(packed, columns, depth), per_group])


def _codes(packed: LazyTensor, columns: int, depth: int) -> LazyTensor:
    """Codes [o, i] of bytes that hold two of them, the upper four bits first."""

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start * depth, stop * depth
        data = packed.read(first // 2, -(-last // 2))
        codes = np.stack([data >> 4, data & 15], axis=-1).reshape(-1)
        return codes[first % 2 : first % 2 + last - first].reshape(stop - start, depth)

    return Computed((columns, depth), "uint8", rows)


def _scales(source: Source, name: str, blocks: int, nested: tuple[int, float] | None) -> LazyTensor:
    """The scale [blocks] float32 of every block of a weight."""
    if nested is None:
        return source.take(f"{name}.absmax", (blocks,), ("float32",))
    size, offset = nested
    codes = source.take(f"{name}.absmax", (blocks,), ("uint8",))
    values = source.take(f"{name}.nested_quant_map", (256,), ("float32",)).read()
    of_blocks, add = source.take(f"{name}.nested_absmax", (-(-blocks // size),), ("float32",)), np.float32(offset)

    def rows(start: int, stop: int) -> np.ndarray:
        runs = np.arange(start, stop) // size
        first = start // size
        return values[codes.read(start, stop)] * of_blocks.read(first, -(-stop // size))[runs - first] + add

    return Computed((blocks,), "float32", rows)


def _of_rows(scales: LazyTensor, block: int, columns: int, depth: int) -> tuple[LazyTensor, int]:
    """Scales [blocks] of runs of a matrix in row-major order, which may go over the ends of rows -> those of groups."""
    _, group = regroup(scales, block, depth)
    each = group or depth
    groups = depth // each

    def rows(start: int, stop: int) -> np.ndarray:
        of_group = np.arange(start * groups, stop * groups) * each // block
        first = of_group[0] if len(of_group) else 0
        found = scales.read(int(first), int(of_group[-1]) + 1 if len(of_group) else 0)
        return found[of_group - first].reshape(stop - start, groups)

    return Computed((columns, groups), "float32", rows), group


def _int8(source: Source, module: str) -> None:
    name = f"{module}.weight"
    codes = source.take(name, (-1, -1), ("int8",))
    columns = codes.shape[0]
    largest = source.take(f"{module}.SCB", (columns,), ("float32",)).reshape(columns, 1)
    source.find(f"{module}.weight_format")  # how a card keeps it in memory: row by row in every file
    scales = Computed((columns, 1), "float32", lambda start, stop: largest.read(start, stop) * np.float32(1 / 127))
    source.put(name, Format(8, 0, "float32", offset=128), [packing.unsigned(codes), scales])
