"""Spend a budget of bits: every weight in the scheme where the damage to the whole program is least.

Damage is measured, not guessed from names: the divergence of the program's logits when the weights of one group alone
are in a probing scheme. What another scheme would do there follows from the error that it makes in the weights: a
divergence grows with the square of a small error, so it is the measured one times the ratio of squared errors. Damages
of groups are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmc.ir.decode import decode
from llmc.ir.errors import CompileError
from llmc.passes import schemes as registry
from llmc.passes.schemes import Scheme
from llmc.quality.encoded import Encoded
from llmc.quality.evaluator import Evaluator, Use
from llmc.quality.measure import Variant, Window, compare

__all__ = ["Choice", "Group", "candidates", "groups", "spend"]

WANTED = ("int3-g32", "int4-g128", "int4-g64", "int4-g32", "int8")
PROBE = "int4-g128"
ROWS = 512  # of a weight, on which squared errors are estimated


class Group(NamedTuple):
    """Weights that share a scheme: names, and for each the rows [o, i] that it has (experts one below the other)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(o * i for o, i in self.shapes)

    def bits(self, scheme: Scheme) -> float:
        """What the group takes in a scheme, scales included."""
        return sum(o * i * scheme.format(i).bits_per_weight(i) for o, i in self.shapes)


class Choice(NamedTuple):
    """A scheme for a group: what it takes, in bits, and the damage that is expected."""

    scheme: Scheme
    bits: float
    damage: float


def candidates() -> list[Scheme]:
    """The schemes among which a budget is spent: those of WANTED that there are."""
    known = set(registry.names())
    return [registry.parse(name) for name in WANTED if name in known or name.split("-")[0] in known]


def groups(uses: Sequence[Use], weights: Mapping[str, Any], names: Sequence[str]) -> list[Group]:
    """The weights of a plan in groups: products that read one activation are fused later, so they have one scheme."""
    together: dict[str, set[str]] = {name: {name} for name in names}
    first: dict[tuple, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for use in uses:
        if use.weight not in together:
            continue
        *others, o, i = weights[use.weight].shape
        turned = use.product.turned and use.product.kind != "rows"
        shapes[use.weight] = (math.prod(others) * (i if turned else o), o if turned else i)
        other = first.setdefault((use.layer, use.product.kind, use.product.reads[0]), use.weight)
        if use.product.kind != "rows" and together[other] is not together[use.weight]:
            joined = together[other] | together[use.weight]
            together |= dict.fromkeys(joined, joined)
    distinct = list({id(members): members for name, members in together.items() if name in shapes}.values())
    ordered = [tuple(name for name in names if name in members) for members in distinct]
    return [Group(members, tuple(shapes[name] for name in members)) for members in ordered]


def spend(
    evaluator: Evaluator,
    chosen: Sequence[Window],
    names: Sequence[str],
    bits: float,
    *,
    scalable: Collection[str] = (),
    report: Callable[[float], None] | None = None,
) -> dict[str, Scheme]:
    """A scheme for every weight of `names`: at most `bits` a weight, all of them and their scales counted together.

    scalable: weights whose inputs a calibration may scale afterwards; 32 bits an input are put aside for that.
    The mixture is measured on the windows against every single scheme that the budget allows, and the best is taken.
    CompileError where not even the smallest schemes fit.
    """
    found = groups(evaluator.uses(), evaluator.weights, names)
    schemes = candidates()
    probe = registry.parse(PROBE)
    matrices = {name: Rows(evaluator, name) for group in found for name in group.names}
    alone = {
        str(k): Variant({name: matrices[name].encoded(probe) for name in group.names}) for k, group in enumerate(found)
    }
    layers: dict[str, set[int]] = {}
    for use in evaluator.uses():
        layers.setdefault(use.weight, set()).add(use.layer)
    alone = {
        key: Variant(variant.others, frozenset(i for name in variant.others for i in layers[name]))
        for key, variant in alone.items()
    }
    scores = compare(evaluator, chosen, alone, report)
    tables = []
    for k, group in enumerate(found):
        unit = max(scores[str(k)].mean_divergence, 0.0) / max(group_error(group, probe, matrices), 1e-30)
        tables.append([Choice(s, group.bits(s), unit * group_error(group, s, matrices)) for s in schemes])
    limit = bits * sum(group.size for group in found)
    limit -= sum(32 * group.shapes[0][1] for group in found if set(group.names) <= set(scalable))
    mixed = choose(tables, limit, bits, sum(group.size for group in found))
    plans = {"mixed": {name: choice.scheme for g, choice in zip(found, mixed, strict=True) for name in g.names}}
    for scheme in schemes:
        if sum(group.bits(scheme) for group in found) <= limit:
            plans[scheme.name] = dict.fromkeys((name for group in found for name in group.names), scheme)
    variants = {
        key: Variant({name: matrices[name].encoded(scheme) for name, scheme in plan.items()})
        for key, plan in plans.items()
    }
    measured = compare(evaluator, chosen, variants)
    return plans[min(plans, key=lambda key: measured[key].divergence)]


def choose(tables: Sequence[Sequence[Choice]], limit: float, bits: float, size: int) -> list[Choice]:
    """One choice of each table, with the least damage for at most `limit` bits in all, about: greedily.

    All begin with what takes least; then, again and again, the step that saves most damage for its bits is taken, of
    those that still fit. Steps are along the lower hull of a table, where each is worth less than the one before.
    """
    hulls = [hull(table) for table in tables]
    at = [0] * len(hulls)
    spent = sum(choices[0].bits for choices in hulls)
    if spent > limit:
        raise CompileError(
            f"quantize='auto:{bits:g}': expected a budget of at least {spent / size:.3f} bits a weight, which the "
            f"smallest schemes take; found {bits:g}"
        )
    while True:
        steps = []
        for k, choices in enumerate(hulls):
            for further in range(at[k] + 1, len(choices)):
                more = choices[further].bits - choices[at[k]].bits
                if spent + more <= limit:
                    steps.append(((choices[at[k]].damage - choices[further].damage) / more, k, further))
        if not steps:
            return [choices[i] for choices, i in zip(hulls, at, strict=True)]
        _, k, further = max(steps)
        spent += hulls[k][further].bits - hulls[k][at[k]].bits
        at[k] = further


def hull(table: Sequence[Choice]) -> list[Choice]:
    """The choices that are worth taking: more bits for less damage, each step for less than the one before."""
    found: list[Choice] = []
    for choice in sorted(table, key=lambda c: (c.bits, c.damage)):
        if found and choice.damage >= found[-1].damage:
            continue
        while len(found) > 1 and slope(found[-2], choice) >= slope(found[-2], found[-1]):
            found.pop()
        found.append(choice)
    return found


def slope(one: Choice, other: Choice) -> float:
    """Damage saved for a bit."""
    return (one.damage - other.damage) / max(other.bits - one.bits, 1e-30)


def group_error(group: Group, scheme: Scheme, matrices: Mapping[str, Rows]) -> float:
    return sum(matrices[name].error(scheme) for name in group.names)


@dataclass
class Rows:
    """A weight as rows, for trying schemes on it; nothing is kept."""

    evaluator: Evaluator
    name: str

    def __post_init__(self):
        uses = [use for use in self.evaluator.uses() if use.weight == self.name]
        self.turned = any(use.product.turned and use.product.kind != "rows" for use in uses)
        self.tensor = self.evaluator.weights[self.name]
        self.errors: dict[str, float] = {}

    def read(self) -> np.ndarray:
        rows = np.asarray(self.tensor.read()).astype(np.float32)
        return np.ascontiguousarray(rows.swapaxes(-1, -2)) if self.turned else rows

    def encoded(self, scheme: Scheme) -> Tried:
        return Tried(self, scheme)

    def sample(self) -> np.ndarray:
        """Rows all over the weight, read one by one, or matrix by matrix of many."""
        *others, columns, _ = self.tensor.shape
        if self.turned and not others:
            whole = self.read()
            return whole[picked(len(whole))]
        per_matrix = self.tensor.shape[-1] if self.turned else columns
        found = []
        for first, rows in grouped(picked(math.prod(others) * per_matrix), per_matrix if others else 1):
            one = np.asarray(self.tensor.read(first, first + 1)).astype(np.float32)
            one = one.swapaxes(-1, -2) if self.turned else one
            found.append(one.reshape(-1, one.shape[-1])[rows])
        return np.concatenate(found)

    def error(self, scheme: Scheme) -> float:
        """Squared error of the weight in a scheme, from rows all over it."""
        if scheme.name not in self.errors:
            some = self.sample()
            count = math.prod(self.tensor.shape) // some.shape[1]
            found = decode(scheme.format(some.shape[1]), *scheme.encode(some).values())
            self.errors[scheme.name] = float(((found - some).astype(np.float64) ** 2).sum()) * count / len(some)
        return self.errors[scheme.name]


def picked(count: int) -> np.ndarray:
    """Numbers of ROWS rows of so many, evenly."""
    return np.unique(np.linspace(0, count - 1, ROWS).astype(int))


def grouped(rows: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows by the group of `size` in which they are: its number, and their numbers in it."""
    for group in np.unique(rows // size):
        yield int(group), rows[rows // size == group] % size


class Tried:
    """A weight as a scheme would store it, encoded when it is read and not kept."""

    def __init__(self, rows: Rows, scheme: Scheme):
        self.rows, self.scheme, self.shape, self.dtype = rows, scheme, tuple(rows.tensor.shape), "float32"
        depth = self.shape[-2 if rows.turned else -1]
        self.activation = scheme.rounding(depth)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.rows
        own = rows.read() if rows.turned else np.asarray(rows.tensor.read(start, stop)).astype(np.float32)
        parts = self.scheme.encode(own.reshape(-1, own.shape[-1]))
        shaped = {name: part.reshape(*own.shape[:-1], -1) for name, part in parts.items()}
        found = Encoded.of(self.scheme.format(own.shape[-1]), shaped, turned=rows.turned)
        return found.read(start, stop) if rows.turned else found.read()
