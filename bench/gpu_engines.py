"""What `bench/gpu.py` compares: llmc, and transformers with torch.compile and a static cache, on the same card.

Each runs in a process of its own (`gpu.worker`), after one another: both need the card's memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.bench.engines import Llmc, Prompts
from llmc.bench.packed import PackedError, unpack
from llmc.bench.packed_codes import Decoded
from llmc.bench.roof import synchronize
from llmc.runtime import artifact
from llmc.runtime.errors import ArtifactError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 8192  # tokens that fill the baseline's cache at a time


class LlmcOnCard(Llmc):
    """An artifact through the public interface: scheduling, sampling and streaming are in the time."""

    def steps(self, context: int, batch: int, steps: int) -> tuple[float, float]:
        """-> (seconds of a decode step of `batch` sequences: the median; tokens of context that a sequence had then).

        Prompts join one after the other, so that the first ones are further on when the last one decodes: the tokens
        that they have by then are counted.
        """
        room = self.model.max_context - context
        if room <= steps:
            raise ArtifactError(
                f"expected a context of more than {context + steps} tokens, found {self.model.max_context}; "
                "compile with a larger max_context"
            )
        requests = [
            self.model.submit(self.prompts(context), max_tokens=min(room, 2 * steps + 4 * batch), ignore_eos=True)
            for _ in range(batch)
        ]
        moments = []
        for _ in requests[-1]:  # the last one to be admitted: once it decodes, all do
            moments.append(time.perf_counter())
            if len(moments) > steps:
                break
        for request in requests:
            request.cancel()
        made = statistics.mean(len(request.result().token_ids) for request in requests)
        return statistics.median(np.diff(moments)), context + made - steps / 2

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[n, vocab] float32"""
        return self.model.logits([tokens])[0]


class Baseline:
    """transformers, with the artifact's weights: decode compiled over a static cache; for a prefill the faster of that
    and of its eager way with a dynamic cache, which has attention kernels of its own."""

    def __init__(self, path: str, target: str, config: Mapping[str, Any], device: str, compiled: bool = True):
        import torch

        self.torch, self.device, self.compiled = torch, device, compiled
        manifest = artifact.read(Path(path))
        entry = artifact.choose_target(manifest, target)
        self.model = load_model(path, manifest, entry, config, device)
        self.dtype = self.model.dtype
        self.prompts = Prompts(config["vocab_size"])

    def _compile(self, function, **options):
        self.torch._dynamo.reset()  # each shape is compiled afresh, and none counts as a recompilation
        return self.torch.compile(function, dynamic=False, **options) if self.compiled else function

    def _cache(self, length: int):
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=length)

    def _ids(self, batch: int, tokens: int):
        return self.torch.tensor([self.prompts(tokens) for _ in range(batch)], device=self.device)

    def _forward(self, ids, cache):
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def steps(self, context: int, batch: int, steps: int) -> tuple[float, float]:
        """-> (seconds of a decode step, the mean; tokens of context that a sequence had)"""
        torch, warm = self.torch, 3
        with torch.inference_mode():
            cache = self._cache(context + steps + warm)
            ids = self._ids(batch, context)
            for piece in ids.split(max(1, CHUNK // batch), 1):
                logits = self._forward(piece, cache)
            token = logits[:, -1].argmax(-1, keepdim=True)
            del logits
            step = self._compile(
                lambda token: self._forward(token, cache)[:, -1].argmax(-1, keepdim=True),
                fullgraph=True,
                mode=None if self.device == "cpu" else "reduce-overhead",
            )
            for at in range(steps + warm):
                if at == warm:
                    synchronize(self.device)
                    started = time.perf_counter()
                torch.compiler.cudagraph_mark_step_begin()
                token = step(token).clone()
            synchronize(self.device)
            return (time.perf_counter() - started) / steps, context + warm + steps / 2

    def prefill(self, tokens: int) -> float:
        """Seconds from a fresh prompt of that many tokens to its last token's logits: the best way's median."""
        with self.torch.inference_mode():
            ids, cache = self._ids(1, tokens), self._cache(tokens)
            self._forward(ids, cache)  # sets up the cache, which a compiled function can't
            compiled = self._compile(lambda: self._forward(ids, cache))

            def static():
                cache.reset()
                return compiled()

            ways = [static, lambda: self._forward(ids, None)]
            return min(self._median(way) for way in ways)

    def _median(self, way, repeats: int = 5) -> float:
        times = []
        for _ in range(repeats + 2):
            synchronize(self.device)
            started = time.perf_counter()
            way()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[n, vocab] float32, of the model as it is."""
        with self.torch.inference_mode():
            ids = self.torch.tensor([tokens], device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()

    def exact_logits(self, tokens: list[int]) -> np.ndarray:
        """[n, vocab], computed in float32 from the same weights. The model is of float32 from then on."""
        self.model = self.model.float()
        return self.logits(tokens)


def load_model(path: str, manifest, entry, config: Mapping[str, Any], device: str):
    """transformers' model of a config with the weights of an artifact's target -> torch.nn.Module in its dtype.

    Quantized weights are the floats that their codes stand for.

    The table of tokens and the head may be packed differently, and then random numbers differ: they are two here even
    where the config ties them. Raises PackedError: the artifact's weights are not those of the config.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    facts = {
        key: value for key, value in config.items() if key not in ("architectures", "dtype", "tie_word_embeddings")
    }
    made = CONFIG_MAPPING[facts.pop("model_type")](**facts, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            made, dtype=getattr(torch, manifest.model["dtype"]), attn_implementation="sdpa"
        )
    with torch.device(device):
        rotary = type(model.model.rotary_emb)(made)  # its buffers are computed, not loaded
    model = model.to_empty(device=device).eval()
    model.model.rotary_emb = rotary
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    weights = artifact.check(Path(path), manifest, entry)
    missing = set(parameters)
    for function, renamed in (("embed", EMBEDDING), ("step", HEAD)):
        names, quantization = entry.functions[function].weights, manifest.model.get("quantization")
        floats = Decoded(weights, names, quantization, manifest.model["dtype"])
        for name, array in unpack(floats, list(floats), shapes):
            name = renamed if name == EMBEDDING else name
            _assign(parameters[name], np.ascontiguousarray(array))
            missing.discard(name)
    if missing:
        raise PackedError(f"the model has a weight {min(missing)}, and the artifact has none of that name")
    return model


def _assign(parameter, array: np.ndarray) -> None:
    """Put an array into a parameter; uint16 are the bits of bfloat16."""
    import torch

    tensor = torch.from_numpy(array)
    with torch.no_grad():
        parameter.copy_(tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor)
