"""A Hugging Face folder of a Llama shape as an F16 GGUF file, for llama.cpp; and what a GGUF file's weights stand for.

Token ids are all that is ever given to llama.cpp, so the vocabulary is made up.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llmc.bench.bandwidth import cores


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
    turned = rotary_heads(config)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            x = file.get_tensor(name).float().numpy()
            if count := turned.get(
                name.rsplit(".", 2)[-2]
            ):  # rotary halves side by side, as llama.cpp's Llama has them
                x = x.reshape(count, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            x = np.ascontiguousarray(x)
            writer.add_tensor(name_in_gguf(name, config), x if x.ndim == 1 else x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rotary_heads(config: dict) -> dict[str, int]:
    """The projections that rotary embedding follows, with the heads that they give."""
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def name_in_gguf(name: str, config: dict) -> str:
    """What GGUF calls a weight of a Hugging Face folder."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    short = names.get_name(name, try_suffixes=(".weight",))
    if short is None:
        raise ValueError(f"expected the weights of a Llama, found {name}, which GGUF has no name for")
    return short


class Stored:
    """A weight of a GGUF file, as the floats that it stands for: [o, i] float32, as the Hugging Face folder has it.

    type        how the file stores it: "Q4_0", "Q6_K", …
    nbytes      what it takes there
    activation  the group in which llama.cpp rounds the activations of its products to 8 bits (Q8_0: 32; Q8_K: 256);
                None if they are to be left alone
    """

    dtype = "float32"

    def __init__(self, tensor, count: int, rounded: bool):
        self.tensor, self.count = tensor, count
        self.type, self.nbytes = tensor.tensor_type.name, int(tensor.n_bytes)
        self.shape = tuple(int(d) for d in tensor.shape[::-1])
        self.activation = (256 if self.type.endswith("_K") else 32) if rounded else None

    def read(self, start: int = 0, stop: int | None = None):
        import gguf

        x = gguf.quants.dequantize(self.tensor.data, self.tensor.tensor_type)
        if self.count:
            x = x.reshape(self.count, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x[start:stop]


def weights(path: Path, folder: Path, names: Sequence[str], *, rounded: bool = False) -> dict[str, Stored]:
    """Weights of a GGUF file of a Hugging Face folder, by the names that they have in the folder."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    turned, stored = rotary_heads(config), {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    return {
        name: Stored(stored[name_in_gguf(name, config)], turned.get(name.rsplit(".", 2)[-2], 0), rounded)
        for name in names
    }


def quantized(folder: Path, kind: str, names: Sequence[str]) -> dict[str, dict[str, Stored]]:
    """Weights of a Hugging Face folder as llama.cpp quantizes them: to be multiplied as they are, and by activations
    that are rounded as llama.cpp does ("a8"); each under a title that says how many are stored in which type."""
    with tempfile.TemporaryDirectory() as work:
        whole = write(folder, Path(work) / "F16.gguf")
        path = quantize(whole, kind, Path(work) / "quantized.gguf", cores())
        found = {what: weights(path, folder, names, rounded=bool(what)) for what in ("", ", a8")}
    types = Counter(weight.type for weight in found[""].values())
    stored = ", ".join(f"{count} {type}" for type, count in types.most_common())
    return {f"llama.cpp {kind} ({stored}){what}": of for what, of in found.items()}


def quantize(source: Path, kind: str, path: Path, threads: int) -> Path:
    """An F16 GGUF file in llama.cpp's own quantization: its file, as its users have it.

    kind: "Q4_0", …; with ":pure" every matrix is in that type, embedding and output head too.
    """
    import ctypes

    import llama_cpp as c

    name, _, pure = kind.partition(":")
    params = c.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, getattr(c, f"LLAMA_FTYPE_MOSTLY_{name}"), pure == "pure"
    status = c.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind}")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), Path(sys.argv[2])))
