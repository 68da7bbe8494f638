"""A Hugging Face folder of a Llama shape as an F16 GGUF file, for llama.cpp.

The weights are random, so the vocabulary is made up too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write(folder: Path, path: Path) -> Path:
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = config["vocab_size"]
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"t{i}".encode() for i in range(3, vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])

    def interleave(x, count: int):
        """Rotary halves side by side, as llama.cpp's Llama has them."""
        return x.reshape(count, 2, x.shape[0] // count // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            x = file.get_tensor(name).float().numpy()
            if name.endswith("q_proj.weight"):
                x = interleave(x, heads)
            elif name.endswith("k_proj.weight"):
                x = interleave(x, groups)
            x = np.ascontiguousarray(x)
            short = names.get_name(name, try_suffixes=(".weight",))
            if short is None:
                raise ValueError(f"expected the weights of a Llama, found {name}, which GGUF has no name for")
            writer.add_tensor(short, x if x.ndim == 1 else x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(source: Path, kind: str, path: Path, threads: int) -> Path:
    """An F16 GGUF file in llama.cpp's own quantization, e.g. kind "Q4_0": its file, as its users have it."""
    import ctypes

    import llama_cpp as c

    params = c.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind}")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), Path(sys.argv[2])))
