"""From a GPU artifact's codes, scales and zero points back to floats: what another engine computes with.

The layout is that of llmc.codegen.gpu.quantized_layout; formats go by the names that the manifest has, "int4-g32-zp".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from llmc.bench.packed import PackedError, sources

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NF4 = np.array(
    [
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
    ],
    np.float32,
)


def _e4m3() -> np.ndarray:
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, (codes & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


TABLES = {"nf4": _NF4, "e2m1": np.concatenate([_E2M1, -_E2M1]), "e4m3": _e4m3()}
BITS = {"nf4": 4, "e2m1": 4, "e4m3": 8, "int3": 3, "int4": 4, "int8": 8}
_FORMAT = re.compile(r"(nf4|e2m1|e4m3|int[348])(?:-g(\d+))?(-zp)?")


def unpack_codes(stored: np.ndarray, bits: int) -> np.ndarray:
    """Stored rows [..., bytes] -> codes [..., stored depth], uint8."""
    if bits == 8:
        return stored
    if bits == 4:  # nibbles 0 2 4 6 1 3 5 7 of a word
        words = np.ascontiguousarray(stored).view("<u4")
        shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
        return (words[..., None] >> shifts & 15).astype(np.uint8).reshape(*stored.shape[:-1], -1)
    depth = stored.shape[-1] * 8 // 3  # the low two bits of all, then the high ones
    low = (stored[..., : depth // 4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(*stored.shape[:-1], -1)
    high = (stored[..., depth // 4 :, None] >> np.arange(8, dtype=np.uint8) & 1).reshape(*stored.shape[:-1], -1)
    return low | high << 2


def dequantize(format: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """float32 [..., stored depth] of what is stored; scales of uint16 are bfloat16's bits, of uint8 powers of two."""
    found = _FORMAT.fullmatch(format)
    if found is None or (zeros is None) == bool(found[3]):
        raise PackedError(f"expected codes of int3, int4, int8, nf4, e2m1 or e4m3, found {format!r}")
    kind, bits, numbers = found[1], BITS[found[1]], unpack_codes(codes, BITS[found[1]])
    group = int(found[2] or numbers.shape[-1])

    def per_weight(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, group, axis=-1)[..., : numbers.shape[-1]]

    if scales.dtype == np.uint16:
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
    elif scales.dtype == np.uint8:
        scales = np.exp2(scales.astype(np.float32) - 127)
    if kind in TABLES:
        values = TABLES[kind][numbers]
    else:
        values = numbers - (np.float32(1 << bits - 1) if zeros is None else per_weight(zeros.astype(np.float32)))
    return values * per_weight(scales.astype(np.float32))


class Decoded(Mapping):
    """An artifact's packed weights with floats in the place of codes: name -> rows, in `dtype` (bfloat16's bits).

    quantization: the manifest's, name of a format -> the weights that have it; None where there is none.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], names: Iterable[str], quantization: Mapping | None, dtype: str
    ):
        self.weights, self.dtype = weights, dtype
        formats = (quantization or {}).get("formats", {})
        self.formats = {weight: name for name, of in formats.items() for weight in of}
        self.parts: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for name in names:
            weight, _, rest = name.partition(":")
            part = rest.partition(":")[0]
            if part in ("codes", "scales", "zeros"):
                self.parts.setdefault(weight, {})[part] = name
            else:
                self.whole[name] = name

    def __iter__(self) -> Iterator[str]:
        return iter([*self.whole, *self.parts])

    def __len__(self) -> int:
        return len(self.whole) + len(self.parts)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.whole:
            return self.weights[name]
        parts, source = self.parts[name], sources(name)[0]
        if source not in self.formats:
            raise PackedError(f"{name}: the artifact does not say in which format its codes are")
        arrays = [np.asarray(self.weights[parts[p]]) for p in ("codes", "scales", "zeros") if p in parts]
        if arrays[0].ndim != 2:
            raise PackedError(f"{name}: expected rows of codes as GPUs have them, found {list(arrays[0].shape)}")
        values = dequantize(self.formats[source], *arrays)
        if self.dtype != "bfloat16":
            return values.astype(self.dtype)
        bits = values.view(np.uint32)
        return (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
