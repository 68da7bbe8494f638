"""Weights as integers: scale and zero point of every group are searched for the least squared error.

For codes q (less their zero) that are given, the best scale is known: s = Σwq / Σq², with which (Σwq)² / Σq² of Σw² is
explained. So a search tries scales only to find other codes: it rounds with each, keeps the codes that explain most,
and takes their best scale; with it all weights are rounded once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.quantized import Format

from .scheme import Scheme, group_for, stored

__all__ = ["BLOCK", "Best", "Integers", "as_groups", "empty_parts", "round_groups"]

# Scales that are tried, as shares of the one that just reaches the largest weight: below 1 it is clipped.
SHARES = tuple(np.linspace(0.70, 1.06, 13))
FEW_SHARES = (0.94, 0.97, 1.0)  # for 8 bits: there is little to gain by clipping
BLOCK = 1 << 17  # weights at a time: what a search reads again and again stays in a core's cache


@dataclass(frozen=True)
class Integers(Scheme):
    """Codes of `bits` bits in groups; symmetric, or with a zero point a group."""

    bits: int = 8
    group: int = 0
    scale: str = "float16"
    zeros: bool = False

    def format(self, depth):
        offset = 0 if self.zeros else 1 << self.bits - 1
        return Format(self.bits, group_for(depth, self.group), self.scale, self.zeros, offset)

    def encode(self, rows, importance=None):
        return round_groups(rows, self.format(rows.shape[1]), importance)


def round_groups(rows: np.ndarray, format: Format, importance: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The parts of rows [r, depth] float32 in an integer format, each group with the least squared error found."""
    count, depth = rows.shape
    parts = empty_parts(format, rows.shape)
    step = max(1, BLOCK // depth)
    search = _zero_points if format.zeros else _symmetric
    for start in range(0, count, step):
        block = np.ascontiguousarray(rows[start : start + step], np.float32)
        groups = block.reshape(-1, format.group or depth)
        weights = None if importance is None else as_groups(importance, start, block.shape, groups.shape)
        codes, scales, zeros = search(groups, weights, format)
        parts["codes"][start : start + step] = codes.reshape(block.shape)
        parts["scales"][start : start + step] = scales.reshape(len(block), -1)
        if zeros is not None:
            parts["zeros"][start : start + step] = zeros.reshape(len(block), -1)
    return parts


def empty_parts(format: Format, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Room for the parts of a weight."""
    import ml_dtypes

    found = format.parts(shape).items()
    return {name: np.empty(extent, np.dtype(getattr(ml_dtypes, kind, kind))) for name, (extent, kind) in found}


def as_groups(importance: np.ndarray, start: int, block: tuple[int, ...], groups: tuple[int, ...]) -> np.ndarray:
    """What the weights of a block that begins at row `start` count, group by group."""
    own = importance if importance.ndim == 1 else importance[start : start + block[0]]
    return np.ascontiguousarray(np.broadcast_to(own, block), np.float32).reshape(groups)


class Best:
    """Of tried codes [groups, size], less their zeros, those that explain most: their best scale."""

    def __init__(self, w: np.ndarray, importance: np.ndarray | None):
        self.w = w
        self.importance = importance
        self.weighted = w if importance is None else w * importance
        self.gain = np.full(len(w), -1.0, np.float32)
        self.scale = np.zeros(len(w), np.float32)
        self.zero = np.zeros(len(w), np.float32)

    def offer(self, q: np.ndarray, zero: np.ndarray | None = None) -> None:
        along = np.einsum("gk,gk->g", self.weighted, q)
        square = np.einsum("gk,gk->g", q, q if self.importance is None else q * self.importance)
        np.maximum(square, np.float32(1e-30), out=square)
        gain = along * along / square
        better = gain > self.gain
        self.gain[better] = gain[better]
        self.scale[better] = (along / square)[better]
        if zero is not None:
            self.zero[better] = zero[better]


def _symmetric(w, importance, format):
    """codes - offset in [-half, half - 1]; the scale is negative where the largest weight is positive, so that it is
    the larger side that the one code more is on."""
    half = 1 << format.bits - 1
    largest = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1)[:, 0]
    best = Best(w, importance)
    q = np.empty_like(w)
    for share in FEW_SHARES if format.bits == 8 else SHARES:
        _divide(w, largest * np.float32(-share / half), q)
        np.clip(q, -half, half - 1, out=q)
        best.offer(q)
    scales = stored(best.scale, format.scale)
    _divide(w, scales.astype(np.float32), q)
    np.clip(q, -half, half - 1, out=q)
    return (q + np.float32(format.offset)).astype(np.uint8), scales, None


def _zero_points(w, importance, format):
    """codes in [0, most], of which `zero` stands for 0; the range that is covered always holds 0."""
    most = (1 << format.bits) - 1
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    best = Best(w, importance)
    q = np.empty_like(w)
    for share in FEW_SHARES if format.bits == 8 else SHARES:
        scale = (high - low) * np.float32(share / most)
        safe = np.where(scale > 0, scale, np.float32(1))
        for shift in (0, 1):  # the range's end that is rounded away
            zero = np.clip(np.floor(-low * np.float32(share) / safe) + shift, 0, most).astype(np.float32)
            _divide(w, scale, q)
            np.clip(q, -zero[:, None], most - zero[:, None], out=q)
            best.offer(q, zero)
    scales = stored(best.scale, format.scale)
    _divide(w, scales.astype(np.float32), q)
    q += best.zero[:, None]
    np.clip(q, 0, most, out=q)
    return q.astype(np.uint8), scales, best.zero.astype(np.uint8)


def _divide(w: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """out = w / scales of their groups, rounded to the nearest; 0 where the scale is 0."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    np.multiply(w, inverse[:, None], out=out)
    np.rint(out, out=out)
