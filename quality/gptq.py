"""Second-order rounding (Frantar et al., GPTQ, 2023): later weights mend what rounding one does to a product."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from llmc.ir.decode import decode
from llmc.ir.quantized import TABLES, Format
from llmc.passes.schemes import Scheme

__all__ = ["DAMPINGS", "WAYS", "Hessian", "error_of", "gptq"]

# Of the mean of the Hessian's diagonal, added to it: GPTQ's own choice, and one for inputs that say little of others.
DAMPINGS = (0.01, 0.3)
WAYS = ("plain", "weighted", "second order")  # a scheme's search, alike for all inputs or by their size; or GPTQ
BLOCK = 128  # columns that are rounded before the rest of the row is mended
SLICE = 1 << 22  # weights that are rounded at a time


class Hessian:
    """Σ x xᵀ [i, i] float64 over the inputs x of a product: what an error of its weights costs, to second order."""

    def __init__(self, depth: int):
        self.matrix = np.zeros((depth, depth))
        self.absolute = np.zeros(depth)
        self.count = 0
        self.factors: dict[float, np.ndarray] = {}

    def add(self, x: np.ndarray) -> None:
        """Inputs [s, i] float32; sums of one call are in float32, sums of calls in float64."""
        self.matrix += x.T @ x
        self.absolute += np.abs(x).sum(axis=0)
        self.count += len(x)
        self.factors.clear()

    def scaled(self, inverse: np.ndarray) -> Hessian:
        """That of the same inputs, each multiplied by a number: inverse [i]."""
        found, factor = Hessian(len(inverse)), inverse.astype(np.float64)
        found.matrix = self.matrix * factor * factor[:, None]
        found.absolute, found.count = self.absolute * factor, self.count
        return found

    @property
    def size(self) -> np.ndarray:
        """The mean of |x| [i] float32."""
        return (self.absolute / max(self.count, 1)).astype(np.float32)

    @property
    def importance(self) -> np.ndarray | None:
        """What an error of each column counts by itself [i] float32; None if no input was ever other than 0."""
        diagonal = np.diag(self.matrix).astype(np.float32)
        return diagonal + diagonal.mean() * np.float32(1e-6) if diagonal.any() else None

    def inverse_factor(self, damping: float) -> np.ndarray:
        """Upper U with UᵀU = (H + damping)⁻¹; inputs that never occur count as much as the damping."""
        if damping not in self.factors:
            mean = float(np.mean(np.diag(self.matrix))) or 1.0
            damped = self.matrix + np.eye(len(self.matrix)) * (damping * mean)
            self.factors[damping] = np.linalg.cholesky(np.linalg.inv(damped)).T
        return self.factors[damping]


def gptq(
    rows: np.ndarray, fit: Hessian, check: Hessian, scheme: Scheme, counts: Counter | None = None
) -> dict[str, np.ndarray]:
    """The parts of rows [o, i] float32, rounded so that the products on calibrated inputs change least.

    Column by column: a weight is rounded, and its error spread over the columns that are still to come, as the inverse
    Hessian says (its Cholesky factor, in float64). The scale of a group is found by the scheme when its first column is
    reached, from the weights as they have become, each counted by the Hessian's diagonal.

    A few thousand tokens do not tell all directions of the inputs: fitted too closely, the rounding is worse than none
    on other text. So it is done with `fit` and judged by `check`, of other inputs: row by row the best is taken of the
    scheme's own search, plain and with the diagonal, and second-order rounding with each damping. On `check` no row
    comes out worse than by the scheme's own search. counts: how many rows were rounded in which of these ways (WAYS).
    """
    format = scheme.format(rows.shape[1])
    factors = [fit.inverse_factor(damping) for damping in DAMPINGS] if fit.importance is not None else []
    step = max(1, SLICE // rows.shape[1])
    found = []
    for start in range(0, len(rows), step):
        own = rows[start : start + step]
        candidates = [scheme.encode(own)]
        if factors:
            candidates += [scheme.encode(own, fit.importance)]
            candidates += [second_order(own, fit, factor, scheme, format) for factor in factors]
        parts, best = best_of(own, candidates, check, format)
        found.append(parts)
        if counts is not None:
            counts.update(WAYS[min(i, len(WAYS) - 1)] for i in best)
    return {name: np.concatenate([parts[name] for parts in found]) for name in found[0]}


def best_of(
    rows: np.ndarray, candidates: list[dict[str, np.ndarray]], check: Hessian, format: Format
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Row by row the parts with the smallest error, and of which candidate they are."""
    errors = [error_of(rows, decode(format, *parts.values()), check) for parts in candidates]
    best = np.argmin(np.where(np.isnan(errors), np.inf, errors), axis=0)
    out = {name: part.copy() for name, part in candidates[0].items()}
    for i, parts in enumerate(candidates):
        for name, part in parts.items():
            out[name][best == i] = part[best == i]
    return out, best


def error_of(rows: np.ndarray, found: np.ndarray, hessian: Hessian) -> np.ndarray:
    """Σ ((w - ŵ) · x)² over the calibrated inputs, of each row [o], float64."""
    difference = rows.astype(np.float64) - found
    return np.einsum("oi,oi->o", difference @ hessian.matrix, difference)


def second_order(
    rows: np.ndarray, hessian: Hessian, inverse: np.ndarray, scheme: Scheme, format: Format
) -> dict[str, np.ndarray]:
    """The parts that GPTQ finds; `inverse` is the factor of the inverse Hessian."""
    count, depth = rows.shape
    group, of_one = format.group or depth, replace(format, group=0)
    importance = np.ones(depth, np.float32) if hessian.importance is None else hessian.importance
    w = rows.astype(np.float64)
    codes = np.empty((count, depth), np.uint8)
    scales: dict[str, list[np.ndarray]] = {}  # and zero points
    own: dict[str, np.ndarray] = {}  # of the group that is being rounded
    block = max(BLOCK // group * group, group) if format.group else BLOCK
    for start in range(0, depth, block):
        stop = min(start + block, depth)
        errors = np.zeros((count, stop - start))
        for at in range(start, stop):
            if at % group == 0:
                columns = np.ascontiguousarray(w[:, at : at + group], np.float32)
                own = {k: v for k, v in scheme.encode(columns, importance[at : at + group]).items() if k != "codes"}
                for name, part in own.items():
                    scales.setdefault(name, []).append(part)
            codes[:, at] = nearest(w[:, at], format, **own)
            error = w[:, at] - decode(of_one, codes[:, at : at + 1], *own.values())[:, 0]
            errors[:, at - start] = error / inverse[at, at]
            w[:, at + 1 : stop] -= errors[:, at - start, None] * inverse[at, at + 1 : stop]
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return {"codes": codes} | {name: np.concatenate(found, axis=1) for name, found in scales.items()}


def nearest(w: np.ndarray, format: Format, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """The codes [o] uint8 whose values are nearest to w [o], with scales (and zero points) [o, 1]."""
    if format.scale == "e8m0":
        size = np.exp2(scales[:, 0].astype(np.float64) - 127)
    else:
        size = scales[:, 0].astype(np.float64)
    x = np.divide(w, size, out=np.zeros_like(w), where=size != 0)
    if not format.table:
        zero = zeros[:, 0] if zeros is not None else format.offset
        return np.clip(np.rint(x + zero), 0, (1 << format.bits) - 1).astype(np.uint8)
    values = np.asarray(TABLES[format.table], np.float64)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN sorts last
    between = (values[order][1:] + values[order][:-1]) / 2
    return order[np.searchsorted(between, x)].astype(np.uint8)
