"""From logits to a token: penalties, temperature, filters, and a draw that depends on seed and position alone."""

import math
import numbers
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from .errors import OVERFLOW, RequestError


class TokenLogprob(NamedTuple):
    """Natural log-probability of a chosen token under the model, and the k best at its place, best first."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen; the names and meanings of vLLM and transformers.

    Order: min_tokens hides the stop tokens; repetition (prompt and answer), then presence and frequency penalty
    (answer); temperature; top_k, top_p, min_p. temperature 0 takes the best token, of equal ones the lowest id.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True
    plain: bool = field(init=False, default=False, repr=False)  # the best token of the untouched logits

    def __post_init__(self):
        """Raises RequestError naming the parameter, what it may be, and what was found."""
        put = object.__setattr__
        for name, least in (("max_tokens", 1), ("min_tokens", 0), ("top_k", -1)):
            put(self, name, _integer(name, getattr(self, name), least))
        put(self, "top_k", max(self.top_k, 0))  # -1 is vLLM's word for no limit
        for name, low, high, what in _RANGES:
            put(self, name, _number(name, getattr(self, name), low, high, what))
        if self.seed is not None:
            put(self, "seed", _integer("seed", self.seed, 0, (1 << 64) - 1))
        if self.logprobs is not None:
            put(self, "logprobs", _integer("logprobs", self.logprobs, 0))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(_sequence("stop", self.stop, "strings"))
        if not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop: expected a string or a list of strings, none empty, found {self.stop!r}")
        put(self, "stop", stop)
        ids = _sequence("stop_token_ids", self.stop_token_ids, "token ids")
        put(self, "stop_token_ids", tuple(_integer("stop_token_ids", i, 0) for i in ids))
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens: expected at most max_tokens ({self.max_tokens}), found {self.min_tokens}")
        put(
            self,
            "plain",
            self.temperature == 0 and not self.penalised and self.logprobs is None and not self.min_tokens,
        )

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def of(cls, **given: Any) -> "Sampling":
        """Raises TypeError for a name that is no sampling parameter."""
        names = [f.name for f in fields(cls) if f.init]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise TypeError(f"unknown sampling parameter {unknown[0]!r}; there are: {', '.join(names)}")
        return cls(**given)


_INFINITY = float("inf")
_RANGES = (
    ("temperature", 0.0, _INFINITY, "a number of at least 0"),
    ("top_p", 0.0, 1.0, "a number above 0 and at most 1"),
    ("min_p", 0.0, 1.0, "a number from 0 to 1"),
    ("repetition_penalty", 0.0, _INFINITY, "a number above 0"),
    ("presence_penalty", -_INFINITY, _INFINITY, "a number"),
    ("frequency_penalty", -_INFINITY, _INFINITY, "a number"),
)


def _number(name: str, value: Any, low: float, high: float, what: str) -> float:
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not low <= value <= high or (value == 0 and "above 0" in what):
        raise RequestError(f"{name}: expected {what}, found {value!r}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        upto = f" and at most {high}" if high is not None else ""
        raise RequestError(f"{name}: expected a whole number of at least {low}{upto}, found {value!r}")
    return int(value)


def _sequence(name: str, value: Any, what: str) -> Sequence:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise RequestError(f"{name}: expected a list of {what}, found {value!r}")
    return list(value)


class Draw(NamedTuple):
    """What a drawing of one token from a row of logits needs: the filters, and a number in [0, 1)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


GREEDY = Draw(0.0, 0, 1.0, 0.0, 0.0)


class Sampler:
    """Chooses the tokens of one request. Keeps what its penalties need to know of the tokens so far."""

    def __init__(self, sampling: Sampling, prompt: np.ndarray, hidden: Collection[int]):
        """prompt [n] i32; hidden: the token ids that can't be chosen before min_tokens (those that end the answer)."""
        self.sampling = sampling
        self.seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        self._hidden = np.array(sorted(hidden), np.int64)
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self._seen = np.unique(prompt).astype(np.int64) if sampling.repetition_penalty != 1 else np.empty(0, np.int64)
        self._taken = 0

    def choose(self, logits: np.ndarray, position: int) -> tuple[int, TokenLogprob | None]:
        """logits [vocab] f32, left as they are -> the token at `position` of the sequence, and its log-probability if
        asked for.

        Raises FloatingPointError when the logits are no numbers.
        """
        sampling, raw = self.sampling, logits
        if self._taken < sampling.min_tokens and len(self._hidden):
            logits = logits.copy()
            logits[self._hidden] = -np.inf
        if sampling.penalised:
            logits = self._penalise(logits)
        if sampling.temperature == 0:
            token = best(logits)
        else:
            token = draw(distribution(logits, sampling), uniform(self.seed, position))
        self._taken += 1
        if sampling.penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token, None if sampling.logprobs is None else logprob(raw, token, sampling.logprobs)

    def draw(self, position: int) -> Draw | None:
        """How the token at `position` is drawn where nothing but the row itself decides; None where more does."""
        s = self.sampling
        if s.penalised or s.logprobs is not None or (s.min_tokens and len(self._hidden)):
            return None
        return Draw(s.temperature, s.top_k, s.top_p, s.min_p, uniform(self.seed, position))

    def _penalise(self, logits: np.ndarray) -> np.ndarray:
        sampling, logits = self.sampling, logits.copy()
        answer = np.fromiter(self._counts, np.int64, len(self._counts))
        if sampling.repetition_penalty != 1:
            seen = np.union1d(self._seen, answer)
            there = logits[seen]
            penalty = np.float32(sampling.repetition_penalty)
            logits[seen] = np.where(there > 0, there / penalty, there * penalty)
        if len(answer):
            counts = np.fromiter(self._counts.values(), np.float32, len(answer))
            logits[answer] -= sampling.frequency_penalty * counts + np.float32(sampling.presence_penalty)
        return logits


def best(logits: np.ndarray) -> int:
    """The lowest id of the highest logit."""
    token = int(logits.argmax())
    if not logits[token] > -np.inf:  # argmax finds a nan before anything else
        raise FloatingPointError(f"{OVERFLOW} (token {token} has {logits[token]})")
    return token


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """-> ids in rising order, and their weights (not summing to one): what temperature and the filters leave.

    top_k keeps the k best logits and those equal to the k-th; top_p the fewest best whose probability reaches top_p
    (of equal ones the lowest ids); min_p those with at least min_p times the best one's probability.
    """
    top = logits[best(logits)]
    ids = None
    if 0 < sampling.top_k < len(logits):
        ids = highest(logits, sampling.top_k)
        logits = logits[ids]
    weights = np.exp((logits - top) / np.float32(max(sampling.temperature, 1e-6)))
    keep = None
    if sampling.top_p < 1:
        keep = _nucleus(weights, sampling.top_p)
    if sampling.min_p > 0:
        above = np.flatnonzero(weights >= np.float32(sampling.min_p))  # the best one's weight is 1
        keep = above if keep is None else np.intersect1d(keep, above)
    if keep is not None:
        weights, ids = weights[keep], keep if ids is None else ids[keep]
    return np.arange(len(weights)) if ids is None else ids, weights


def highest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices, rising, of the k highest values and of those equal to the k-th; 0 < k <= n."""
    few, n = None, len(values) // _STRANDS
    if n > 4 * k:
        # The k-th highest of the strands' maxima is at most the k-th highest of all.
        strands = values[: n * _STRANDS].reshape(_STRANDS, n).max(axis=0)
        few = np.flatnonzero(values >= np.partition(strands, n - k)[n - k])
        values = values[few]
    chosen = np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    return chosen if few is None else few[chosen]


_STRANDS = 64  # a long row is first looked at as columns of so many values: many times quicker than sorting it


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    total = weights.sum(dtype=np.float64)
    # Tokens below this weight have less than 1 - top_p together, so none of them is needed: sort the rest only.
    few = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    order = few[np.argsort(-weights[few], kind="stable")]
    reached = np.searchsorted(np.cumsum(weights[order].astype(np.float64)), top_p * total)
    return np.sort(order[: int(reached) + 1])


def draw(candidates: tuple[np.ndarray, np.ndarray], u: float) -> int:
    """The id at the share u in [0, 1) of the summed weights, which are summed in strands when there are many."""
    ids, weights = candidates
    n = len(weights) // _STRANDS
    if n < _STRANDS:
        return int(ids[_share(weights, u)[0]])
    strands = weights[: n * _STRANDS].reshape(_STRANDS, n)
    tail = weights[n * _STRANDS :]
    strand, u = _share(np.append(strands.sum(axis=0), tail.sum()), u)
    if strand == n:
        return int(ids[n * _STRANDS + _share(tail, u)[0]])
    return int(ids[_share(strands[:, strand], u)[0] * n + strand])


def _share(weights: np.ndarray, u: float) -> tuple[int, float]:
    """-> the index at the share u of the summed weights, and the share of its own weight at which it was met."""
    sums = np.cumsum(weights.astype(np.float64))
    at = u * sums[-1]
    i = min(int(np.searchsorted(sums, at, side="right")), int(np.flatnonzero(weights)[-1]))
    before = float(sums[i - 1]) if i else 0.0
    return i, min(max((at - before) / float(weights[i]), 0.0), 1.0)


def logprob(logits: np.ndarray, token: int, k: int) -> TokenLogprob:
    """Log-probability of a token and of the k best, of equal ones the lowest ids."""
    total = log_sum_exp(logits)
    top: dict[int, float] = {}
    if k:
        candidates = highest(logits, min(k, len(logits)))
        order = candidates[np.argsort(-logits[candidates], kind="stable")][:k]
        top = {int(i): float(logits[i] - total) for i in order}
    return TokenLogprob(token, float(logits[token] - total), top)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """[…, vocab] f32 -> […] float64: log-probabilities are the logits less this."""
    top = logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64)) + top[..., 0]


_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone: Philox4x64-10, a counter-based generator (Salmon et
    al., Parallel random numbers: as easy as 1, 2, 3, 2011)."""
    x0, x1, x2, x3 = position & _MASK, 0, 0, 0
    k0, k1 = seed & _MASK, 0
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (b >> 64) ^ x1 ^ k0, b & _MASK, (a >> 64) ^ x3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return (x0 >> 11) * 2.0**-53
