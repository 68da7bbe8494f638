"""A random model of a type, saved as such models are published, and the logits that transformers computes with it.

    write(name, folder)      -> folder/{config.json, *.safetensors, reference.npz, facts.json}
    reference(name, folder)  -> the tokens and the logits of every sequence

The weights are drawn so that a fault shows: attention is peaked, norms, biases, sinks and the routers' corrections are
random, and logits spread over several units.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from . import configs

LENGTHS = (1, 2, 17, 31, 64, 100)
SPECIAL = 3  # ids below are padding, beginning and end

_PEAKED = re.compile(
    r"(^|[._])(q|k|qk|qkv|query|key|c_attn|wqkv|query_key_value|q_a|q_b|kv_b)(_proj|_lin)?\.(weight|bias)$", re.I
)
_PEAKED_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?norm\.weight$", re.I)
_SINK = re.compile(r"sink", re.I)
_CORRECTION = re.compile(r"correction|expert_bias|score_bias|router_bias|layer_scalar", re.I)


def _seed(name):
    return zlib.crc32(name.encode())


@torch.no_grad()
def randomize(model, seed):
    """Draw every weight of `model` in place."""
    rng = torch.Generator().manual_seed(seed)
    rows_in = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    embeddings = {
        f"{path}.weight": module.padding_idx
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        if _SINK.search(name):
            value = noise
        elif name in embeddings:
            value = 0.3 * noise
            if embeddings[name] is not None:  # the row of padding is never trained: published ones hold zeros
                value[embeddings[name]] = 0
        elif weight.ndim >= 2:
            fan_in = weight.shape[-2 if name in rows_in else -1]
            value = noise * (1.6 if _PEAKED.search(name) else 1.0) / fan_in**0.5
        else:  # about its initial value: one for norms (zero where the type adds the one), zero for biases
            value = torch.nan_to_num(weight.float()) + 0.3 * noise
            if _PEAKED_NORM.search(name):
                value = value * 1.6
        weight.copy_(value)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and _CORRECTION.search(name):
            buffer.add_(0.2 * torch.randn(buffer.shape, generator=rng))


def tokens(name, vocab_size, lengths=LENGTHS):
    """One random sequence of ids for each length, special ones excepted."""
    rng = np.random.default_rng(_seed(name))
    return [rng.integers(SPECIAL, vocab_size, length) for length in lengths]


def published_class(model_type):
    """The class whose checkpoints are published for a type: that of the whole model where it has a picture half."""
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


@torch.no_grad()
def logits(model, ids):
    """float32 logits [n, vocab] of every position, without a cache."""
    return model(input_ids=torch.tensor(np.asarray(ids))[None], use_cache=False).logits[0].float().numpy()


def spread(want):
    """How far logits lie from the mean of their row: the root mean square over all rows. Errors are measured in it."""
    rows = np.concatenate(want).astype(np.float64)
    return float(np.sqrt(np.mean((rows - rows.mean(-1, keepdims=True)) ** 2)))


def key(name):
    """What a model of the sweep is made of, in short: its config, its variant, and the code that draws its weights."""
    parts = [configs.config(name).to_json_string(), repr(configs.variant(name)), Path(__file__).read_text()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def reread(name, folder, **others):
    """A saved type as transformers reads it: float32, eager attention."""
    chosen, auto = configs.variant(name), published_class(configs.variant(name).model_type)
    exact = dict(dtype=torch.float32, attn_implementation="eager") | others
    if chosen.long_factors:
        longer = auto.from_pretrained(folder, **exact).config
        longer.rope_parameters["short_factor"] = longer.rope_parameters["long_factor"]
        exact["config"] = longer
    return auto.from_pretrained(folder, **exact).eval()


def write(name, folder):
    """Save the random model of a type or a variant in `folder`, with transformers' logits of it; returns the facts.

    The reference is the checkpoint as transformers reads it back (float32, eager attention, one sequence at a time).
    Facts: `parameters`; `spread` of the logits; `reloaded`, `sdpa` and `causal`: how far, in the spread, the logits
    of the model before saving, of the other attention, and of a sequence cut short lie from the reference.
    """
    chosen = configs.variant(name)
    config = configs.config(name)
    text = config.get_text_config()
    auto = published_class(chosen.model_type)
    exact = dict(dtype=torch.float32, attn_implementation="eager")
    model = auto.from_config(config, **exact).eval()
    randomize(model, _seed(name))
    stored = getattr(torch, chosen.dtype)
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.copy_(weight.to(stored).float())
    ids = tokens(name, text.vocab_size)
    before = logits(model, ids[3])
    model.to(stored).save_pretrained(folder, **({"max_shard_size": chosen.shard} if chosen.shard else {}))
    model = reread(name, folder)
    want = [logits(model, sequence) for sequence in ids]
    unit = spread(want)

    def part(got, expected):
        return float(np.abs(got - expected).max() / unit)

    facts = dict(
        name=name,
        key=key(name),
        architecture=type(model).__name__,
        parameters=sum(weight.numel() for weight in model.parameters()),
        vocab_size=text.vocab_size,
        spread=unit,
        finite=bool(all(np.isfinite(rows).all() for rows in want)),
        causal=part(logits(model, ids[3][:19]), want[3][:19]),
    )
    if not chosen.long_factors:
        facts["reloaded"] = part(before, want[3])
    try:
        other = reread(name, folder, attn_implementation="sdpa")
    except (ValueError, ImportError):
        facts["sdpa"] = None  # the type has eager attention alone
    else:
        facts["sdpa"] = part(logits(other, ids[3]), want[3])
    arrays = {f"tokens_{i}": sequence for i, sequence in enumerate(ids)}
    arrays |= {f"logits_{i}": rows for i, rows in enumerate(want)}
    np.savez(folder / "reference.npz", **arrays)
    (folder / "facts.json").write_text(json.dumps(facts))
    return facts


def read(folder):
    """(facts, tokens of each sequence, logits of each sequence) of a folder that `write` filled."""
    facts = json.loads((folder / "facts.json").read_text())
    with np.load(folder / "reference.npz") as arrays:
        count = sum(key.startswith("tokens_") for key in arrays)
        return facts, [arrays[f"tokens_{i}"] for i in range(count)], [arrays[f"logits_{i}"] for i in range(count)]
