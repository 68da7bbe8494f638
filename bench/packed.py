"""From an artifact's packed weights back to a checkpoint's: what another engine needs to compute with the same numbers.

An artifact with random weights has no checkpoint: its numbers are drawn for the packed tensors. A packed tensor is
named for what it was made of: "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight:concat" holds the rows of three
weights, one after the other. GPUs take rows as they stand; CPUs take panels (codegen/cpu/pack.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np


class PackedError(Exception):
    """Packed weights that are not those of the model: expected, found."""


def rows(packed: np.ndarray) -> np.ndarray:
    """A packed weight as rows [columns, depth], padding included; a vector as it is.

    Panels are [panels, depth, vectors, lanes], of bfloat16 [panels, depth/2, vectors, lanes, 2].
    """
    if packed.ndim <= 2:
        return packed
    if packed.ndim == 4:
        return packed.transpose(0, 2, 3, 1).reshape(-1, packed.shape[1])
    if packed.ndim == 5:
        return packed.transpose(0, 2, 3, 1, 4).reshape(-1, packed.shape[1] * packed.shape[4])
    raise PackedError(f"expected a vector, rows or panels, found a tensor of shape {list(packed.shape)}")


def sources(name: str) -> list[str]:
    """The names of the weights that a packed tensor was made of."""
    whole = name.partition(":")[0]
    stem, dot, kind = whole.rpartition(".")
    prefix, separator, fused = stem.rpartition(".")
    return [f"{prefix}{separator}{part}{dot}{kind}" for part in fused.split("+")]


def unpack(
    weights: Mapping[str, np.ndarray], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The checkpoint's weights in the packed tensors `names`, as (name, array of the shape that `shapes` gives).

    Raises PackedError: a weight that the model does not have, or a packed tensor of too few rows.
    """
    for name in names:
        parts, array = sources(name), rows(weights[name])
        unknown = [part for part in parts if part not in shapes]
        if unknown:
            raise PackedError(f"the artifact has a weight {unknown[0]}, and the model has none of that name")
        needed = sum(shapes[part][0] for part in parts)
        if len(array) < needed or array.ndim != len(shapes[parts[0]]):
            expected = [list(shapes[part]) for part in parts]
            raise PackedError(f"{name}: expected the rows of {expected}, found {list(array.shape)}")
        at = 0
        for part in parts:
            extent = shapes[part]
            kept = array[at : at + extent[0]]
            yield part, kept[:, : extent[1]] if kept.ndim > 1 else kept
            at += extent[0]
