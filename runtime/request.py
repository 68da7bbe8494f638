"""What a caller asked for and what came of it: the engine fills it, callers wait on it from any thread."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from .errors import OVERFLOW
from .sampler import GREEDY, Draw, Sampler, Sampling, TokenLogprob, best, log_sum_exp
from .scheduler import Sequence
from .text import Detokenizer


@dataclass(frozen=True)
class Chunk:
    """What one step added to an answer. `text` may be empty while a character or a stop string is not certain yet."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. token_ids has the token that ended it; text has neither that nor a stop string.

    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the context is full), "cancelled".
    usage: prompt_tokens, completion_tokens, total_tokens, cached_tokens (of the prompt, not computed again).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    usage: dict[str, int] = field(default_factory=dict)


class Job:
    """A sequence, and what is done with its logits."""

    def __init__(self, sequence: Sequence):
        self.sequence = sequence
        self.cancelled = False  # asked for by the caller, seen by the engine before its next step
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def accept(self, logits: np.ndarray) -> bool:
        """Take the logits of this step's rows [k, vocab]; True when nothing more is wanted. Called by the engine."""
        raise NotImplementedError

    def draw(self) -> Draw | None:
        """How its next token is to be drawn from its row of logits; None where it wants the logits themselves."""
        return None

    def take(self, token: int) -> bool:
        """Take the token that was drawn as `draw` said; True when nothing more is wanted. Called by the engine."""
        raise NotImplementedError

    def finish(self, error: BaseException | None = None) -> None:
        """Its pages are back: wake who waits. Called by the engine, once."""
        self._error = error
        self._done.set()

    def wait(self, timeout: float | None = None) -> None:
        """Raises TimeoutError, or what went wrong in the engine."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the request is not done after {timeout} s")
        if self._error is not None:
            raise self._error


class Request(Job):
    """An answer in the making. Iterate over its chunks, or wait for `result()`; `cancel()` ends it early."""

    def __init__(
        self,
        prompt: np.ndarray,
        sampling: Sampling,
        *,
        context: int,
        eos_token_ids: tuple[int, ...] = (),
        detokenizer: Detokenizer | None = None,
        wake: Callable[["Request"], None] = lambda request: None,
        listen: Callable[[Chunk | None], None] | None = None,
    ):
        """prompt [n] i32, not empty, at most `context` tokens. wake(request): tell the engine that it was cancelled.
        listen(chunk): called by the engine with every chunk, and None at the end."""
        super().__init__(Sequence(prompt, min(len(prompt) + sampling.max_tokens - 1, context)))
        self.sampling = sampling
        self._prompt_tokens = len(prompt)
        self._ends = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        )
        self._sampler = None if sampling.plain else Sampler(sampling, prompt, self._ends)
        self._detokenizer = detokenizer
        self._wake = wake
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        self._listen = listen or self._chunks.put
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason = ""  # until it has one

    def accept(self, logits: np.ndarray) -> bool:
        if self._sampler is None:
            return self._go_on(best(logits[-1]), None)
        return self._go_on(*self._sampler.choose(logits[-1], self.sequence.length))

    def draw(self) -> Draw | None:
        if self._sampler is None:
            return GREEDY
        return self._sampler.draw(self.sequence.length)

    def take(self, token: int) -> bool:
        if token < 0:
            raise FloatingPointError(OVERFLOW)
        return self._go_on(token, None)

    def _go_on(self, token: int, logprob: TokenLogprob | None) -> bool:
        sequence, sampling = self.sequence, self.sampling
        self._ids.append(token)
        text = ""
        if token in self._ends:
            self._reason = "stop"
        elif self._detokenizer is not None:
            text = self._detokenizer.push(token, may_stop=len(self._ids) > sampling.min_tokens)
            if self._detokenizer.stopped:
                self._reason = "stop"
        if not self._reason and (len(self._ids) == sampling.max_tokens or sequence.length == sequence.limit):
            self._reason = "length"
        if not self._reason:
            sequence.buffer[sequence.length] = token
            sequence.length += 1
        elif self._detokenizer is not None:
            text += self._detokenizer.flush()
        if text:
            self._texts.append(text)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._listen(Chunk(text, [token], self._reason or None, None if logprob is None else [logprob]))
        return bool(self._reason)

    def finish(self, error: BaseException | None = None) -> None:
        if not self._reason and error is None:
            self._reason = "cancelled"
            text = self._detokenizer.flush() if self._detokenizer is not None else ""
            self._texts.append(text)
            self._listen(Chunk(text, [], "cancelled"))
        super().finish(error)
        self._listen(None)

    def cancel(self) -> None:
        """End it before the engine's next step; its pages come back. Without effect once it is done."""
        self.cancelled = True
        self._wake(self)

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer. Raises TimeoutError after `timeout` seconds, or what went wrong."""
        self.wait(timeout)
        total = self._prompt_tokens + len(self._ids)
        usage = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": len(self._ids),
            "total_tokens": total,
            "cached_tokens": self.sequence.reused or 0,
        }
        logprobs = None if self.sampling.logprobs is None else list(self._logprobs)
        return Completion("".join(self._texts), list(self._ids), self._reason, logprobs, usage)

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks from here on; one iterator a request. Raises what went wrong after the last."""
        while (chunk := self._chunks.get()) is not None:
            yield chunk
        self._chunks.put(None)  # a later iterator ends at once
        self.wait()


class Logits(Job):
    """Logits of every token of a fresh sequence."""

    def __init__(self, tokens: np.ndarray):
        super().__init__(Sequence(tokens, len(tokens), every_row=True))
        self._parts: list[np.ndarray] = []
        self._seen = 0

    def accept(self, logits: np.ndarray) -> bool:
        self._keep(logits, self._seen)
        self._seen += len(logits)
        return self._seen == self.sequence.length

    def _keep(self, logits: np.ndarray, start: int) -> None:
        self._parts.append(logits.copy())

    def result(self) -> np.ndarray:
        """[n, vocab] float32."""
        self.wait()
        return np.concatenate(self._parts)


class Scores(Logits):
    """Log-probability of every token but the first, given those before it."""

    def _keep(self, logits: np.ndarray, start: int) -> None:
        tokens = self.sequence.buffer[start + 1 : start + 1 + len(logits)]
        # Row by row: the exponentials of a whole step can take more memory than the model.
        self._parts.append(np.array([row[t] - log_sum_exp(row) for row, t in zip(logits, tokens, strict=False)]))

    def result(self) -> np.ndarray:
        """[n - 1] float64."""
        return super().result()
