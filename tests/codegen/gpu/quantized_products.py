"""Random products with quantized weights, what they must come to, and how near; written down in numpy alone."""

import ml_dtypes
import numpy as np

from llmc.codegen.software_device import Unwritten
from llmc.codegen.weights import numpy_dtype
from llmc.ir.quantized import Format
from tests.codegen.gpu.products import HALF_ULP, SMALLEST, biased_sums

NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
TABLES = {
    "nf4": np.array(NF4, np.float32),
    "e2m1": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32),
    "e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
}

FORMATS = {
    "int8": Format(8, 0, "float32", offset=128),
    "int8-g64": Format(8, 64, "bfloat16", offset=128),
    "int8-zp": Format(8, 0, "float32", zeros=True),
    "int4": Format(4, 32, "float16", offset=8),
    "int4-g16": Format(4, 16, "float32", offset=8),
    "int4-zp": Format(4, 64, "float16", zeros=True),
    "int4-g128-zp": Format(4, 128, "bfloat16", zeros=True),
    "int4-row": Format(4, 0, "float16", zeros=True),
    "int3": Format(3, 32, "float16", offset=4),
    "int3-zp": Format(3, 16, "float16", zeros=True),
    "fp8": Format(8, 0, "float32", table="e4m3"),
    "fp8-g128": Format(8, 128, "float32", table="e4m3"),
    "nf4": Format(4, 64, "float16", table="nf4"),
    "nf4-row": Format(4, 0, "float32", table="nf4"),
    "mxfp4": Format(4, 32, "e8m0", table="e2m1"),
}


def stored_codes(codes, bits):
    """Codes [..., columns, depth] as rows of bytes: the layout of GPUs, written down a second time."""
    *lead, depth = codes.shape
    unit = {8: 16, 4: 32, 3: 64}[bits]
    padded = np.zeros((*lead, -(-depth // unit) * unit), np.uint32)
    padded[..., :depth] = codes
    if bits == 8:
        return padded.astype(np.uint8)

    def words(x, width, order):
        """Little-endian words of len(order) numbers each: number order[i] at bit i * width."""
        x = x.reshape(*lead, -1, len(order))[..., order]
        return (x << (np.arange(len(order), dtype=np.uint32) * width)).sum(-1, dtype=np.uint32).view(np.uint8)

    if bits == 4:
        return words(padded, 4, [0, 2, 4, 6, 1, 3, 5, 7])
    return np.concatenate([words(padded & 3, 2, range(16)), words(padded >> 2, 1, range(32))], -1)


def stored_groups(x, format, depth):
    """Scales or zero points [..., columns, groups] as stored: rows of whole units, and of 4 groups."""
    if not format.group:
        return x
    unit = {8: 16, 4: 32, 3: 64}[format.bits]
    groups = -(-(-(-depth // unit) * unit) // (4 * format.group)) * 4
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups - x.shape[-1])])


def round_activation(x, group, table=""):
    """x [n, depth] as 8-bit integers or E4M3 numbers of groups (0: rows) say it, in float32; see llmc.ir.quantized."""
    depth, largest = group or x.shape[1], 448 if table == "e4m3" else 127
    y = x.astype(np.float32).reshape(len(x), x.shape[1] // depth, depth)  # there may be no rows
    most = abs(y).max(-1, keepdims=True)
    safe = np.maximum(most, np.float32(1e-30))
    codes = y * (np.float32(largest) / safe)
    codes = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if table == "e4m3" else np.rint(codes)
    return (codes * (safe * np.float32(1 / largest))).reshape(x.shape).astype(x.dtype)


class QuantizedWeight:
    """A random weight [..., columns, depth] of a format: parts, what is stored, its numbers and their scales."""

    def __init__(self, format, shape, random):
        self.format, self.shape = format, shape
        depth = shape[-1]
        groups = (*shape[:-1], format.groups(depth))
        self.codes = random.integers(0, 1 << format.bits, shape).astype(np.uint8)
        if format.table == "e4m3":
            self.codes[self.codes & 127 == 127] = 0  # NaN has a test of its own
        if format.scale == "e8m0":
            self.scales = random.integers(120, 130, groups).astype(np.uint8)
        else:
            self.scales = (random.uniform(0.2, 1, groups) / 2**format.bits).astype(numpy_dtype(format.scale))
        self.zeros = random.integers(0, 1 << format.bits, groups).astype(np.uint8) if format.zeros else None
        self.parts = [x for x in (self.codes, self.scales, self.zeros) if x is not None]
        self.stored = [
            stored_codes(self.codes, format.bits),
            *(stored_groups(x, format, depth) for x in self.parts[1:]),
        ]

    def per_weight(self, x):
        return np.repeat(x, self.format.group or self.shape[-1], axis=-1)

    def numbers(self):
        """float64, exact."""
        if self.format.table:
            return TABLES[self.format.table][self.codes].astype(np.float64)
        codes = self.codes.astype(np.float64)
        return codes - (self.per_weight(self.zeros.astype(np.float64)) if self.format.zeros else self.format.offset)

    def scale(self):
        """float64 [..., columns, depth], exact."""
        if self.format.scale == "e8m0":
            return self.per_weight(2.0 ** (self.scales.astype(np.float64) - 127))
        return self.per_weight(self.scales.astype(np.float64))

    def float32(self):
        """What dequantize says: rounded once."""
        return (self.numbers() * self.scale()).astype(np.float32)


class QuantizedCase:
    """See products.Case. `units` says the dtype in which a matrix unit multiplies weights, for what rows it does."""

    def __init__(self, format, columns, depth, activation, out=None, experts=None, ids="int32", bias=None, seed=0):
        self.name, self.format = format, FORMATS[format]
        self.columns, self.depth, self.experts, self.ids = columns, depth, experts, ids
        self.activation, self.out, self.bias_dtype = activation, out or activation, bias
        self.random = np.random.default_rng(seed)
        lead = (experts,) if experts else ()
        self.w = QuantizedWeight(self.format, (*lead, columns, depth), self.random)
        self.bias = self.random.standard_normal((*lead, columns)).astype(numpy_dtype(bias)) if bias else None

    @property
    def label(self):
        return f"{self.name}-{self.columns}x{self.depth}-{self.activation}"

    def arguments(self, n):
        self.x = self.random.standard_normal((n, self.depth)).astype(numpy_dtype(self.activation))
        self.picked = self.random.integers(0, self.experts, n).astype(self.ids) if self.experts else None
        given = [self.x, *self.w.stored, self.picked, self.bias]
        return [a for a in given if a is not None] + [Unwritten((n, self.columns), self.out)]

    def expected(self, rounded, x=None):
        """y in float64, and how far it may be off: see products.Case, with two roundings more, of a weight's scale and
        of a part's sum. rounded: the dtype that what a matrix unit multiplies is rounded to, once, None: to none.
        """
        x = (self.x if x is None else x).astype(np.float64)
        numbers, scale = self.w.numbers(), self.w.scale()
        if rounded and self.format.group:
            w = self.w.float32().astype(numpy_dtype(rounded)).astype(np.float64)
        elif rounded:
            w = numbers.astype(np.float32).astype(numpy_dtype(rounded)).astype(np.float64) * scale
        else:
            w = numbers * scale
        sums, sizes = biased_sums(x, w, self.bias, self.picked)
        off = (self.depth + 4) * HALF_ULP["float32"] * sizes
        return sums, off + HALF_ULP[self.out] * (abs(sums) + off) + SMALLEST[self.out]

    def largest_miss(self, y, rounded=None, x=None):
        expected, off = self.expected(rounded, x)
        assert y.shape == expected.shape and y.dtype == numpy_dtype(self.out)
        return (abs(y.astype(np.float64) - expected) / off).max(initial=0)
