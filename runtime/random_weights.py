"""Weights that no file holds: seeded random numbers made at load, for benchmarks without a checkpoint."""

import math
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from .errors import ArtifactError
from .weights import DTYPES, Spec

# Numbers that are drawn in all. A tensor repeats them from a place of its own; a prime, so that no two of its rows
# are alike.
DRAWN = 4194301


class RandomWeights(Mapping[str, np.ndarray]):
    """`weights[name]`: a new array of normally distributed numbers; the same seed and name give the same ones.

    described: name -> {"shape", "dtype", "mean", "spread"}, spread being the standard deviation; only float dtypes have
    any. Codes of quantized weights are {"shape", "dtype": "uint8", "bytes"}: 64 hexadecimal digits, whose bit b
    (counted from the highest) says whether byte b may occur; each of those is as likely. Raises ArtifactError for a
    description that is none.
    """

    def __init__(self, described: Mapping[str, Mapping], seed: int):
        self.seed = seed
        self.specs: dict[str, Spec] = {}
        self._laws: dict[str, tuple[float, float] | bytes] = {}
        for name, what in described.items():
            try:
                spec = Spec(tuple(int(d) for d in what["shape"]), what["dtype"])
                if spec.dtype not in DTYPES or min(spec.shape, default=0) < 0:
                    raise ValueError(f"{spec}")
                self.specs[name] = spec
                self._laws[name] = _codes(spec, what["bytes"]) if "bytes" in what else _law(what)
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(
                    f"random tensor {name}: expected shape, dtype, mean and spread, found {what!r:.80} ({error!r}); "
                    "compile it again"
                ) from error
        self._drawn: dict[tuple, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        spec, law = self.specs[name], self._laws[name]
        numbers = self._bytes(law) if isinstance(law, bytes) else self._numbers(spec.dtype, *law)
        found = np.empty(math.prod(spec.shape), numbers.dtype)
        start, at = zlib.crc32(name.encode()) % len(numbers), 0
        while at < len(found):
            piece = numbers[start : start + len(found) - at]
            found[at : at + len(piece)] = piece
            at, start = at + len(piece), 0
        return found.reshape(spec.shape)

    def _numbers(self, dtype: str, mean: float, spread: float) -> np.ndarray:
        """The drawn numbers with this mean and spread, as `dtype` holds them."""
        key = (dtype, mean, spread)
        if key not in self._drawn:
            numbers = np.full(DRAWN, mean, np.float32)
            if spread:
                numbers += spread * np.random.default_rng(self.seed).standard_normal(DRAWN, dtype=np.float32)
            if dtype == "bfloat16":  # its bits: rounded to nearest, ties to even
                bits = numbers.view(np.uint32)
                numbers = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            self._drawn[key] = numbers.astype(DTYPES[dtype][1], copy=False)
        return self._drawn[key]

    def _bytes(self, values: bytes) -> np.ndarray:
        """The drawn bytes, of these values."""
        if (values,) not in self._drawn:
            places = np.random.default_rng(self.seed).integers(0, len(values), DRAWN)
            self._drawn[values,] = np.frombuffer(values, np.uint8)[places]
        return self._drawn[values,]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _law(what: Mapping) -> tuple[float, float]:
    return float(what["mean"]), float(what["spread"])


def _codes(spec: Spec, digits: str) -> bytes:
    """The bytes that may occur."""
    found = np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)))
    if spec.dtype != "uint8" or len(digits) != 64 or not found.size:
        raise ValueError(f"{spec}")
    return found.astype(np.uint8).tobytes()
