"""Small quantized checkpoints in their formats' own layouts, written bit by bit from what the formats' libraries say.

A writer takes a Linear's weight [o, i] and gives (tensors of the module by ending, the float32 weight [o, i] that they
stand for). Nothing here is shared with the readers: words are filled code by code.
"""

import json
import re

import ml_dtypes
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


E4M3_MOST = 448.0


def to_e4m3(weight):
    return weight.astype(ml_dtypes.float8_e4m3fn)


def fp8_tensor(scale_dtype="float32", name=".weight_scale", static=True):
    """One scale for a weight."""

    def write(weight, rng):
        scale = np.asarray(np.abs(weight).max() / E4M3_MOST, scale_dtype)
        codes = to_e4m3(weight / scale)
        tensors = {".weight": codes, name: scale} | ({".input_scale": np.float32(0.5)} if static else {})
        return tensors, codes.astype("float32") * np.float32(scale)

    return write


def fp8_channel(weight, rng):
    scale = (np.abs(weight).max(1, keepdims=True) / E4M3_MOST).astype("float32")
    codes = to_e4m3(weight / scale)
    return {".weight": codes, ".weight_scale": scale}, codes.astype("float32") * scale


def fp8_blocks(rows, width, name=".weight_scale_inv", scale_dtype="float32"):
    """A scale for every block, those at the edges cut off."""

    def write(weight, rng):
        o, i = weight.shape
        codes, want = np.empty((o, i), ml_dtypes.float8_e4m3fn), np.empty((o, i), "float32")
        scales = np.empty((-(-o // rows), -(-i // width)), scale_dtype)
        for r in range(scales.shape[0]):
            for c in range(scales.shape[1]):
                at = np.s_[r * rows : (r + 1) * rows, c * width : (c + 1) * width]
                scales[r, c] = np.abs(weight[at]).max() / E4M3_MOST
                codes[at] = to_e4m3(weight[at] / np.float32(scales[r, c]))
                want[at] = codes[at].astype("float32") * np.float32(scales[r, c])
        return {".weight": codes, name: scales}, want

    return write


def compressed_packed(bits=4, group=32, symmetric=True, act_order=False, dtype="bfloat16"):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype

    def write(weight, rng):
        o, i = weight.shape
        size = group or i
        order = rng.permutation(i) if act_order else np.arange(i)
        of_input = np.empty(i, np.int64)
        of_input[order] = np.arange(i) // size
        in_order, scales, zeros = quantize(weight[:, order], bits, size, symmetric, dtype)
        codes = np.empty_like(in_order)
        codes[:, order] = in_order
        tensors = {
            ".weight_packed": np.stack([stream(row, bits) for row in codes]),
            ".weight_scale": scales,
            ".weight_shape": np.asarray([o, i], "int64"),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = np.stack([stream(zeros[:, g], bits) for g in range(i // size)], 1)
        if act_order:
            tensors[".weight_g_idx"] = of_input.astype("int32")
        return tensors, dequantize(codes, scales, zeros, of_input)

    return write


def compressed_int8(symmetric=True):
    def write(weight, rng):
        codes, scales, zeros = quantize(weight, 8, weight.shape[1], symmetric, ml_dtypes.bfloat16)
        tensors = {".weight": (codes - 128).astype("int8"), ".weight_scale": scales}
        if not symmetric:
            tensors[".weight_zero_point"] = (zeros - 128).astype("int8")
        return tensors, dequantize(codes, scales, zeros, np.zeros(weight.shape[1], np.int64))

    return write


def compressed_mxfp4(weight, rng):
    codes, powers, want = e2m1(weight)
    return {".weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype("uint8"), ".weight_scale": powers}, want


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], "float32")


def e2m1(weight):
    """Codes [..., i], bytes of powers of two [..., i / 32], and what they stand for."""
    grouped = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(grouped).max(-1))) - 2
    scaled = grouped / 2.0 ** exponents[..., None]
    magnitude = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1)
    codes = magnitude + 8 * (scaled < 0)
    want = np.where(scaled < 0, -1, 1) * E2M1[magnitude] * 2.0 ** exponents[..., None]
    return codes.reshape(weight.shape), (exponents + 127).astype("uint8"), want.reshape(weight.shape).astype("float32")


# Dettmers et al., QLoRA (2023), appendix E.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
NF4 = np.array(NF4.split(), "float32")


def bnb_nf4(block=64, nested=True):
    def write(weight, rng):
        flat = weight.reshape(-1, block)
        absmax = np.abs(flat).max(1)
        codes = np.abs((flat / absmax[:, None])[..., None] - NF4).argmin(-1).reshape(-1)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {".weight": (codes[::2] << 4 | codes[1::2]).astype("uint8")[:, None], ".weight.quant_map": NF4}
        if nested:
            table = np.sort(rng.standard_normal(256)).astype("float32")  # any table: the file says which
            table /= np.abs(table).max()
            offset = float(absmax.mean())
            runs = np.split(absmax - offset, range(256, len(absmax), 256))
            nested_absmax = np.array([np.abs(run).max() for run in runs], "float32")
            of_block = nested_absmax[np.arange(len(absmax)) // 256]
            found = np.abs(((absmax - offset) / of_block)[:, None] - table).argmin(-1)
            absmax = table[found] * of_block + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            tensors |= {".weight.absmax": found.astype("uint8"), ".weight.nested_absmax": nested_absmax}
            tensors |= {".weight.nested_quant_map": table}
        else:
            tensors[".weight.absmax"] = absmax
        packed = np.frombuffer(json.dumps(state).encode(), "uint8")
        tensors[".weight.quant_state.bitsandbytes__nf4"] = packed
        return tensors, (NF4[codes].reshape(-1, block) * absmax[:, None]).reshape(weight.shape)

    return write


def bnb_int8(weight, rng):
    largest = np.abs(weight).max(1)
    codes = np.round(weight / largest[:, None] * 127).astype("int8")
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": np.uint8(0)}
    return tensors, codes.astype("float32") * (largest / 127)[:, None]


def gpt_oss_experts(weight):
    """Of experts [e, i, o], as transformers has them: what is published of [e, o, i], and what it stands for."""
    codes, powers, want = e2m1(weight.swapaxes(1, 2))
    e, o, i = codes.shape
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype("uint8").reshape(e, o, i // 32, 16)
    return {"_blocks": blocks, "_scales": powers}, want.swapaxes(1, 2)


PROJECTION = re.compile(r"\.(\d+)\..*(_proj|experts\.\d+\.w[123]|c_attn|c_fc|_a_proj_with_mqa)\.weight$")


def publish(model, folder, write, settings, seed=0):
    """Save a model with its projections quantized in `folder`, and in folder/floats the numbers that they stand for."""
    rng = np.random.default_rng(seed)
    model.save_pretrained(folder)
    tensors, floats = {}, {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if not PROJECTION.search(name):
            tensors[name] = floats[name] = tensor
            continue
        conv1d = re.search(r"\.(c_proj|c_attn|c_fc)\.", name)  # GPT-2 keeps [i, o]
        parts, want = write(tensor.T if conv1d else tensor, rng)
        floats[name] = want.T if conv1d else want
        tensors |= {name.removesuffix(".weight") + end: part for end, part in parts.items()}
    return save(folder, tensors, floats, settings)


def save(folder, tensors, floats, settings):
    """Write a quantized checkpoint in `folder`, and in folder/floats one of the numbers that it stands for."""
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quantization_config": settings}
    for place, contents, extra in ((folder, tensors, quantization), (folder / "floats", floats, {})):
        place.mkdir(exist_ok=True)
        contents = {name: np.ascontiguousarray(tensor) for name, tensor in contents.items()}
        save_file(contents, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | extra))
    return folder
