"""Encode weights by what their products read: layer by layer, each on what the encoded layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.passes.schemes import Scheme
from llmc.quality.encoded import Encoded
from llmc.quality.evaluator import Evaluator, Held, Use
from llmc.quality.gptq import Hessian, gptq

__all__ = ["calibrate"]

CHECK = 4  # one sequence in so many is kept to check with
Keep = Callable[[str, dict[str, np.ndarray]], Mapping[str, np.ndarray]]
Find = Callable[[str], Mapping[str, np.ndarray] | None]


def calibrate(
    evaluator: Evaluator,
    sequences: Sequence[np.ndarray],
    plan: Mapping[str, Scheme],
    *,
    keep: Keep = lambda name, parts: parts,
    find: Find = lambda name: None,
    report: Callable[[float], None] | None = None,
) -> dict[str, Encoded]:
    """The weights of a plan, each in its scheme, rounded to second order (see gptq).

    sequences: from all over a text: windows of one page of it say little of others.

    The Hessian of a product is summed over them as they run through the layers before it, encoded, and its own layer,
    not encoded yet. All experts of a mixture share one: few tokens reach each. A table of rows has none and is encoded
    as its scheme does by itself; so is a weight that is both table and product.

    keep(name, parts) puts parts away (into a file) and returns them as they will be read: besides them no more is in
    memory than the Hessians and the weights of one layer. find(name): what was put away before an interruption, if
    anything was.
    """
    found: dict[str, Encoded] = {}
    tables = {use.weight for use in evaluator.uses() if use.product.kind == "rows"}
    state = evaluator.start(sequences)
    last = len(evaluator.layers) - 1
    for layer in range(last + 1):
        uses = {
            u.weight: u for u in evaluator.uses() if u.layer == layer and u.weight in plan and u.weight not in found
        }
        for name in list(uses):
            if (parts := find(name)) is not None:
                found[name] = encoded_as(parts, plan[name], uses.pop(name))
        second = {name: use for name, use in uses.items() if name not in tables}
        held = evaluator.hold(layer)
        hessians = watch(evaluator, layer, state, held, list(second.values())) if second else {}
        for name, use in uses.items():
            rows, scheme = matrices(held, use, evaluator.weights[name]), plan[name]
            hessian = hessians.get(activation(use)) if name in second else None
            each = rows if rows.ndim == 3 else rows[None]  # experts one by one
            encoded = [scheme.encode(m) if hessian is None else gptq(m, *hessian, scheme) for m in each]
            parts = {k: np.stack([p[k] for p in encoded]) for k in encoded[0]}
            parts = parts if rows.ndim == 3 else {k: part[0] for k, part in parts.items()}
            found[name] = encoded_as(keep(name, parts), scheme, use)
        if layer < last:
            state = evaluator.run(layer, state, evaluator.hold(layer, found))
        if report is not None:
            report((layer + 1) / (last + 1))
    return found


def encoded_as(parts: Mapping[str, np.ndarray], scheme: Scheme, use: Use) -> Encoded:
    """A weight in a scheme."""
    depth = parts["codes"].shape[-1]
    turned = use.product.turned and use.product.kind != "rows"
    return Encoded.of(scheme.format(depth), parts, activation=scheme.rounding(depth), turned=turned)


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
