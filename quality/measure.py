"""What a rewrite of weights costs: perplexity, divergence from the program as it was, and damage by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llmc.quality.evaluator import Evaluator, Held, State

__all__ = ["Quality", "Score", "Variant", "Window", "compare", "measure", "windows"]

ROWS = 64  # rows of logits that are turned to float64 at a time
WORST = 5
Report = Callable[[float], None] | None


class Window(NamedTuple):
    """A sequence of tokens, of which those from `first` on are scored: each is predicted from all before it."""

    tokens: np.ndarray
    first: int


def windows(
    tokens: Sequence[int] | np.ndarray, length: int, stride: int | None = None, prefix: Sequence[int] = ()
) -> list[Window]:
    """Windows of `length` tokens over a text, `stride` apart (default: half a window); every token is scored once.

    prefix: what stands before every window (the token that begins a text) and is no part of it. The last window ends
    where the text ends. The first token of a text is predicted from the prefix, or not at all without one.
    """
    ids, head = np.asarray(tokens, "int32"), np.asarray(prefix, "int32")
    room = length - len(head)
    if room < 2 or len(ids) < room:
        raise ValueError(f"expected a text of at least {max(room, 2)} tokens for windows of {length}, found {len(ids)}")
    stride, done = stride or max(1, room // 2), 0
    found: list[Window] = []
    while done < len(ids):
        start = min(len(found) * stride, len(ids) - room)
        first = done - start + len(head)
        found.append(Window(np.concatenate([head, ids[start : start + room]]), max(first, 1)))
        done = start + room
    return found


@dataclass
class Score:
    """Sums over scored tokens, in float64: what a program says of the tokens, and how far it is from another.

    surprise    of the token that came, in nats: -log p
    divergence  KL(p || q) in nats: p of the program as it was, q of this one
    agreement   tokens for which both find the same token likeliest
    """

    tokens: int = 0
    surprise: float = 0.0
    divergence: float = 0.0
    agreement: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / self.tokens)

    @property
    def mean_divergence(self) -> float:
        return self.divergence / self.tokens

    def add(self, logits: np.ndarray, wanted: np.ndarray, window: Window) -> None:
        """Logits [n, vocab] of a window, and those of the program as it was."""
        for start in range(window.first - 1, len(window.tokens) - 1, ROWS):
            rows = slice(start, min(start + ROWS, len(window.tokens) - 1))
            next_tokens = window.tokens[rows.start + 1 : rows.stop + 1]
            q = log_probabilities(logits[rows])
            p = q if wanted is logits else log_probabilities(wanted[rows])
            self.tokens += len(q)
            self.surprise -= float(q[np.arange(len(q)), next_tokens].sum())
            self.divergence += float((np.exp(p) * (p - q)).sum())
            self.agreement += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Logits [n, vocab] as log-probabilities, float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Variant:
    """Other weights for a program, in all of its parts or in some; None: as it was.

    others  name -> tensor, see Evaluator
    layers  numbers of the parts in which they stand; None: in all
    sample  how many windows are measured; None: all
    """

    others: Mapping[str, Any] = field(default_factory=dict)
    layers: frozenset[int] | None = None
    sample: int | None = None

    def stands_in(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


def compare(
    evaluator: Evaluator, chosen: Sequence[Window], variants: Mapping[str, Variant], report=None
) -> dict[str, Score]:
    """Score of every variant; "" is the program as it was.

    All go through the parts side by side: each weight is read once, and encoded once; a variant costs nothing before
    the first part in which it differs.
    """
    reference = evaluator.start([w.tokens for w in chosen])
    states: dict[str, State] = {}
    last = len(evaluator.layers) - 1
    for layer in range(last):
        holds = Holds(evaluator, layer)
        before, reference = reference, evaluator.run(layer, reference, holds.plain)
        for name, variant in variants.items():
            if name in states or variant.stands_in(layer):
                state = states.get(name, before[: variant.sample])
                states[name] = evaluator.run(layer, state, holds.of(variant))
        if report is not None:
            report((layer + 1) / (last + 1))
    holds = Holds(evaluator, last)
    scores = {name: Score() for name in ["", *variants]}
    for k, window in enumerate(chosen):
        wanted = evaluator.logits(reference[k], holds.plain)
        scores[""].add(wanted, wanted, window)
        for name, variant in variants.items():
            if variant.sample is None or k < variant.sample:
                same = name not in states and not variant.stands_in(last)
                values = states[name][k] if name in states else reference[k]
                logits = wanted if same else evaluator.logits(values, holds.of(variant))
                scores[name].add(logits, wanted, window)
    return scores


class Holds:
    """The weights of one part as they are, and as every set of others has them; each is read once."""

    def __init__(self, evaluator: Evaluator, layer: int):
        self.evaluator, self.layer = evaluator, layer
        self.plain = evaluator.hold(layer)
        self.found: dict[int, Held] = {}

    def of(self, variant: Variant) -> Held:
        if not variant.stands_in(self.layer):
            return self.plain
        key = id(variant.others)
        if key not in self.found:
            self.found[key] = self.evaluator.hold(self.layer, variant.others)
        return self.found[key]


@dataclass(frozen=True)
class Quality:
    """Quality of a program with other weights against the same program with its own.

    text         what it was measured on
    tokens       how many tokens of it were scored, in windows of `window` tokens
    perplexity   of the program with other weights; `unquantized` of the one with its own
    divergence   KL(unquantized || quantized), mean of tokens, in nats
    agreement    share of tokens for which both find the same token likeliest
    damage       part -> divergence when that part alone has other weights, the worst first; on `sampled` tokens
    """

    text: str
    tokens: int
    window: int
    perplexity: float
    unquantized: float
    divergence: float
    agreement: float
    damage: dict[str, float]
    sampled: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    evaluator: Evaluator,
    chosen: Sequence[Window],
    others: Mapping[str, Any],
    *,
    text: str,
    sample: int = 1,
    report=None,
) -> Quality:
    """Quality of the program with `others` on windows of a text.

    The damage of a part is the divergence of logits when the weights of that part alone are other ones, all the rest
    of the program as it was: in the unit of the whole, with what later layers make of an error. It is measured on the
    first `sample` windows: with n parts it costs n/2 times a run of the program.
    """
    touched = [i for i, layer in enumerate(evaluator.layers) if any(name in others for name in layer.weights)]
    alone = {f"alone {i}": Variant(others, frozenset([i]), sample) for i in touched}
    scores = compare(evaluator, chosen, {"all": Variant(others)} | alone, report)
    damage = {evaluator.layers[i].name: scores[f"alone {i}"].mean_divergence for i in touched}
    worst = sorted(damage, key=lambda name: -damage[name])[:WORST]
    found = scores["all"]
    return Quality(
        text,
        found.tokens,
        evaluator.length,
        found.perplexity,
        scores[""].perplexity,
        found.mean_divergence,
        found.agreement / found.tokens,
        {name: damage[name] for name in worst},
        scores[f"alone {touched[0]}"].tokens if touched else 0,
    )
