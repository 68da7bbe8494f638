"""What the Hugging Face door refuses, and with which words."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llmc.frontend import export, huggingface
from llmc.frontend.huggingface import context_of, load, locate, read_config, sizes_in
from llmc.ir.errors import SourceError


@pytest.fixture
def llama(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def refused(message, folder, **options):
    with pytest.raises(SourceError, match=message) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)


def test_sources_are_found(llama, tmp_path):
    assert locate(llama) == (llama, None)
    assert locate(str(llama / "model.safetensors")) == (llama, llama / "model.safetensors")
    assert locate(llama / "config.json") == (llama, None)
    (tmp_path / "weights.bin").touch()
    refused("expected a folder, a .safetensors file or its index", tmp_path / "weights.bin")
    refused("expected a folder, a .safetensors file or a hub id, found nothing there", tmp_path / "nowhere")
    refused("expected a folder, a .safetensors file or a hub id, found nothing there", "./nowhere/else")


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("some/model: expected it in the local cache or on the hub, .* the hub cannot be reached", "some/model")


def test_a_hub_id_in_the_local_cache(llama, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_files_only=False, **__: str(llama))
    assert locate("some/model") == (llama, None)


def test_configs(llama):
    (llama / "config.json").rename(llama / "config")
    refused("expected a config.json, found none", llama)
    (llama / "config.json").write_text("{")
    refused("expected a JSON object, found something else", llama)
    (llama / "config").rename(llama / "config.json")
    refused("expected a model type that transformers .* knows, found 'lama'", change_config(llama, model_type="lama"))
    auto_map = {"AutoConfig": "configuration_lama.LamaConfig"}
    refused("found 'lama' with remote code, which is never run", change_config(llama, auto_map=auto_map))


def test_remote_code_beside_a_native_type_is_not_run(llama):
    (llama / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    change_config(llama, auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"})
    assert read_config(llama).model_type == "llama"


def test_methods_of_quantization_that_are_not_known(llama):
    change_config(llama, quantization_config={"quant_method": "aqlm", "nbits_per_codebook": 16})
    refused("expected a checkpoint quantized by awq, .*; found one quantized by aqlm: not supported; give the", llama)


def test_arguments(llama):
    refused("one of float32, bfloat16, float16; found int8", llama, dtype="int8")
    refused("expected max_context of at least 1, found 0", llama, max_context=0)
    refused("expected max_context of at most 512, the model's own, found 513", llama, max_context=513)


def test_a_model_that_names_no_longest_context():
    class Config:
        pass

    assert context_of(Config(), None) == (2048, ["the model names no longest context: 2048 is taken"])
    assert context_of(Config(), 100)[0] == 100


def test_weights_that_do_not_fit(llama):
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    change_weights(llama, lambda t: t.update({down: t[down].T.copy()}))
    refused(rf"{down}: expected shape \[64, 128\] by config.json, found \[128, 64\]", llama)
    change_weights(llama, lambda t: t.update({down: t[down].T.copy(), norm: t[norm].astype("int32")}))
    refused(f"{norm}: expected one of float32, bfloat16, float16, found int32", llama)
    change_weights(llama, lambda t: [t.pop(norm), t.pop(down)])
    refused(r"expected the weights of a llama model, found no .* \(and 1 more are missing\)", llama)
    (llama / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-4])
    refused("the file is damaged or cut short", llama)


RECURRENT = {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RECURRENT, "qwen3_next: .* found 1 of 2 layers of linear_attention: recurrent and hybrid models"),
        ({"model_type": "mamba", "num_hidden_layers": 2}, "mamba: expected attention in every layer"),
        ({"model_type": "vit"}, "vit: expected a decoder that transformers knows as a causal language model"),
        (
            {"model_type": "gptj", "n_layer": 1, "n_embd": 64, "n_head": 4, "rotary_dim": 8},
            "gptj: .* attention interface",
        ),
    ],
    ids=lambda p: p["model_type"] if isinstance(p, dict) else "",
)
def test_models_that_are_no_such_decoder(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(1, "float32")}, tmp_path / "model.safetensors")
    refused(message, tmp_path)


def test_an_encoder_that_poses_as_a_decoder(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=False, **sizes)).save_pretrained(tmp_path)
    refused("bert: expected a decoder, in which no token sees its future; found bidirectional attention", tmp_path)


def test_layers_without_attention_are_counted(llama, monkeypatch):
    monkeypatch.setattr(export, "classify_masks", lambda *_: 1)
    refused("llama: expected attention in each of 2 layers, found it in 1 through transformers' attention", llama)


class Layer(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_bias": 1}, "Layer: expected attention arguments that llmc knows, found position_bias"),
        ({"dropout": 0.5}, "found dropout=0.5"),
        ({"attention_mask": None}, "expected an attention mask, found none"),
        ({"key": torch.ones(1, 2, 7, 4)}, "expected attention of a sequence to itself"),
        ({"scaling": torch.ones(())}, "expected a number as attention's scale"),
    ],
    ids=str,
)
def test_attention_arguments_are_judged(arguments, message):
    q = torch.ones(1, 2, 5, 4)
    given = {"query": q, "key": q, "value": q, "attention_mask": torch.ones(5, 5, dtype=torch.bool)} | arguments
    with pytest.raises(SourceError, match=message):
        export.attention(Layer(), **given)


def test_dynamic_rope_holds_within_its_length(make_model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make_model("llama", rope_parameters=rope)
    assert export.fix_rotary(model, 512) == ["rope: dynamic scaling has no effect within 512 tokens"]
    with pytest.raises(SourceError, match="max_context of at most 512 for dynamic rope, found 513"):
        export.fix_rotary(model, 513)


def test_sizes_of_windows_are_read_from_the_config():
    config = {"sliding_window": 9, "text": {"attention_chunk_size": 8}, "hidden_size": 64, "use_sliding_window": True}
    assert sizes_in(config) == [8, 9]


def test_a_tokenizer_that_cannot_be_converted_is_noted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    notes = []
    assert huggingface.travelling_files(tmp_path, notes) == {}
    assert notes[0].startswith("no tokenizer: it could not be converted to a fast one")
