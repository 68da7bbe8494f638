"""One face for every engine that speed is compared with: seconds of a prefill, seconds of a decode step.

Each engine runs in a process of its own, so that their thread pools and memory do not meet:
`python -m llmc.bench.engines NAME MODEL` reads one JSON command a line from stdin ({"do": "prefill", "tokens": 512} or
{"do": "decode", "context": 128, "batch": 1, "steps": 16}) and answers {"seconds": …}, of the whole prefill or of one
step (the median). With --cpu-time it keeps to one core and its seconds are those that the process computed, which says
something on a machine that others use too.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from llmc.bench.bandwidth import cores

clock = time.perf_counter


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
        started = clock()
        self.model.generate(prompt, max_tokens=1, ignore_eos=True)
        return clock() - started

    def decode(self, context: int, batch: int, steps: int) -> float:
        requests = [
            self.model.submit(self.prompts(context), max_tokens=steps + 2 * batch, ignore_eos=True)
            for _ in range(batch)
        ]
        # The last one to be admitted: once it decodes, all do.
        moments = [clock() for _ in requests[-1]]
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
            started = clock()
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return clock() - started

    def decode(self, context: int, batch: int, steps: int) -> float:
        with self.torch.inference_mode():
            out = self.model(input_ids=self._ids(batch, context), use_cache=True, logits_to_keep=1)
            times = []
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                started = clock()
                out = self.model(input_ids=token, use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1)
                times.append(clock() - started)
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
        started = clock()
        for at in range(0, tokens, 512):
            self._decode(context, rows[at : at + 512])
        seconds = clock() - started
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
            started = clock()
            self._decode(state, [(t, context + step, s, True) for s, t in enumerate(tokens)])
            times.append(clock() - started)
        self.c.llama_free(state)
        return statistics.median(times)


class CTranslate2:
    """A converted folder, decoded greedily."""

    def __init__(self, path: str):
        import ctranslate2

        self.generator = ctranslate2.Generator(path, device="cpu", intra_threads=cores(), inter_threads=1)
        self.words = json.loads((Path(path) / "vocabulary.json").read_text())
        self.vocab_size = len(self.words)
        self.prompts = Prompts(self.vocab_size)

    def _generate(self, context: int, batch: int, tokens: int) -> list[float]:
        """Moments: of the start, and of every token of the first sequence."""
        prompts = [[self.words[t] for t in self.prompts(context)] for _ in range(batch)]
        moments = [clock()]

        def token(result) -> bool:
            if result.batch_id == 0:
                moments.append(clock())
            return False

        self.generator.generate_batch(
            prompts,
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=token,
        )
        return moments

    def prefill(self, tokens: int) -> float:
        moments = self._generate(tokens, 1, 1)
        return moments[1] - moments[0]

    def decode(self, context: int, batch: int, steps: int) -> float:
        return statistics.median(np.diff(self._generate(context, batch, steps + 1))[1:])


class OnnxRuntimeGenAI:
    """A folder that onnxruntime-genai's model builder made, decoded greedily."""

    def __init__(self, path: str):
        import onnxruntime_genai

        self.module = onnxruntime_genai
        file = Path(path) / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = cores()
        file.write_text(json.dumps(config, indent=1))
        self.model = onnxruntime_genai.Model(path)
        self.vocab_size = config["model"]["vocab_size"]
        self.prompts = Prompts(self.vocab_size)

    def _generate(self, context: int, batch: int, steps: int) -> list[float]:
        """Seconds of the prompt with its first token, and of every further token."""
        params = self.module.GeneratorParams(self.model)
        length = context + steps + 1
        params.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator = self.module.Generator(self.model, params)
        ids = np.array([self.prompts(context) for _ in range(batch)], np.int32)
        started = clock()
        generator.append_tokens(ids)
        times = []
        for _ in range(steps + 1):
            generator.generate_next_token()
            ended = clock()
            times.append(ended - started)
            started = ended
        return times

    def prefill(self, tokens: int) -> float:
        return self._generate(tokens, 1, 0)[0]

    def decode(self, context: int, batch: int, steps: int) -> float:
        return statistics.median(self._generate(context, batch, steps)[1:])


def make(name: str, path: str) -> Engine:
    if name.startswith("llama.cpp"):
        return LlamaCpp(path)
    if name.startswith("ctranslate2"):
        return CTranslate2(path)
    if name.startswith("onnxruntime-genai"):
        return OnnxRuntimeGenAI(path)
    if name.startswith("transformers-"):
        return Transformers(path, name.removeprefix("transformers-"))
    return Llmc(path)


def serve(name: str, path: str) -> None:
    started = clock()
    engine = make(name, path)
    print(json.dumps({"load_seconds": clock() - started}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        seconds = getattr(engine, command.pop("do"))(**command)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    if sys.argv[3:] == ["--cpu-time"]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        clock = time.process_time
    for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[variable] = str(cores())
    serve(*sys.argv[1:3])
