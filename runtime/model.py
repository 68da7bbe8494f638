"""A loaded artifact: generate, stream, logits, score. Everything runs on one engine, from any thread."""

import asyncio
import json
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import artifact
from .devices import open_executor
from .engine import Engine
from .errors import ArtifactError, RequestError
from .request import Chunk, Completion, Job, Logits, Request, Scores
from .sampler import Sampling
from .text import Detokenizer, Tokenizer

KEEP_IDLE = 8192  # tokens kept for their content, at least, where the cache grows on demand

Prompt = str | Sequence[int] | Sequence[dict]


def load(
    path: str | Path,
    *,
    target: str | None = None,
    device: int = 0,
    cache_tokens: int | None = None,
    batch_invariant: bool = False,
) -> "Model":
    """Load an artifact.

    target: one of the artifact's ("cpu", "cuda", "cuda:sm_90"); default: the best one this machine can run.
    device: which of the machine's GPUs. cache_tokens: size of the page pool in tokens; default: on a CPU it grows on
    demand, up to half of the free memory; on a GPU it takes what 90% of the free memory leaves. batch_invariant: the
    numbers of a sequence are the same bits whatever else runs beside it: on a GPU by kernels that are slower where
    sequences are few; a CPU's always are, in float32. Raises ArtifactError: not an artifact, damaged, another format or
    ABI version, no target for this machine, a driver too old, a model too large for the device; RequestError:
    batch_invariant where kernels can't be. The libraries are native code: load artifacts from those you trust.
    """
    folder = Path(path)
    manifest = artifact.read(folder)
    entry = artifact.choose_target(manifest, target)
    if cache_tokens is not None and (
        isinstance(cache_tokens, bool) or not isinstance(cache_tokens, int) or cache_tokens < 1
    ):
        raise RequestError(f"cache_tokens: expected a whole number of at least 1, found {cache_tokens!r}")
    executor = open_executor(
        folder, manifest, entry, cache_tokens=cache_tokens, device=device, batch_invariant=batch_invariant
    )
    tokenizer = Tokenizer(folder, list(manifest.files)) if "tokenizer.json" in manifest.files else None
    ends = _eos_token_ids(folder, manifest)
    # A GPU's pool is set aside anyway: all of it may hold what was computed.
    keep = (
        None
        if cache_tokens is not None or entry.kind != "cpu"
        else max(KEEP_IDLE, int(manifest.model.get("max_context") or 0))
    )
    keep_pages = None if keep is None else -(-keep // entry.state[0].page_size)
    engine = Engine(executor, keep_idle=keep_pages)
    return Model(manifest, engine, tokenizer, ends, entry.target)


def _eos_token_ids(folder: Path, manifest: artifact.Manifest) -> tuple[int, ...]:
    """What ends an answer: generation_config.json's word, else the model's."""
    found = None
    if "generation_config.json" in manifest.files:
        try:
            found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{folder / 'generation_config.json'}: expected a JSON object, found {error}"
            ) from error
    if found is None:
        found = manifest.model.get("eos_token_ids")
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)


class Model:
    """A model that is ready to run; made by `load`. Close it, or use it as a context manager.

    tokenizer: encode, decode, apply_chat_template; None if the artifact has none. info: the manifest. target:
    the one of the artifact's targets that runs.
    """

    def __init__(
        self,
        manifest: artifact.Manifest,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        target: str = "",
    ):
        self.info = manifest
        self.target = target
        self.tokenizer = tokenizer
        self.engine = engine
        self.eos_token_ids = eos_token_ids
        self.vocab_size = int(manifest.model["vocab_size"])
        self.max_context = int(manifest.model["max_context"])
        self._finalizer = weakref.finalize(self, engine.close)  # when nobody has it any more, or at exit

    # Generation

    def generate(self, prompts: Any, **sampling: Any) -> Any:
        """One prompt -> Completion; a list of prompts -> list of Completions in that order, computed together.

        A prompt is a str, a list of token ids, or a list of {"role", "content"} messages (one chat). Sampling
        parameters are those of `Sampling`. Raises RequestError for a prompt or parameter that can't be used, TypeError
        for an unknown one.
        """
        if _is_prompt(prompts):
            return self.submit(prompts, **sampling).result()
        requests = [self._request(prompt, sampling) for prompt in prompts]
        self.engine.submit(*requests)
        return self._all(requests)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[Chunk]:
        """Chunks of the answer as they come. Closing the iterator frees its pages."""
        return self._stream(self.submit(prompt, **sampling))

    def _stream(self, request: Request) -> Iterator[Chunk]:
        try:
            yield from request
        finally:
            if not request.done:
                request.cancel()
                request.wait()

    def submit(self, prompt: Prompt, **sampling: Any) -> Request:
        """Join the running batch at the next step, from any thread -> Request: iterable, .result(), .cancel()."""
        request = self._request(prompt, sampling)
        self.engine.submit(request)
        return request

    def asubmit(self, prompt: Prompt, **sampling: Any) -> "AsyncRequest":
        """The same for asyncio: `async for chunk in …`, `await ….result()` (or await it itself), .cancel()."""
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(chunk: Chunk | None) -> None:
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # the loop is closed: nobody listens any more
                request.cancelled = True
                self.engine.wake(request)

        request = self._request(prompt, sampling, listen)
        self.engine.submit(request)
        return AsyncRequest(request, chunks)

    def _request(self, prompt: Prompt, sampling: dict[str, Any], listen=None) -> Request:
        wanted = Sampling.of(**sampling)
        tokens = self._tokens(prompt, wanted.add_special_tokens)
        if wanted.stop and self.tokenizer is None:
            raise RequestError(
                "stop: this artifact has no tokenizer, so stop strings can't be found; use stop_token_ids"
            )
        for token in wanted.stop_token_ids:
            if token >= self.vocab_size:
                raise RequestError(f"stop_token_ids: expected ids below {self.vocab_size}, found {token}")
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, tokens[-8:].tolist(), wanted.stop)
        return Request(
            tokens,
            wanted,
            context=self.max_context,
            eos_token_ids=self.eos_token_ids,
            detokenizer=detokenizer,
            wake=self._wake,
            listen=listen,
        )

    def _wake(self, request: Request) -> None:
        """Tell the engine that a request was cancelled. Requests hold on to this, so a running one keeps its model."""
        self.engine.wake(request)

    # Measurement

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """One ragged call over fresh sequences -> float32 arrays [n_i, vocab], every position."""
        jobs = [Logits(self._tokens(sequence, False)) for sequence in sequences]
        self.engine.submit(*jobs)
        return self._all(jobs)

    def score(self, texts_or_ids: Any) -> list[np.ndarray]:
        """Log-probability of every token but the first, given those before it -> float64 arrays [n_i - 1]."""
        several = [texts_or_ids] if _is_prompt(texts_or_ids) else texts_or_ids
        jobs = [Scores(self._tokens(one, True)) for one in several]
        self.engine.submit(*jobs)
        return self._all(jobs)

    def _all(self, jobs: Sequence[Any]) -> list[Any]:
        """Results in order; if one fails, or the caller is interrupted, the others are not left running."""
        try:
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                _cancel(self.engine, job)
            raise

    # Prompts

    def _tokens(self, prompt: Any, add_special_tokens: bool) -> np.ndarray:
        """-> int32 [n], in the vocabulary, not empty, at most max_context."""
        if isinstance(prompt, str):
            tokens = np.asarray(self._need_tokenizer("text").encode(prompt, add_special_tokens), np.int64)
        elif _is_chat(prompt):
            tokenizer = self._need_tokenizer("a chat")
            text = tokenizer.apply_chat_template(prompt)
            tokens = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)
        else:
            tokens = _ids(prompt)
        if not len(tokens):
            raise RequestError("the prompt is empty: expected at least one token")
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(wrong):
            raise RequestError(f"the prompt has the token id {wrong[0]}: expected ids from 0 to {self.vocab_size - 1}")
        if len(tokens) > self.max_context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens: the model's context is {self.max_context}; shorten the prompt"
            )
        return tokens.astype(np.int32)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"this artifact has no tokenizer: expected a list of token ids, found {what}")
        return self.tokenizer

    def close(self) -> None:
        """Cancel what runs and let go of the cache and the weights. May be called twice."""
        self._finalizer()
        self.engine.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<llmc.Model {self.info.name}: vocabulary {self.vocab_size}, context {self.max_context}>"


class AsyncRequest:
    """A request in asyncio; all of it belongs to the loop it was made in."""

    def __init__(self, request: Request, chunks: "asyncio.Queue[Chunk | None]"):
        self._request = request
        self._chunks = chunks
        self._ended = False

    async def _next(self) -> Chunk | None:
        if self._ended:
            return None
        chunk = await self._chunks.get()
        self._ended = chunk is None
        return chunk

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
        finally:
            if not self._ended:
                self.cancel()
        self._request.wait()

    async def result(self) -> Completion:
        """The whole answer; being cancelled while waiting cancels the request."""
        try:
            while await self._next() is not None:
                pass
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._request.result()

    def __await__(self):
        return self.result().__await__()

    def cancel(self) -> None:
        """End it before the engine's next step."""
        self._request.cancel()


def _cancel(engine: Engine, job: Job) -> None:
    if not job.done:
        job.cancelled = True
        engine.wake(job)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], dict)


def _is_prompt(value: Any) -> bool:
    """One prompt, and not a list of them."""
    if isinstance(value, str):
        return True
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    if not isinstance(value, list | tuple):
        raise RequestError(f"expected a prompt (text, token ids, messages) or a list of prompts, found {value!r:.60}")
    return len(value) == 0 or _is_int(value[0]) or isinstance(value[0], dict)


def _ids(value: Any) -> np.ndarray:
    usable = value.ndim == 1 and value.dtype.kind in "iu" if isinstance(value, np.ndarray) else (
        isinstance(value, list | tuple) and all(_is_int(i) for i in value)
    )  # fmt: skip
    if not usable:
        raise RequestError(f"a prompt is text, a list of token ids or a list of messages, found {value!r:.60}")
    return np.asarray(value, np.int64)
