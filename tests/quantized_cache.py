"""What a cache in 8 bits keeps of keys and values, in numpy, from the formats' own words; imported by tests."""

import ml_dtypes
import numpy as np

KINDS = ("int8", "fp8")
LARGEST = {"int8": 127, "fp8": 448}


def quantize(x, kind):
    """x [..., heads, width] -> codes (int8, or the bits of E4M3 as uint8) and scales [..., heads] float32."""
    x = x.astype(np.float32)
    most = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    scaled = x * (np.float32(LARGEST[kind]) / most)
    codes = np.rint(scaled).astype(np.int8) if kind == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, (most * np.float32(1 / LARGEST[kind]))[..., 0]


def numbers(codes):
    """What codes say, float32."""
    return codes.astype(np.float32) if codes.dtype == np.int8 else codes.view(ml_dtypes.float8_e4m3fn).astype("float32")


def dequantize(codes, scales):
    return numbers(codes) * scales[..., None]


def rounded(x, kind):
    """What is read again of x [..., heads, width], float32; `kind` None: x itself."""
    return x if kind is None else dequantize(*quantize(x, kind))
