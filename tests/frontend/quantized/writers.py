"""Small quantized checkpoints in their formats' own layouts, written bit by bit from what the formats' libraries say.

A writer takes a Linear's weight [o, i] and gives (tensors of the module by ending, the float32 weight [o, i] that they
stand for). Nothing here is shared with the readers: words are filled code by code.
"""

import json

import numpy as np
from safetensors.numpy import load_file, save_file


def quantize(weight, bits, group, symmetric, dtype="float16"):
    """Codes [o, i], scales and zero points [o, groups] of `weight`; code - zero is what a scale multiplies."""
    grouped = weight.reshape(len(weight), -1, group).astype(np.float64)
    most = 2**bits - 1
    if symmetric:
        scales = np.abs(grouped).max(-1) / (2 ** (bits - 1) - 0.5)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = (high - low) / most
        zeros = np.clip(np.round(-low / scales), 1, most)  # 0 cannot be written in the first of GPTQ's layouts
    scales = scales.astype(dtype)
    codes = np.clip(np.round(grouped / scales[..., None].astype(np.float64)) + zeros[..., None], 0, most)
    return codes.reshape(weight.shape).astype(np.int64), scales, zeros.astype(np.int64)


def dequantize(codes, scales, zeros, of_input):
    """float32 [o, i]: of_input [i] is the group of every input."""
    return (codes - zeros[:, of_input]).astype(np.float32) * scales.astype(np.float32)[:, of_input]


def stream(codes, bits):
    """int32 words of a list of codes, one after the other from the lowest bit on."""
    number = 0
    for at, code in enumerate(codes):
        number |= int(code) << (at * bits)
    count = -(-len(codes) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * count, "little"), "<i4")


def gptq(bits=4, group=32, symmetric=True, act_order=False, first=1, dtype="float16"):
    """first: what the layout takes off zero points (1: "gptq", 0: "gptq_v2")."""

    def write(weight, rng):
        o, i = weight.shape
        order = rng.permutation(i) if act_order else np.arange(i)
        of_input = np.empty(i, np.int64)
        of_input[order] = np.arange(i) // group
        sorted_codes, scales, zeros = quantize(weight[:, order], bits, group, symmetric, dtype)
        codes = np.empty_like(sorted_codes)
        codes[:, order] = sorted_codes
        tensors = {
            ".qweight": np.stack([stream(codes[row], bits) for row in range(o)], 1),
            ".qzeros": np.stack([stream(zeros[:, g] - first, bits) for g in range(i // group)]),
            ".scales": scales.T.copy(),
            ".g_idx": of_input.astype("int32"),
        }
        return tensors, dequantize(codes, scales, zeros, of_input)

    return write


def awq(version="gemm", group=32):
    def write(weight, rng):
        o, i = weight.shape
        codes, scales, zeros = quantize(weight, 4, group, symmetric=False)
        want = dequantize(codes, scales, zeros, np.arange(i) // group)
        if version == "gemv":
            width = -(-(i // group) // 8)
            multiple = {32: 4, 64: 2}.get(group, 1)
            width = -(-width // multiple) * multiple
            filled = np.zeros((o, width * 8), "float16")
            filled[:, : i // group] = scales
            spread = np.zeros((o, width * 8), np.int64)
            spread[:, : i // group] = zeros
            tensors = {
                ".qweight": np.stack([stream(row, 4) for row in codes]),
                ".qzeros": np.stack([stream(row, 4) for row in spread]),
                ".scales": filled,
            }
            return tensors, want
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def words(columns):  # [n, o] -> [n, o / 8]
            return np.stack(
                [
                    np.concatenate([stream([row[at + k] for k in order], 4) for at in range(0, len(row), 8)])
                    for row in columns
                ]
            )

        return {".qweight": words(codes.T), ".qzeros": words(zeros.T), ".scales": scales.T.copy()}, want

    return write


def rewrite(folder, write, settings, seed=0, only=lambda module: True):
    """Quantize the projections of a saved model in place; -> name of each weight: what it stands for now."""
    rng = np.random.default_rng(seed)
    tensors, want = {}, {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or not only(module):
            tensors[name] = tensor
            continue
        parts, want[name] = write(tensor, rng)
        tensors |= {module + ending: np.ascontiguousarray(part) for ending, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return want
