"""What a card can do at best: its measured speeds, and the least that a model of Llama's shape moves and computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class NoCard(Exception):
    """There is nothing here to measure on; the message says what was looked for."""


@dataclass(frozen=True)
class Card:
    """bandwidth: of a copy, bytes read and written a second; matmul: of a product of large square matrices, FLOP/s."""

    name: str
    kind: str  # "cuda", "rocm" or "cpu": the kind of target that runs on it
    dtype: str  # of the matrices
    bandwidth: float
    matmul: float


def kind(device: str) -> str:
    """The kind of target that runs on a device of PyTorch. Raises NoCard: there is no such device here."""
    import torch

    if device == "cpu":
        return "cpu"
    if device != "cuda":
        raise NoCard(f"device {device!r}: expected cuda (AMD's cards go by that name too) or cpu")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "the CPU alone"
        raise NoCard(
            f"expected a GPU that PyTorch can use, found none (PyTorch {torch.__version__}, built for {built}); run "
            "this on a machine with a card and its driver, or try it out with --device cpu"
        )
    return "rocm" if torch.version.hip else "cuda"


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def measure(
    device: str, dtype: str = "bfloat16", *, copied: int = 1 << 30, size: int = 8192, repeats: int = 10
) -> Card:
    """The card's own speeds: copying `copied` bytes, multiplying matrices [size, size] of random numbers (equal ones
    take less power and are faster). Medians. Raises NoCard."""
    import torch

    found = kind(device)
    name = torch.cuda.get_device_name() if found != "cpu" else "cpu"
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    copying = _seconds(device, repeats, torch.empty_like(source).copy_, source)
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(getattr(torch, dtype)) for _ in range(2))
    multiplying = _seconds(device, repeats, torch.matmul, a, b)
    return Card(name, found, dtype, 2 * copied / copying, 2 * size**3 / multiplying)


def _seconds(device: str, repeats: int, work: Callable, *arguments: Any) -> float:
    for _ in range(3):
        work(*arguments)
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work(*arguments)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@dataclass(frozen=True)
class Cost:
    """Bytes that have to be moved, and floating-point operations."""

    bytes: float
    flops: float

    def seconds(self, card: Card) -> float:
        """The least time it takes: the longer of the two, as they overlap."""
        return max(self.bytes / card.bandwidth, self.flops / card.matmul)


@dataclass(frozen=True)
class LlamaCosts:
    """Costs of a model of Llama's shape: each weight is read once a step, an element takes `width` bytes.

    weight_width: bytes of an element of a weight with its share of scales, where that is another number.
    """

    config: Mapping[str, Any]
    width: int
    weight_width: float | None = None

    @property
    def layer(self) -> int:
        """Weights of the products of one layer."""
        c = self.config
        heads = c["num_attention_heads"] + c["num_key_value_heads"]
        return c["hidden_size"] * (2 * heads * c["head_dim"] + 3 * c["intermediate_size"])

    @property
    def head(self) -> int:
        """Weights of the product that makes logits."""
        return self.config["vocab_size"] * self.config["hidden_size"]

    @property
    def cached(self) -> int:
        """Elements that a token leaves in the cache."""
        return 2 * self.config["num_hidden_layers"] * self.config["num_key_value_heads"] * self.config["head_dim"]

    def _of_weights(self, count: int) -> float:
        return count * (self.weight_width or self.width)

    def _attention(self, pairs: float) -> float:
        """FLOP of attention over so many pairs of a token and one that it sees: a product with k, one with v."""
        return (
            4 * self.config["num_hidden_layers"] * self.config["num_attention_heads"] * self.config["head_dim"] * pairs
        )

    def decode(self, batch: int, context: float) -> Cost:
        """A step that makes one token for each of `batch` sequences of `context` tokens."""
        weights = self.config["num_hidden_layers"] * self.layer + self.head
        return Cost(
            self._of_weights(weights) + self.width * batch * context * self.cached,
            2 * weights * batch + self._attention(batch * context),
        )

    def prefill(self, tokens: int) -> Cost:
        """A prompt of `tokens` tokens, with logits for the last."""
        layers = self.config["num_hidden_layers"] * self.layer
        return Cost(
            self._of_weights(layers + self.head) + self.width * tokens * self.cached,
            2 * layers * tokens + 2 * self.head + self._attention(tokens * (tokens + 1) / 2),
        )
