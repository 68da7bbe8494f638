"""Small random models, saved as their publishers save them, and what transformers computes with them."""

import numpy as np
import pytest
import torch
import transformers

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": BASE,
    "gemma2": BASE
    | SLIDING
    | {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt_oss": BASE | SLIDING | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": BASE
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama4_text": BASE
    | {
        "head_dim": 16,
        "attention_chunk_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "olmo": BASE,
    "roberta": BASE | {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0},
    "phi3": BASE
    | {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": 64,
        },
    },
}


def make(kind, seed=0, **changes):
    """A random model of a small config in float32 that computes with transformers' eager attention and experts."""
    config = transformers.CONFIG_MAPPING[kind](**CONFIGS[kind] | changes)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if "score_correction" in name or value.ndim != 1:
                value.copy_(torch.randn_like(value) * (1.0 / value.shape[-1] ** 0.5))
            else:
                value.copy_(torch.randn_like(value) * 0.3 + 1.0)
    return model


def logits(model, tokens):
    """transformers' own logits of one sequence, [n, vocab] float32."""
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0].float().numpy()


@pytest.fixture
def make_model():
    """make_model(kind, seed=0, **changes of the config) -> a small random transformers model."""
    return make


@pytest.fixture
def transformers_logits():
    """transformers_logits(model, tokens) -> [n, vocab] float32."""
    return logits


@pytest.fixture
def imported_logits():
    """imported_logits(imported, tokens) -> [n, vocab] float32, by reference evaluation."""

    def run(imported, tokens):
        from llmc.ir.evaluate import evaluate

        tokens = np.asarray(tokens, "int32")[None]
        positions = np.arange(tokens.shape[1], dtype="int32")[None]
        return evaluate(imported.module, [tokens, positions, *[w.read() for w in imported.weights.values()]])[0]

    return run
