"""What a card can do, and what a model of Llama's shape needs: the arithmetic."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmc.bench import roof

CONFIG = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
)
CARD = roof.Card("a card", "cuda", "bfloat16", bandwidth=1e12, matmul=1e14)


def test_weights_are_counted_as_the_model_has_them():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG, tie_word_embeddings=False))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n)
    costs = roof.LlamaCosts(CONFIG, 2)
    assert 3 * costs.layer + costs.head == matrices


def test_a_step_reads_every_weight_once_and_the_cache_of_every_sequence():
    costs = roof.LlamaCosts(CONFIG, 2)
    weights = 3 * costs.layer + costs.head
    one, eight = costs.decode(1, 100), costs.decode(8, 100)
    cached = 100 * 3 * 2 * (2 * 16)  # tokens, layers, k and v, heads of 16
    assert one.bytes == 2 * (weights + cached) and eight.bytes == 2 * (weights + 8 * cached)
    assert one.flops == 2 * weights + 3 * 6 * 100 * 4 * 16 and eight.flops == 8 * one.flops


def test_a_prompt_makes_logits_once():
    costs = roof.LlamaCosts(CONFIG, 2)
    assert costs.prefill(1).flops == costs.decode(1, 1).flops
    long = costs.prefill(1000)
    assert long.flops == 2 * 3 * costs.layer * 1000 + 2 * costs.head + 3 * 6 * 4 * 16 * 1000 * 1001 / 2
    assert long.bytes == 2 * (3 * costs.layer + costs.head + 1000 * costs.cached)


def test_the_roof_is_the_longer_of_moving_and_computing():
    assert roof.Cost(bytes=2e12, flops=1e14).seconds(CARD) == 2
    assert roof.Cost(bytes=1e12, flops=3e14).seconds(CARD) == 3


def test_a_card_is_measured():
    card = roof.measure("cpu", "float32", copied=1 << 20, size=64, repeats=2)
    assert (card.name, card.kind, card.dtype) == ("cpu", "cpu", "float32")
    assert 0 < card.bandwidth < math.inf and 0 < card.matmul < math.inf


def test_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(roof.NoCard, match=r"expected a GPU that PyTorch can use, found none \(PyTorch .*--device cpu"):
        roof.kind("cuda")
    with pytest.raises(roof.NoCard, match="'tpu': expected cuda"):
        roof.kind("tpu")


def test_kinds_of_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert roof.kind("cuda") == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert roof.kind("cuda") == "rocm"
