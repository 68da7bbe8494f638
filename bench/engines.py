"""One face for every engine that speed is compared with: seconds of a prefill, seconds of a decode step.

Each engine runs in a process of its own, so that their thread pools and memory do not meet:
`python -m llmc.bench.engines NAME MODEL` reads one JSON command a line from stdin ({"do": "prefill", "tokens": 512} or
{"do": "decode", "context": 128, "batch": 1, "steps": 16}) and answers {"seconds": …}, of the whole prefill or of one
step (the median).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from typing import Protocol

import numpy as np

from llmc.bench.bandwidth import cores


class Engine(Protocol):
    vocab_size: int

    def prefill(self, tokens: int) -> float:
        """Seconds from a fresh prompt of that many tokens to its last token's logits."""

    def decode(self, context: int, batch: int, steps: int) -> float:
        """Seconds of a step that decodes one token of each of `batch` sequences of `context` tokens: the median."""


class Prompts:
    """Random token ids, never the same prompt twice: no engine can reuse a prefix."""

    def __init__(self, vocab_size: int):
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size

    def __call__(self, count: int) -> list[int]:
        return self._random.integers(3, self._vocab_size, count).tolist()


class Llmc:
    """An artifact through the public interface: scheduling, sampling and streaming are in the time."""

    def __init__(self, path: str, target: str | None = None):
        import llmc

        self.model = llmc.load(path, target=target)
        self.vocab_size = self.model.vocab_size
        self.prompts = Prompts(self.vocab_size)

    def prefill(self, tokens: int) -> float:
        prompt = self.prompts(tokens)
        started = time.perf_counter()
        self.model.generate(prompt, max_tokens=1, ignore_eos=True)
        return time.perf_counter() - started

    def decode(self, context: int, batch: int, steps: int) -> float:
        requests = [
            self.model.submit(self.prompts(context), max_tokens=steps + 2 * batch, ignore_eos=True)
            for _ in range(batch)
        ]
        # The last one to be admitted: once it decodes, all do.
        moments = [time.perf_counter() for _ in requests[-1]]
        for request in requests:
            request.result()
        return statistics.median(np.diff(moments)[-steps:])


class Transformers:
    """transformers with sdpa attention and a dynamic cache, as most people run it."""

    def __init__(self, path: str, dtype: str):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(cores())
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.vocab_size = self.model.config.vocab_size
        self.prompts = Prompts(self.vocab_size)

    def _ids(self, batch: int, tokens: int):
        return self.torch.tensor([self.prompts(tokens) for _ in range(batch)])

    def prefill(self, tokens: int) -> float:
        ids = self._ids(1, tokens)
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started

    def decode(self, context: int, batch: int, steps: int) -> float:
        with self.torch.inference_mode():
            out = self.model(input_ids=self._ids(batch, context), use_cache=True, logits_to_keep=1)
            times = []
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                started = time.perf_counter()
                out = self.model(input_ids=token, use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1)
                times.append(time.perf_counter() - started)
        return statistics.median(times)


class LlamaCpp:
    """llama.cpp through its C interface (the llama-cpp-python package)."""

    def __init__(self, path: str):
        import llama_cpp as c

        self.c = c
        c.llama_backend_init()
        c.llama_log_set(c.llama_log_callback(lambda *_: None), None)
        self._silent = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._silent, None)
        self.weights = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self.weights:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.weights))
        self.prompts = Prompts(self.vocab_size)

    def _context(self, tokens: int, batch: int):
        c = self.c
        params = c.llama_context_default_params()
        params.n_ctx = (tokens + 32) * batch
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = cores()
        return c.llama_init_from_model(self.weights, params)

    def _decode(self, context, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, wants logits)"""
        c = self.c
        batch = c.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        status = c.llama_decode(context, batch)
        c.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def prefill(self, tokens: int) -> float:
        context = self._context(tokens, 1)
        rows = [(t, i, 0, i == tokens - 1) for i, t in enumerate(self.prompts(tokens))]
        started = time.perf_counter()
        for at in range(0, tokens, 512):
            self._decode(context, rows[at : at + 512])
        seconds = time.perf_counter() - started
        self.c.llama_free(context)
        return seconds

    def decode(self, context: int, batch: int, steps: int) -> float:
        state = self._context(context + steps, batch)
        for sequence in range(batch):
            rows = [(t, i, sequence, i == context - 1) for i, t in enumerate(self.prompts(context))]
            for at in range(0, context, 512):
                self._decode(state, rows[at : at + 512])
        times = []
        for step in range(steps):
            tokens = self.prompts(batch)
            started = time.perf_counter()
            self._decode(state, [(t, context + step, s, True) for s, t in enumerate(tokens)])
            times.append(time.perf_counter() - started)
        self.c.llama_free(state)
        return statistics.median(times)


def make(name: str, path: str) -> Engine:
    if name == "llama.cpp":
        return LlamaCpp(path)
    if name.startswith("transformers-"):
        return Transformers(path, name.removeprefix("transformers-"))
    return Llmc(path)


def serve(name: str, path: str) -> None:
    started = time.perf_counter()
    engine = make(name, path)
    print(json.dumps({"load_seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        seconds = getattr(engine, command.pop("do"))(**command)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[variable] = str(cores())
    serve(*sys.argv[1:3])
