"""The sweep's models: every type has one, with the structure that faults hide in."""

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmc.bench import configs

BUILT = [name for name in configs.names() if name not in configs.UNBUILT]


def test_every_type_of_the_mapping_is_there():
    names = configs.names()
    assert len(names) == len(set(names))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(names)


def test_tables_name_types_that_exist():
    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(configs.OWN) <= types
    assert set(configs.UNBUILT) <= types
    assert {variant.model_type for variant in configs.VARIANTS.values()} <= types
    refused = [name for names in configs.REFUSED.values() for name in names]
    assert len(refused) == len(set(refused))
    assert set(refused) <= set(configs.names())


@pytest.mark.parametrize("name", BUILT)
def test_config_is_small_and_of_its_type(name):
    config = configs.config(name)
    assert type(config) is CONFIG_MAPPING[configs.variant(name).model_type]
    text = config.get_text_config()
    assert text.vocab_size <= 1024
    layers = getattr(text, "num_hidden_layers", 3)
    assert 1 <= layers <= 4


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "phi3"])
def test_windows_lie_inside_the_lengths_compared(name):
    config = configs.config(name)
    assert config.sliding_window == 9
    if kinds := getattr(config, "layer_types", None):
        assert "sliding_attention" in kinds


def test_structure_of_some_types():
    assert configs.config("llama4_text").attention_chunk_size == 8
    assert configs.config("gemma2").attn_logit_softcapping == 4.0
    assert configs.config("gemma3").get_text_config().sliding_window == 9
    latent = configs.config("deepseek_v3")
    assert (latent.kv_lora_rank, latent.v_head_dim, latent.n_group) == (24, 20, 2)
    experts = configs.config("qwen2_moe")
    assert (experts.num_experts, experts.num_experts_per_tok, experts.mlp_only_layers) == (4, 2, [1])
    assert configs.config("llama").num_key_value_heads == 2
    for kind in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        assert configs.config(f"llama+{kind}").rope_parameters["rope_type"] == kind


def test_distinct_cycles_kinds():
    assert configs.distinct(["a", "a", "b"]) == ["a", "b", "a"]
    assert configs.distinct("abcd") == ["a", "b", "c", "d"]
