"""The Hugging Face door: a folder, a safetensors file in one, its index, or a hub id -> the imported form.

No architecture is known here: transformers builds the model of config.json, without its weights, and it is exported.
Remote code is never run and no pickle is ever loaded.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tvm
from torch import nn

from llmc.frontend import export as exporting
from llmc.frontend import quantized, random_weights
from llmc.frontend import weights as checkpoints
from llmc.frontend.importer import dtype_name, import_program
from llmc.frontend.quantized import QuantizedTensor
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError

COMPUTE = ("float32", "bfloat16", "float16")
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
          "max_target_positions")  # fmt: skip
NO_LIMIT = 2048  # tokens of context for a model that names no limit of its own
TRAVEL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "chat_template.jinja", "chat_template.json", "added_tokens.json")  # fmt: skip
RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "rwkv", "hybrid", "moe_mamba"}


@dataclass(frozen=True)
class Imported:
    """A model as a door hands it over.

    module: the imported form. weights: every weight that the module takes, by name. facts: JSON-able facts of the
    model. files: files that travel into the artifact (tokenizer, chat template, generation config). origin: name, size
    and time of change (ns) of every file of the source, by which a later compilation knows it again.
    quantized: those of the weights that the checkpoint stores in few bits.
    """

    module: tvm.IRModule
    weights: Mapping[str, LazyTensor]
    facts: dict[str, Any]
    files: dict[str, bytes]
    origin: list[tuple[str, int, int]]

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        return {name: weight for name, weight in self.weights.items() if isinstance(weight, QuantizedTensor)}


def load(
    source: str | os.PathLike, *, dtype: str | None = None, max_context: int | None = None, weights: str = "load"
) -> Imported:
    """Import a model.

    source: a folder with config.json, that file, a .safetensors file or index in one, or a hub id. dtype: what to
    compute in, float32 (default), bfloat16 or float16. max_context: the longest sequence to be served; default: the
    model's own.
    weights: "load", or "random", for which config.json alone is needed.
    SourceError says what is wrong with the source, in one line.
    """
    dtype = dtype or "float32"
    if dtype not in COMPUTE:
        raise SourceError(f"expected a dtype to compute in, one of {', '.join(COMPUTE)}; found {dtype}")
    folder, file = locate(source)
    config = read_config(folder)
    quantization = quantized.take_config(config)
    text = config.get_text_config(decoder=True)
    model_class, own_config = class_of(config)
    model = _explained(config, "be built", lambda: exporting.build(model_class, own_config, getattr(torch, dtype)))
    max_context, notes = context_of(text, max_context, exporting.first_position(model))
    own_facts: dict[str, Any] = {}
    if weights == "random":
        stored_in, spread = getattr(text, "dtype", None), getattr(text, "initializer_range", None)
        tensors = random_weights.draw(model, dtype_name(stored_in) if stored_in else dtype, spread or 0.02)
        unused: list[str] = []
        notes.append("the weights are random: this artifact is for benchmarks")
        if quantization is not None:
            notes.append(f"quantization by {quantization['quant_method']} is left out: random weights are floats")
    else:
        stored = checkpoints.open_checkpoint(folder, file)
        if quantization is not None:
            checkpoint = quantized.read(quantization, stored, dtype)
            stored, own_facts = checkpoint.tensors, checkpoint.facts
            notes += checkpoint.notes
        tensors, unused = checkpoints.convert(model, stored)
        quantized.orient(model, tensors)
        floats = quantized.joined_as_floats(tensors)
        if floats:
            notes.append(
                f"{len(floats)} weights ({floats[0]}, …) join quantized ones whose formats or orders of inputs differ: "
                "they are computed with as floats"
            )
    names = name_parameters(model, tensors)
    if text is not config:
        notes.append(f"the text half of a multimodal model ({config.model_type}): it takes no pictures and no sound")
    notes += _explained(config, "be made static", lambda: exporting.fix_rotary(model, max_context))
    if unused:
        notes.append(f"{len(unused)} tensors of the checkpoint are not used: {', '.join(unused[:3])}, …")
    program = _explained(config, "be exported", lambda: exporting.export(model, max_context))
    count = _explained(
        config, "be classified", lambda: exporting.classify_masks(program, sizes_in(text.to_dict()), max_context)
    )
    expect_attention(config, text, count)
    check_weights(model, names, tensors)
    parameters = {f"model.{name}": weight for name, weight in names.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    module = _explained(config, "be translated", lambda: import_program(program, parameters, dtypes))
    used = [str(name) for name in module["main"].attrs["llmc.weights"]]
    missing = [name for name in used if name not in tensors]
    if missing:
        raise SourceError(
            f"{folder}: expected the weights of a {config.model_type} model, found no {missing[0]}"
            + (f" (and {len(missing) - 1} more are missing)" if missing[1:] else "")
        )
    files = travelling_files(folder, notes)
    floats_in = [tensors[n].dtype for n in used if not isinstance(tensors[n], QuantizedTensor)] or [dtype]
    facts = facts_of(config, text, files) | {
        "dtype": dtype,
        "checkpoint_dtype": max(set(floats_in), key=floats_in.count),
        "max_context": max_context,
        "notes": notes,
        **own_facts,
    }
    status = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    origin = [(name, found.st_size, found.st_mtime_ns) for name, found in status.items()]
    return Imported(module, {name: tensors[name] for name in used}, facts, files, origin)


def stored_dtype(source: str | os.PathLike, *, weights: str = "load") -> str:
    """The dtype of most of a checkpoint's numbers ("bfloat16").

    Of random weights and of a quantized checkpoint what config.json says, or float32.
    """
    folder, file = locate(source)
    config = read_config(folder)
    if weights == "random" or quantized.take_config(config) is not None:
        stored_in = getattr(config.get_text_config(decoder=True), "dtype", None)
        return dtype_name(stored_in) if stored_in else "float32"
    sizes: dict[str, int] = {}
    for tensor in checkpoints.open_checkpoint(folder, file).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def locate(source: str | os.PathLike) -> tuple[Path, Path | None]:
    """The folder of a source, and the file of weights if the source names one."""
    path = Path(source)
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.name == "config.json":
            return path.parent, None
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            index = path.parent / checkpoints.INDEX
            sharded = path.suffix == ".safetensors" and path.name != checkpoints.SINGLE and index.exists()
            return path.parent, index if sharded else path
        raise SourceError(f"{path}: expected a folder, a .safetensors file or its index, found another kind of file")
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".json"):
        raise SourceError(f"{name}: expected a folder, a .safetensors file or a hub id, found nothing there")
    return _from_hub(name), None


def _from_hub(name: str) -> Path:
    """The folder of a hub id: the local cache first, then the hub."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if _complete(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except HFValidationError:
        raise SourceError(f"{name}: expected a folder or a hub id, found neither") from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{name}: expected it in the local cache or on the hub, found it in neither: the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{name}: cannot be had from the hub: {first}") from None


def _complete(folder: Path) -> bool:
    index = folder / checkpoints.INDEX
    if not (folder / "config.json").exists():
        return False
    if index.exists():
        return all((folder / shard).exists() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return any(folder.glob("*.safetensors"))


def read_config(folder: Path):
    """The transformers config of a folder, refused where llmc could not be right about the model."""
    path = folder / "config.json"
    if not path.exists():
        raise SourceError(f"{folder}: expected a config.json, found none")
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("model_type")
    except (ValueError, AttributeError):
        raise SourceError(f"{path}: expected a JSON object, found something else") from None
    if kind not in transformers.CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise SourceError(
                f"{path}: expected a model type that transformers has itself, found {kind!r} with remote code, which "
                "is never run"
            )
        raise SourceError(
            f"{path}: expected a model type that transformers {transformers.__version__} knows, found {kind!r}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise SourceError(f"{path}: not a config of {kind}: {_first_line(error)}") from None
    layers = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    recurrent = sorted(set(layers) & RECURRENT)
    if recurrent:
        raise SourceError(
            f"{kind}: expected attention in every layer, found {layers.count(recurrent[0])} of {len(layers)} layers of "
            f"{recurrent[0]}: recurrent and hybrid models are not supported"
        )
    return config


def class_of(config) -> tuple[type, Any]:
    """The class of transformers that computes logits from tokens, and the config to build it from.

    A model with pictures or sound is built whole: its checkpoint names are those of the whole.
    """
    for mapping in (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            found = found[0] if isinstance(found, tuple) else found
            text = config.sub_configs.get("text_config")
            if text is not None and getattr(found, "config_class", None) is text:
                config = config.get_text_config()
            return found, config
    raise SourceError(f"{config.model_type}: expected a decoder that transformers knows as a causal language model")


def context_of(text, wanted: int | None, first: int = 0) -> tuple[int, list[str]]:
    """The longest sequence to be served, and notes on it; its positions begin at `first`."""
    own = next(
        (value - first for name in LIMITS if isinstance(value := getattr(text, name, None), int) and value > first),
        None,
    )
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise SourceError(f"expected max_context of at least 1, found {wanted}")
    if own is None:
        limit = wanted or NO_LIMIT
        return limit, [f"the model names no longest context: {limit} is taken"]
    if wanted is not None and wanted > own:
        raise SourceError(f"expected max_context of at most {own}, the model's own, found {wanted}")
    return wanted or own, []


def name_parameters(model: nn.Module, weights: dict[str, LazyTensor]) -> dict[str, str]:
    """Parameter -> name of its weight: tied parameters have one. `weights` gets every tensor under that name.

    As transformers does, parameters that are tied by the config but differ in the checkpoint are not tied.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    names = {}
    for group in groups.values():
        present = [name for name in group if name in weights]
        owner = present[0] if present else group[0]
        for name in group:
            if name in present[1:] and not _equal(weights[name], weights[owner]):
                names[name] = name
                _untie(model, name)
            else:
                names[name] = owner
    return names


def _untie(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tied = module._parameters[leaf]
    module._parameters[leaf] = exporting.placeholder(tied.shape, tied.dtype)


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rows = max(1, (16 << 20) // max(1, a.nbytes // max(1, a.shape[0] if a.shape else 1)))
    return all(
        np.array_equal(a.read(at, at + rows), b.read(at, at + rows)) for at in range(0, (a.shape or (1,))[0], rows)
    )


def check_weights(model: nn.Module, names: dict[str, str], weights: Mapping[str, LazyTensor]) -> None:
    """Every weight has the shape of its parameter, and a dtype that can be computed with."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = weights.get(names[name])
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(parameter.shape):
            raise SourceError(
                f"{names[name]}: expected shape {list(parameter.shape)} by config.json, found {list(tensor.shape)} in "
                "the checkpoint"
            )
        if parameter.is_floating_point() and tensor.dtype not in COMPUTE:
            raise SourceError(
                f"{names[name]}: expected one of {', '.join(COMPUTE)}, found {tensor.dtype} in the checkpoint"
            )
        if not parameter.is_floating_point() and tensor.dtype != dtype_name(parameter.dtype):
            raise SourceError(
                f"{names[name]}: expected {dtype_name(parameter.dtype)}, found {tensor.dtype} in the checkpoint"
            )


def sizes_in(config: dict) -> list[int]:
    """Every number of a config that may be a window, a chunk or a block of attention."""
    sizes = set()
    for key, value in config.items():
        if isinstance(value, dict):
            sizes |= set(sizes_in(value))
        elif any(word in str(key) for word in ("window", "chunk", "block", "local")):
            values = value if isinstance(value, (list, tuple)) else [value]
            sizes |= {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0}
    return sorted(sizes)


def expect_attention(config, text, found: int) -> None:
    layers = text.num_hidden_layers
    if found < layers:
        raise SourceError(
            f"{config.model_type}: expected attention in each of {layers} layers, found it in {found} through "
            "transformers' attention interface: not supported"
        )


def facts_of(config, text, files: Mapping[str, bytes]) -> dict[str, Any]:
    generation = json.loads(files.get("generation_config.json", b"{}"))

    def token_ids(name):
        value = generation.get(name, getattr(text, name, None))
        return [value] if isinstance(value, int) else list(value or [])

    return {
        "model_type": config.model_type,
        "architectures": list(config.architectures or []),
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "bos_token_ids": token_ids("bos_token_id"),
        "eos_token_ids": token_ids("eos_token_id"),
    }


def travelling_files(folder: Path, notes: list[str]) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config; a slow tokenizer is converted to a fast one."""
    files = {name: (folder / name).read_bytes() for name in TRAVEL if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        kinds = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
        if any((folder / kind).exists() for kind in kinds):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    folder, use_fast=True, trust_remote_code=False, local_files_only=True
                )
                files["tokenizer.json"] = tokenizer.backend_tokenizer.to_str().encode()
                notes.append("the tokenizer was converted to a fast one")
            except Exception as error:
                notes.append(f"no tokenizer: it could not be converted to a fast one: {_first_line(error)}")
        else:
            notes.append("no tokenizer: the artifact takes token ids only")
    return files


def _explained(config, what: str, action):
    """action(), whose failure is a SourceError that names the model type."""
    try:
        return action()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SourceError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, SourceError):
            text = str(cause)
            raise SourceError(text if text.startswith(config.model_type) else f"{config.model_type}: {text}") from error
        if isinstance(error, KeyError) and error.args == ("llmc",):
            raise SourceError(
                f"{config.model_type}: expected a model that goes through transformers' attention interface, found one "
                "with attention code of its own: not supported"
            ) from error
        reason = next((words for sign, words in REASONS if sign in f"{type(error).__name__} {error}"), None)
        if reason:
            raise SourceError(f"{config.model_type}: {reason}: not supported") from error
        raise SourceError(f"{config.model_type}: cannot {what}: {_first_line(error)}") from error


# What PyTorch says when a model cannot be exported, and what that means.
REASONS = (
    (
        "GuardOnDataDependent",
        "expected code that is the same for all values, found code that branches or loops over what it computed",
    ),
    (
        "Constraints violated",
        "expected code for any length, found code that fixes the length or goes token by token (recurrence)",
    ),
)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
