"""Activation-aware scaling (Lin et al., AWQ, 2023): weights that large inputs meet are rounded more finely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmc.ir.decode import decode
from llmc.passes.schemes import Scheme
from llmc.quality.gptq import Hessian, error_of, gptq

__all__ = ["ALPHAS", "inverse_scale", "sample", "search"]

ALPHAS = tuple(k / 20 for k in range(1, 21))  # the paper's grid; with 0 nothing is scaled
ROWS = 256  # of a weight, on which scales are tried
SMALLEST = 1e-4  # inputs that are hardly ever other than 0 count as this share of the largest


def inverse_scale(size: np.ndarray, alpha: float) -> np.ndarray:
    """1 / s [i] float32, where s = size ** alpha over the square root of its largest times its smallest.

    size [i]: the mean of |x| of every input x. Weights are to be divided by this very number, not multiplied by s.
    """
    scale = np.maximum(size, size.max() * SMALLEST).astype(np.float64) ** alpha
    return (np.sqrt(scale.max() * scale.min()) / scale).astype(np.float32)


def sample(rows: np.ndarray) -> np.ndarray:
    """Some of the rows [o, i], from all over a weight."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, ROWS).astype(int))]


def search(weights: Sequence[tuple[np.ndarray, Scheme]], count: int, fit: Hessian, check: Hessian) -> np.ndarray | None:
    """The inverse scale [i] float32 of the inputs that some weights share; None where they are better not scaled.

    weights: a sample of the rows [o, i] float32 of each, and its scheme; they have `count` rows in all. Alpha is the
    one of ALPHAS with the least error on the inputs of `fit` when the scheme searches with every weight counted by how
    large its input is. (The paper rounds with all counted alike, and gets an alpha for errors that gptq does not
    leave.) Scaled weights and weights as they are, each rounded as well as gptq can, are then held against `check`, of
    other inputs.

    The scale is stored too, 32 bits a column: the squared error must fall by more than if the weights had these bits,
    of which one makes it a quarter.
    """
    importance = fit.importance
    if importance is None:
        return None

    def searched(inverse: np.ndarray) -> float:
        return sum(
            error(rows, scheme, scheme.encode(rows / inverse, importance * inverse**2), inverse, fit)
            for rows, scheme in weights
        )

    def refined(inverse: np.ndarray) -> float:
        scaled = [hessian.scaled(inverse) for hessian in (fit, check)]
        return sum(
            error(rows, scheme, gptq(rows / inverse, scaled[0], scaled[1], scheme), inverse, check)
            for rows, scheme in weights
        )

    best = min((inverse_scale(fit.size, alpha) for alpha in ALPHAS), key=searched)
    return best if refined(best) < refined(np.ones_like(best)) / 4 ** (32 / count) else None


def error(
    rows: np.ndarray, scheme: Scheme, parts: dict[str, np.ndarray], inverse: np.ndarray, hessian: Hessian
) -> float:
    """Σ ((w - ŵ) · x)² of what the parts of rows / inverse stand for."""
    found = decode(scheme.format(rows.shape[1]), *parts.values()) * inverse
    return float(error_of(rows, found, hessian).sum())
