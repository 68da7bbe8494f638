"""The sweep's checkpoints: published layouts, and a reference that transformers itself agrees with."""

import numpy as np
import pytest
import safetensors
import torch

from llmc.bench import checkpoints, configs

torch.set_num_threads(1)


def stored(folder):
    """Every tensor name in the folder's files."""
    files = [safetensors.safe_open(file, "np") for file in folder.glob("*.safetensors")]
    return {name for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3", "llama+longrope-long"])
def test_reference_is_sound(name, tmp_path):
    facts = checkpoints.write(name, tmp_path)
    assert facts["finite"]
    assert facts["causal"] < 1e-4
    assert facts["sdpa"] is None or facts["sdpa"] < 1e-4
    assert facts.get("reloaded", 0) < 1e-4
    assert facts["spread"] > 0.5
    again, ids, want = checkpoints.read(tmp_path)
    assert again == facts
    assert [len(sequence) for sequence in ids] == list(checkpoints.LENGTHS)
    assert [rows.shape for rows in want] == [(n, facts["vocab_size"]) for n in checkpoints.LENGTHS]


def test_experts_are_stored_one_by_one_where_published_so(tmp_path):
    checkpoints.write("mixtral", tmp_path / "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in stored(tmp_path / "mixtral")
    checkpoints.write("qwen3_moe", tmp_path / "qwen3_moe")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in stored(tmp_path / "qwen3_moe")


def test_multimodal_type_is_stored_whole(tmp_path):
    facts = checkpoints.write("gemma3", tmp_path)
    assert facts["architecture"] == "Gemma3ForConditionalGeneration"
    assert any("vision" in name for name in stored(tmp_path))


def test_sharded_variant_has_an_index(tmp_path):
    checkpoints.write("llama+sharded", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(("name", "dtype"), [("llama", "BF16"), ("llama+float16", "F16"), ("llama+float32", "F32")])
def test_checkpoint_dtype(name, dtype, tmp_path):
    checkpoints.write(name, tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == dtype


def test_the_same_name_gives_the_same_model(tmp_path):
    checkpoints.write("llama", tmp_path / "a")
    checkpoints.write("llama", tmp_path / "b")
    for a, b in zip(checkpoints.read(tmp_path / "a")[2], checkpoints.read(tmp_path / "b")[2], strict=True):
        assert np.array_equal(a, b)


def test_long_factors_change_the_reference(tmp_path):
    """LongRoPE's factor follows the context: the long one differs, at lengths where the short one would be chosen."""
    checkpoints.write("phi3+longrope-long", tmp_path)
    ids, want = checkpoints.read(tmp_path)[1:]
    short = checkpoints.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert np.abs(checkpoints.logits(short, ids[3]) - want[3]).max() > 0.01


def test_spread_is_about_the_mean_of_each_row():
    assert checkpoints.spread([np.array([[1.0, 3.0], [101.0, 103.0]])]) == 1.0


def test_every_refusal_is_of_a_built_type():
    assert not {name for names in configs.REFUSED.values() for name in names} & set(configs.UNBUILT)
