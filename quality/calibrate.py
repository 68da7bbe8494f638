"""Encode weights by what their products read: layer by layer, each on what the encoded layers before it give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from llmc.passes.schemes import Scheme
from llmc.quality.awq import sample, search
from llmc.quality.encoded import Array, Encoded
from llmc.quality.evaluator import Evaluator, Held, Use
from llmc.quality.gptq import WAYS, Hessian, gptq

__all__ = ["Calibration", "calibrate"]

CHECK = 4  # one sequence in so many is kept to check with
Keep = Callable[[str, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
Find = Callable[[str], Mapping[str, np.ndarray] | None]
Once = Callable[[str, Callable[[], Any]], Any]


@dataclass
class Calibration:
    """The weights of a plan as they are encoded, and how many of their rows were rounded in which way (gptq.WAYS)."""

    weights: dict[str, Encoded] = field(default_factory=dict)
    rows: Counter = field(default_factory=Counter)

    def schemes(self, plan: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """The schemes of the plan, with what has become of the weights' inputs."""
        return {
            name: replace(scheme, scaled=self.weights[name].scaled) if name in self.weights else scheme
            for name, scheme in plan.items()
        }

    def facts(self) -> dict[str, Any]:
        """For the manifest: weights whose inputs are scaled, and rows by the way in which they are rounded."""
        scaled = [name for name, weight in self.weights.items() if weight.scaled]
        return {"weights": len(self.weights), "scaled": scaled, "rows": {way: self.rows[way] for way in WAYS}}


def calibrate(
    evaluator: Evaluator,
    sequences: Sequence[np.ndarray],
    plan: Mapping[str, Scheme],
    *,
    scalable: Collection[str] = (),
    keep: Keep = lambda name, parts: parts,
    find: Find = lambda name: None,
    once: Once = lambda fact, make: make(),
    report: Callable[[float], None] | None = None,
) -> Calibration:
    """The weights of a plan, each in its scheme, scaled by its inputs (see awq) and rounded to second order (see gptq).

    sequences: from all over a text: windows of one page of it say little of others.

    The Hessian of a product is summed over them as they run through the layers before it, encoded, and its own layer,
    not encoded yet. All experts of a mixture share one: few tokens reach each. A table of rows has none and is encoded
    as its scheme does by itself; so is a weight that is both table and product.

    Products that read one activation read it scaled alike, or not at all: where one of them is not among the `scalable`
    or rounds its activation (what that loses is not measured here), none is scaled.

    keep(name, parts) puts parts away (into a file) and returns them as they will be read: besides them no more is in
    memory than the Hessians and the weights of one layer. find(name): what was put away before an interruption, if
    anything was. once(fact, make): what was made then, or make(), which JSON can hold.
    """
    found = Calibration()
    tables = {use.weight for use in evaluator.uses() if use.product.kind == "rows"}
    state = evaluator.start(sequences)
    last = len(evaluator.layers) - 1
    for layer in range(last + 1):
        uses = {
            u.weight: u
            for u in evaluator.uses()
            if u.layer == layer and u.weight in plan and u.weight not in found.weights
        }
        parts = {name: find(name) for name in uses}
        second = [use for name, use in uses.items() if parts[name] is None and name not in tables]
        held = evaluator.hold(layer)
        hessians = watch(evaluator, layer, state, held, second) if second else {}
        for members in groups(uses, tables):
            first = members[0].weight
            hessian, inverse = hessians.pop(activation(members[0]), None), None
            if all(u.weight in scalable and plan[u.weight].activation is None for u in members):
                inverse = once(f"inverse scale of {first}", partial(scale, held, members, evaluator, plan, hessian))
            factors = None if inverse is None else np.asarray(inverse, np.float32)
            if hessian is not None and factors is not None:
                hessian = (hessian[0].scaled(factors), hessian[1].scaled(factors))
            for use in members:
                name, own = use.weight, parts.pop(use.weight)
                if own is None:
                    rows, counts = matrices(held, use, evaluator.weights[name]), Counter[str]()
                    encoded = encode(rows if factors is None else rows / factors, plan[name], hessian, counts)
                    once(f"rows of {name}", partial(dict, counts))
                    own = keep(name, encoded)
                else:
                    counts = Counter(once(f"rows of {name}", dict))
                found.rows.update(counts)
                found.weights[name] = encoded_as(own, plan[name], use, first, factors)
        if layer < last:
            state = evaluator.run(layer, state, evaluator.hold(layer, found.weights))
        if report is not None:
            report((layer + 1) / (last + 1))
    return found


def groups(uses: Mapping[str, Use], tables: Collection[str]) -> list[list[Use]]:
    """Products of one activation together, each table by itself."""
    found: dict[tuple, list[Use]] = {}
    for name, use in uses.items():
        found.setdefault((name,) if name in tables else activation(use), []).append(use)
    return list(found.values())


def scale(
    held: Held,
    members: list[Use],
    evaluator: Evaluator,
    plan: Mapping[str, Scheme],
    hessian: tuple[Hessian, Hessian] | None,
) -> list[float] | None:
    """The inverse scale of what some products read, or None; see awq."""
    if hessian is None:
        return None
    some, count = [], 0
    for use in members:
        rows = matrices(held, use, evaluator.weights[use.weight])
        rows = rows.reshape(-1, rows.shape[-1])
        some.append((sample(rows), plan[use.weight]))
        count += len(rows)
    inverse = search(some, count, *hessian)
    return None if inverse is None else inverse.tolist()


def encode(
    rows: np.ndarray, scheme: Scheme, hessian: tuple[Hessian, Hessian] | None, counts: Counter
) -> dict[str, np.ndarray]:
    """The parts of rows [..., o, i]; experts one by one."""
    each = rows if rows.ndim == 3 else rows[None]
    encoded = [scheme.encode(m) if hessian is None else gptq(m, *hessian, scheme, counts) for m in each]
    if hessian is None:
        counts["plain"] += each.shape[0] * each.shape[1]
    parts = {k: np.stack([p[k] for p in encoded]) for k in encoded[0]}
    return parts if rows.ndim == 3 else {k: part[0] for k, part in parts.items()}


def encoded_as(
    parts: Mapping[str, np.ndarray], scheme: Scheme, use: Use, first: str, factors: np.ndarray | None
) -> Encoded:
    """A weight in a scheme, its inputs multiplied by factors that are named after the `first` weight to share them."""
    depth = parts["codes"].shape[-1]
    return Encoded.of(
        scheme.format(depth),
        parts,
        activation=scheme.rounding(depth),
        turned=use.product.turned and use.product.kind != "rows",
        scaled="" if factors is None else first,
        inverse_scale=None if factors is None else Array(factors),
    )


def activation(use: Use) -> tuple[int, ...]:
    """What products read: those that read the same have one Hessian."""
    return use.product.reads[:1]


def watch(
    evaluator: Evaluator, layer: int, state: Any, held: Held, uses: list[Use]
) -> dict[tuple[int, ...], tuple[Hessian, Hessian]]:
    """For what products of a layer read: the Hessian to fit to, and the one to check with, of every fourth sequence."""
    hessians: dict[tuple[int, ...], tuple[Hessian, Hessian]] = {}
    first = {activation(use): use for use in reversed(uses)}
    chosen: list[int] = []  # which of the two the current sequence counts for

    def see(use: Use, x: np.ndarray, ids: np.ndarray | None) -> None:
        if first.get(activation(use)) == use:
            pair = hessians.setdefault(activation(use), (Hessian(x.shape[1]), Hessian(x.shape[1])))
            for which in chosen:
                pair[which].add(x)

    for k, values in enumerate(state):
        chosen[:] = [0, 1] if len(state) < CHECK else [k % CHECK == CHECK - 1]
        evaluator.run(layer, [values], held, see)
    return hessians


def matrices(held: Held, use: Use, tensor: Any) -> np.ndarray:
    """A weight as float32 rows [..., o, i]."""
    weight = held.names.index(use.weight)
    if use.product.kind == "rows":
        return held.whole(weight).astype(np.float32)
    matrix = held.matrix(weight, use.product)
    return np.ascontiguousarray(matrix.swapaxes(-1, -2)) if use.product.turned else matrix
