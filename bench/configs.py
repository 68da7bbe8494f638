"""Small configs with the structure of the real ones, for every causal-LM type that transformers can build.

A type's config is its default one with the sizes of `SMALL` in the fields it has, so that what makes the type itself
(norms, gates, biases, how layers alternate) stays as it is published, and the differences of `OWN`, where a default is
no example of the type: a feature that is off, a size bound to another. `VARIANTS` are further models of a type;
`KINDS` says what of a type stands outside of what llmc compiles, and is the only list by which a refusal is expected.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 3

# Field: its size. Several lie off the powers of two, as real ones do; 6 query heads share 2 key heads.
SMALL: dict[str, Any] = dict(
    # width and depth
    vocab_size=259, hidden_size=96, d_model=96, n_embd=96, emb_dim=96, embedding_size=64, input_embedding_size=64,
    output_embedding_size=80, embedding_dim=96, word_embed_proj_dim=96,
    intermediate_size=160, intermediate_size_mlp=112, ffn_dim=160, dff=160, dim_ff=160, d_inner=160,
    encoder_ffn_dim=64, decoder_ffn_dim=160, ffn_hidden_size=160, dense_intermediate_size=112, feed_forward_size=160,
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS, decoder_layers=LAYERS,
    num_decoder_layers=LAYERS, encoder_layers=1, num_encoder_layers=1,
    max_position_embeddings=512, n_positions=512, max_seq_len=512, model_max_length=512, context_length=512,
    max_target_positions=512, original_max_position_embeddings=128,
    # heads
    num_attention_heads=6, n_head=6, n_heads=6, num_heads=6, decoder_attention_heads=6, encoder_attention_heads=6,
    attention_heads=6, num_decoder_attention_heads=6, num_encoder_attention_heads=6,
    num_key_value_heads=2, num_kv_heads=2, head_dim=24, dim_head=16, d_head=16, kv_channels=16, rotary_dim=8,
    swa_num_attention_heads=6, swa_num_key_value_heads=2, swa_head_dim=24, attention_head_size=16,
    # latent attention: the widths of keys and values differ
    q_lora_rank=40, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20, o_groups=2, o_lora_rank=24,
    # what a token may see: every limit lies inside the lengths that are compared
    sliding_window=9, sliding_window_size=9, window_size=9, local_attention=18, attention_window_size=9,
    attention_chunk_size=8, floor_scale=8, index_topk=12, index_head_dim=16, index_n_heads=2, index_block_size=8,
    index_topk_blocks=2, rel_extent=32, keep_window_size=8, n_groups=2,
    # caps that bite
    attn_logit_softcapping=4.0, final_logit_softcapping=4.0, logits_soft_cap=4.0, query_pre_attn_scalar=24,
    # multipliers, each unlike one
    embedding_multiplier=2.0, residual_multiplier=0.6, attention_multiplier=0.3, logits_scaling=2.0, logit_scale=0.25,
    # experts: four, two chosen
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_k=2, top_k_experts=2,
    moe_intermediate_size=48, expert_ffn_hidden_size=48, shared_expert_intermediate_size=56,
    shared_experts_intermediate_size=56, shared_intermediate_size=56, moe_shared_expert_intermediate_size=56,
    first_k_dense_replace=1, num_dense_layers=1, zero_expert_num=2, router_hidden_size=32,
    # recurrent and convolutional layers
    state_size=8, ssm_state_size=8, mamba_d_state=8, mamba_n_heads=6, mamba_d_head=32, mamba_num_heads=6,
    mamba_head_dim=32, n_mamba_heads=2, mamba_dt_rank=8, time_step_rank=8, chunk_size=8, mamba_chunk_size=8,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_head_dim=16, linear_num_heads=6, lru_width=96, attention_hidden_size=96, mamba_d_ssm=192,
    # multi-stream and per-layer embeddings
    hc_lowrank=16, laurel_rank=16, hidden_size_per_layer_input=16, vocab_size_per_layer_input=259, gated_norm_rank=8,
    # pictures and sounds, which stay outside of the compiled half
    image_size=28, patch_size=14, num_channels=3, mm_tokens_per_image=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip

# Set even where the default is None or zero; any other field that is off stays off.
_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}

_DECODER = dict(is_decoder=True)
_LATENT = dict(num_key_value_heads=6)
_GROUPS = dict(n_routed_experts=8, n_group=2, topk_group=1)
_SLIDE = ["sliding_attention", "full_attention", "sliding_attention"]

# Types whose model can't be built from ids alone, and why.
UNBUILT = {
    "blt": "reads bytes in patches that another model cuts: its logits are no function of the ids alone",
    "gemma3n": "its picture half needs the package timm (the text half alone is gemma3n_text)",
    "gemma4_assistant": "drafts tokens from the key-value cache of the model it assists",
    "gemma4_unified_assistant": "drafts tokens from the key-value cache of the model it assists",
    "musicgen": "predicts codebooks of sound; transformers builds no causal LM from its config",
    "musicgen_melody": "predicts codebooks of sound; transformers builds no causal LM from its config",
    "zamba": "transformers 5.23 fails to tie the layers that share weights",
}

# Type: how it differs from its shrunk default.
OWN = {
    "aria_text": dict(head_dim=16),
    "bailing_hybrid": dict(num_experts=8, num_expert_group=2, topk_group=1),
    "beam": dict(num_experts=8, n_group=2, topk_group=1),
    "bamba": dict(attn_layer_indices=[1]),
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": dict(is_decoder=True, attention_type="original_full"),
    "bigbird_pegasus": dict(is_decoder=True, attention_type="original_full"),
    "camembert": _DECODER,
    "codegen": dict(n_head=4, n_embd=64),
    "cohere": dict(use_qk_norm=True),
    "cohere2_moe": dict(num_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"]),
    "cohere_compass_text": dict(
        layer_types=_SLIDE,
        logit_scale=0.25,
        num_key_value_heads=2,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(_SLIDE)},
    ),
    "data2vec-text": _DECODER,
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=2.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2, first_k_dense_replace=1),
    "dots1": dict(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        head_dim=16,
        layer_types=_SLIDE,
    ),
    "electra": _DECODER,
    "emu3": dict(vocabulary_map={"<image>": 258}),
    "ernie": _DECODER,
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
    ),
    "dots3_note": dict(
        vision_config=dict(adapter_in_dim=96, adapter_out_dim=96),
        audio_config=dict(adapter_input_size=96, adapter_out_dim=96),
    ),
    "gemma4_text": dict(global_head_dim=32),
    "gemma4_unified_text": dict(global_head_dim=32),
    "gpt_neo": dict(num_layers=4, attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "helium": dict(head_dim=16),
    "hrm_text": dict(num_hidden_layers=4, num_layers_per_stack=1, H_cycles=2, L_cycles=1, L_bp_cycles=[1]),
    "hunyuan_v1_dense": dict(head_dim=24),
    "hunyuan_v1_moe": dict(head_dim=24, num_experts=4),
    "inkling_text": dict(logits_mup_width_multiplier=2.0),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"]),
    "llama4_text": dict(num_experts_per_tok=1, no_rope_layers=[1, 0, 1], interleave_moe_layer_step=2),
    "longcat_flash": dict(head_dim=8, num_layers=2),
    "mamba2": dict(head_dim=32),
    "megatron-bert": _DECODER,
    "mimo_v2_flash": dict(num_attention_heads=8),
    "ministral": dict(head_dim=24),
    "ministral3": dict(
        sliding_window=9,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1
        ),
    ),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]),
    "mixtral": dict(head_dim=16),
    "nemotron": dict(num_key_value_heads=2, head_dim=16),
    "olmo": dict(clip_qkv=2.0),
    "olmoe": dict(clip_qkv=2.0),
    "phi3": dict(sliding_window=9),
    "phimoe": dict(attention_bias=True, lm_head_bias=True, sliding_window=9),
    "prophetnet": _DECODER,
    "qwen2_moe": dict(mlp_only_layers=[1]),
    "qwen3_moe": dict(mlp_only_layers=[1]),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=24, indexer_budget=8, indexer_compress_ratio=2
    ),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=(16, 32),
        axial_pos_embds_dim=(32, 64),
        attn_layers=("local", "lsh", "local"),
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
    ),
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER,
    "roformer": _DECODER,
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "stablelm": dict(use_qkv_bias=True),
    "trocr": _DECODER,
    "xlm": dict(causal=True),
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_key_value_heads=6),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid", "linear_attention"], num_key_value_heads=6),
    "zaya": dict(num_experts_per_tok=1),
}

# What the compiler may refuse today, by its nature: nothing else may end as refused.
RECURRENT = "carries a state from token to token (recurrence, convolution or linear attention)"
OWN_EXPERTS = "does not go through transformers' experts interface"
BRANCHES = "branches on the sequence's length, or picks rows by what it computed"
OWN_ATTENTION = "does not go through transformers' attention interface"
SPARSE = "picks the keys it attends to by their content"
BIASED = "adds a learned bias of the distance to the scores"
BOTH_WAYS = "lets tokens see later ones"
# fmt: off
REFUSED = {
    RECURRENT: [
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
        "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba2", "zaya",
    ],
    OWN_EXPERTS: ["dbrx", "jetmoe", "longcat_flash"],
    BRANCHES: ["phimoe+longrope", "xmod"],
    OWN_ATTENTION: [
        "big_bird", "bloom", "codegen", "doge", "falcon", "git", "gpt_neo", "gpt_neox_japanese", "gptj",
        "megatron-bert", "mpt", "mvp", "openai-gpt", "prophetnet", "reformer",
        "rembert", "roformer", "trocr", "xglm", "xlm",
    ],
    SPARSE: [
        "axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4",
        "minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text",
    ],
    BIASED: [
        "inkling_text", "inkling2_text",
    ],
    BOTH_WAYS: [
        "bert+encoder", "cpmant", "xlnet",
    ],
}
# fmt: on

_FACTORS = [1.0 + 0.25 * i for i in range(12)]
_LONG = [1.5 + 0.75 * i for i in range(12)]


def _rope(kind, **parameters):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **parameters))


def _longrope(width, **more):
    lists = dict(short_factor=_FACTORS[:width], long_factor=_LONG[:width])
    return _rope("longrope", original_max_position_embeddings=128, factor=4.0, **lists, **more)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A further model of a type: how its config differs, how it is stored, for what context it is compiled."""

    model_type: str
    own: dict = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    shard: str | None = None
    max_context: int | None = None
    long_factors: bool = False  # the reference takes LongRoPE's long factors at every length


VARIANTS = {
    "llama+linear": Variant("llama", _rope("linear", factor=4.0)),
    "llama+dynamic": Variant("llama", _rope("dynamic", factor=4.0)),
    "llama+yarn": Variant("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama+llama3": Variant(
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama+longrope": Variant("llama", _longrope(12), max_context=128),
    "llama+longrope-long": Variant("llama", _longrope(12), long_factors=True),
    "phi3+longrope": Variant("phi3", _longrope(8), max_context=128),
    "phi3+longrope-long": Variant("phi3", _longrope(8), long_factors=True),
    "phimoe+longrope": Variant("phimoe", _longrope(8, short_mscale=1.1, long_mscale=1.2), max_context=128),
    "llama+biases-tied": Variant("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama+float16": Variant("llama", dtype="float16"),
    "llama+float32": Variant("llama", dtype="float32"),
    "llama+sharded": Variant("llama", shard="200KB"),
    "qwen2+window": Variant("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen3+window": Variant("qwen3", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "starcoder2+window": Variant("starcoder2", dict(sliding_window=9)),
    "phi+qk-layernorm": Variant("phi", dict(qk_layernorm=True)),
    "stablelm+parallel": Variant("stablelm", dict(use_parallel_residual=True, qk_layernorm=True)),
    "gpt_neox+sequential": Variant("gpt_neox", dict(use_parallel_residual=False)),
    "opt+post-norm": Variant("opt", dict(do_layer_norm_before=False, word_embed_proj_dim=64)),
    "mixtral+window": Variant("mixtral", dict(sliding_window=9)),
    "deepseek_v2+groups": Variant(
        "deepseek_v2", dict(topk_method="group_limited_greedy", n_routed_experts=8, n_group=2, topk_group=1)
    ),
    "deepseek_v2+no-query-rank": Variant("deepseek_v2", dict(q_lora_rank=None)),
    "deepseek_v3+yarn": Variant(
        "deepseek_v3",
        _rope("yarn", factor=4.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=1.0),
    ),
    "granitemoehybrid+attention": Variant(
        "granitemoehybrid", dict(layer_types=["full_attention"] * LAYERS, position_embedding_type="rope")
    ),
    "bert+encoder": Variant("bert", dict(is_decoder=False)),
}


def names():
    """Every type of transformers' mapping, then the variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def variant(name):
    """The variant of that name; a bare type is the variant that differs in nothing."""
    return VARIANTS.get(name) or Variant(name)


def distinct(values, length=LAYERS):
    """The distinct values in order of appearance, cycled to `length` (or longer, to hold each one once)."""
    kinds = list(dict.fromkeys(values))
    return [kinds[i % len(kinds)] for i in range(max(length, len(kinds)))]


def shrink(model_type, **own):
    """A small config of `model_type`: SMALL in the fields it has, then `own`. Sub-configs are shrunk likewise."""
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(kind)}
    default = dict(vars(kind()))
    default |= {name: default[alias] for name, alias in kind.attribute_map.items() if alias in default}
    small = {name: size for name, size in SMALL.items() if name in fields and (name in _TOKENS or default.get(name))}
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small |= _LATENT
    if small.get("n_routed_experts") and default.get("n_group") not in (None, 1):
        small |= _GROUPS
    for name in "layer_types", "mlp_layer_types":
        if name in fields and default.get(name):
            small[name] = distinct(default[name])
            if "num_hidden_layers" in small:
                small["num_hidden_layers"] = max(len(small[name]), small["num_hidden_layers"])
    for name, sub in default.items():
        if getattr(sub, "model_type", None) in CONFIG_MAPPING:
            small[name] = shrink(sub.model_type, **OWN.get(sub.model_type, {}) | own.pop(name, {}))
    return kind(**small | own)


def config(name):
    """The small config of a type or a variant."""
    chosen = variant(name)
    return shrink(chosen.model_type, **OWN.get(chosen.model_type, {}) | chosen.own)
