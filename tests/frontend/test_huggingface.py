"""The Hugging Face door against transformers' own numbers."""

import numpy as np
import pytest

from llmc.frontend.huggingface import load

KINDS = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "llama4_text", "mixtral", "phi3", "gpt2", "olmo", "roberta"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_imported_model_computes_what_transformers_does(
    kind, tmp_path, make_model, transformers_logits, imported_logits
):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    imported = load(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 256, 77)  # past the windows (9), the chunks (8) and longrope's 64
    want = transformers_logits(model, tokens)
    error = np.abs(imported_logits(imported, tokens) - want).max()
    assert error < 1e-5 * np.ptp(want)  # float32 both, sums in another order


def test_positions_that_begin_after_the_padding_shorten_the_context(tmp_path, make_model):
    """RoBERTa's first position is padding_idx + 1: of 512 rows of its table, 510 are for tokens."""
    make_model("roberta").save_pretrained(tmp_path)
    assert load(tmp_path).facts["max_context"] == 510


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_bfloat16_is_as_near_the_exact_numbers_as_transformers_is(kind, tmp_path, make_model, imported_logits):
    import torch
    import transformers

    make_model(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    imported = load(tmp_path, dtype="bfloat16")
    assert imported.facts["checkpoint_dtype"] == imported.module["main"].ret_ty.dtype == "bfloat16"
    tokens = np.random.default_rng(0).integers(3, 256, 40)

    def transformers_in(dtype):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            return model(torch.tensor(tokens)[None]).logits[0].float().numpy()

    exact = transformers_in(torch.float32)

    def error(logits):  # the median token's: a token that is routed to another expert says nothing about rounding
        return np.median(np.sqrt(((logits.astype("float32") - exact) ** 2).mean(axis=-1)))

    assert error(imported_logits(imported, tokens)) <= 1.5 * error(transformers_in(torch.bfloat16))
