"""What a rewrite of weights costs: perplexity, divergence from the program as it was, and damage by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llmc.quality.evaluator import Evaluator, Held, State

__all__ = ["Quality", "Score", "Variant", "Window", "compare", "measure", "windows"]

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

    def add(self, said: Said, wanted: Said) -> None:
        """What a program said of a window, and what the program as it was did."""
        self.tokens += len(said.target)
        self.surprise += float((said.log_sum - said.target).sum())
        self.divergence += float((said.apart / wanted.total + said.log_sum - wanted.log_sum).sum())
        self.agreement += int((said.likeliest == wanted.likeliest).sum())


class Slice(NamedTuple):
    """Of the scored tokens of a window, logits [n, width] of a slice of the vocabulary, float64.

    shares  exp(logits - largest so far)
    shrunk  [n], the factor by which sums over earlier slices become relative to the largest logit so far
    """

    logits: np.ndarray
    shares: np.ndarray
    shrunk: np.ndarray


class Said:
    """What a program says of the scored tokens of a window, from logits that come a slice of the vocabulary at a time.

    Sums over the vocabulary are in float64 and relative to the largest logit so far.

    target     logit of the token that came
    total      Σ exp(logit - top)
    likeliest  token
    apart      Σ exp(wanted - its top) · (wanted - logit): of the program as it was and of this one
    """

    def __init__(self, window: Window):
        self.rows = slice(window.first - 1, len(window.tokens) - 1)
        self.came = window.tokens[window.first :]
        count = len(self.came)
        self.top, self.total, self.apart = np.full(count, -np.inf), np.zeros(count), np.zeros(count)
        self.target, self.likeliest = np.full(count, np.nan), np.zeros(count, "int64")

    def add(self, logits: np.ndarray, start: int, wanted: Slice | None = None) -> Slice:
        """Logits [n, width] from token `start` on; `wanted`: those of the program as it was."""
        x = logits[self.rows].astype(np.float64)
        most = x.max(axis=-1)
        self.likeliest = np.where(most > self.top, start + x.argmax(axis=-1), self.likeliest)
        top = np.maximum(self.top, most)
        shares = np.exp(x - top[:, None])
        shrunk = np.exp(self.top - top)
        self.total = self.total * shrunk + shares.sum(axis=-1)
        self.top = top
        here = np.flatnonzero((self.came >= start) & (self.came < start + x.shape[1]))
        self.target[here] = x[here, self.came[here] - start]
        if wanted is not None:
            self.apart = self.apart * wanted.shrunk + np.einsum("nv,nv->n", wanted.shares, wanted.logits - x)
        return Slice(x, shares, shrunk)

    @property
    def log_sum(self) -> np.ndarray:
        """log Σ exp(logit)."""
        return self.top + np.log(self.total)


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

    def others_in(self, layer: int) -> Mapping[str, Any]:
        """The other weights that stand in a part; none where it is as it was."""
        return self.others if self.layers is None or layer in self.layers else {}


def compare(
    evaluator: Evaluator, chosen: Sequence[Window], variants: Mapping[str, Variant], report=None
) -> dict[str, Score]:
    """Score of every variant; "" is the program as it was.

    All go through the parts side by side, those with the same weights together: weights are read a few times, whatever
    the number of variants, which cost nothing before the first part in which they differ.
    """
    every = {"": Variant()} | dict(variants)
    states = {"": evaluator.start([w.tokens for w in chosen])}
    last = len(evaluator.layers) - 1
    for layer in range(last):
        # Variants that differ from the program as it was begin with its state.
        given = {
            n: states.get(n, states[""][: v.sample]) for n, v in every.items() if n in states or v.others_in(layer)
        }
        for names in alike(given, every, layer):
            held = evaluator.hold(layer, every[names[0]].others_in(layer))
            joined = evaluator.run(layer, [values for name in names for values in given[name]], held)
            for name in names:
                states[name], joined = joined[: len(given[name])], joined[len(given[name]) :]
        if report is not None:
            report((layer + 1) / (last + 1))
    differ = {n: states.get(n, states[""][: v.sample]) for n, v in every.items() if n in states or v.others_in(last)}
    said = listen(evaluator, chosen, every, differ)
    scores = {}
    for name, variant in every.items():
        scores[name] = Score()
        for one, wanted in zip(said.get(name, said[""])[: variant.sample], said[""], strict=False):
            scores[name].add(one, wanted)
    return scores


def alike(given: Mapping[str, State], every: Mapping[str, Variant], layer: int) -> list[list[str]]:
    """The names of `given`, those together whose weights in a part are the same."""
    groups: dict[int, list[str]] = {}
    for name in given:
        own = every[name].others_in(layer)
        groups.setdefault(id(own) if own else 0, []).append(name)
    return list(groups.values())


def listen(
    evaluator: Evaluator, chosen: Sequence[Window], every: Mapping[str, Variant], states: Mapping[str, State]
) -> dict[str, list[Said]]:
    """What variants say of the windows, from their states before the last part.

    A slice of the vocabulary is done for all windows before the next, so that a head is read once.
    """
    last = len(evaluator.layers) - 1
    held: dict[str, Held] = {}
    for names in alike(states, every, last):
        held |= dict.fromkeys(names, evaluator.hold(last, every[names[0]].others_in(last)))
    reads = {name: evaluator.approach(state, held[name]) for name, state in states.items()}
    said = {name: [Said(window) for window in chosen[: len(read)]] for name, read in reads.items()}
    for columns in evaluator.slices:
        for k in range(len(chosen)):
            wanted = None
            for name, read in reads.items():
                if k < len(read):
                    logits = evaluator.logits(read[k], held[name], columns)
                    found = said[name][k].add(logits, columns.start or 0, wanted)
                    wanted = found if name == "" else wanted
    return said


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
