"""Weights on disk: one safetensors file, written through a memory map and read through one.

The file is ordinary safetensors (https://github.com/huggingface/safetensors#format), laid out for mapping: the header
is padded to 16 KiB and every tensor starts on a multiple of 64 bytes. The format allows no holes, so the gaps
are tensors of their own, named `__gap_N`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import ArtifactError

HEADER_UNIT = 16 * 1024
ALIGNMENT = 64
GAP = "__gap_"

# dtype -> (name in safetensors, numpy dtype of the same width: numpy alone has no bfloat16 or float8)
DTYPES = {
    "bool": ("BOOL", "bool"),
    "uint8": ("U8", "uint8"),
    "int8": ("I8", "int8"),
    "uint16": ("U16", "uint16"),
    "int16": ("I16", "int16"),
    "uint32": ("U32", "uint32"),
    "int32": ("I32", "int32"),
    "uint64": ("U64", "uint64"),
    "int64": ("I64", "int64"),
    "float16": ("F16", "float16"),
    "bfloat16": ("BF16", "uint16"),
    "float32": ("F32", "float32"),
    "float64": ("F64", "float64"),
    "float8_e4m3fn": ("F8_E4M3", "uint8"),
    "float8_e5m2": ("F8_E5M2", "uint8"),
}
_NAMES = {safetensors: name for name, (safetensors, _) in DTYPES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor in the file; dtype is a key of DTYPES."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


def sha256(path: Path, start: int = 0, stop: int | None = None) -> str:
    """Hash of a file's bytes [start, stop), read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        left = (os.path.getsize(path) if stop is None else stop) - start
        while left > 0 and (piece := file.read(min(left, 1 << 22))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


class WeightsWriter:
    """Writes a weights file tensor by tensor, in any order, through one memory map: anonymous memory stays small.

        with WeightsWriter(path, {"a": ((4, 8), "float32")}) as writer:
            writer["a"][:] = ...
        entry = writer.entry       # {"file", "header_sha256", "tensors": {name: sha256}} for the manifest

    `writer[name]` is a writable array on the file; uint16 for bfloat16 (take `.view(ml_dtypes.bfloat16)`), uint8 for
    float8.
    `done(name)` hashes a tensor that is filled; leaving the block does so for the rest.
    `finished` (name: sha256) are tensors that an interrupted writer of the same tensors had done: they are kept.
    Space is reserved at once, so that a full disk raises OSError here and not a bus error later.
    """

    def __init__(
        self,
        path: Path | str,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        finished: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._specs = {name: Spec(tuple(int(d) for d in shape), dtype) for name, (shape, dtype) in tensors.items()}
        for name, spec in self._specs.items():
            if name.startswith(GAP) or name == "__metadata__":
                raise ValueError(f"tensor name {name!r} is reserved by the file format")
            if spec.dtype not in DTYPES:
                raise ValueError(f"tensor {name!r}: expected a dtype of {', '.join(DTYPES)}, found {spec.dtype!r}")
        header, self._offsets, total = _layout(self._specs)
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self._hashes: dict[str, str] = dict(finished or {})
        with open(self.path, "r+b" if self._hashes else "wb") as file:
            file.write(header)
            file.flush()
            _reserve(file.fileno(), len(header) + total)
        self._start = len(header)
        self._map = np.memmap(self.path, np.uint8, "r+") if total else np.empty(self._start, np.uint8)

    def __getitem__(self, name: str) -> np.ndarray:
        spec, start = self._specs[name], self._start + self._offsets[name]
        return self._map[start : start + spec.bytes].view(DTYPES[spec.dtype][1]).reshape(spec.shape)

    def done(self, name: str) -> str:
        """Hash a tensor that is filled; -> its sha256."""
        array = self[name]
        self._hashes[name] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
        if isinstance(array, np.memmap):
            array.flush()
        return self._hashes[name]

    @property
    def entry(self) -> dict:
        """What the manifest says of this file; complete once the block is left."""
        tensors = {name: self._hashes[name] for name in self._specs}
        return {"file": self.path.name, "header_sha256": self.header_sha256, "tensors": tensors}

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            for name in self._specs:
                if name not in self._hashes:
                    self.done(name)
        del self._map


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _layout(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """-> header bytes (length word included), offset of each tensor behind the header, bytes behind the header."""
    entries: dict[str, dict] = {"__metadata__": {"format": "llmc"}}
    offsets, end = {}, 0
    for name, spec in specs.items():
        if gap := -end % ALIGNMENT:
            entries[f"{GAP}{end}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        offsets[name] = end
        entries[name] = {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.bytes],
        }
        end += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % HEADER_UNIT)
    return len(text).to_bytes(8, "little") + text, offsets, end


class Weights(Mapping[str, np.ndarray]):
    """A weights file, memory-mapped for reading. `weights[name]` is an array on the map, read when it is used.

    Raises ArtifactError when the header is not safetensors or says more than the file holds.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.header = _read_header(self.path)
        self._start = len(self.header)
        self.specs, self._ranges = _parse(self.header, self.path)
        self._map = np.memmap(self.path, np.uint8, "r")

    def __getitem__(self, name: str) -> np.ndarray:
        spec, (start, stop) = self.specs[name], self._ranges[name]
        return self._map[self._start + start : self._start + stop].view(DTYPES[spec.dtype][1]).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def header_sha256(self) -> str:
        return hashlib.sha256(self.header).hexdigest()

    def sha256(self, name: str) -> str:
        start, stop = self._ranges[name]
        return sha256(self.path, self._start + start, self._start + stop)


def _read_header(path: Path) -> bytes:
    if not path.is_file():
        raise ArtifactError(
            f"{path}: expected the weights file, found nothing there; the artifact is not complete, compile it again"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        word = file.read(8)
        length = int.from_bytes(word, "little")
        if len(word) < 8 or length + 8 > size:
            raise ArtifactError(
                f"{path}: damaged: its header should take {length + 8} bytes, the file has {size}; compile it again"
            )
        return word + file.read(length)


def _parse(header: bytes, path: Path) -> tuple[dict[str, Spec], dict[str, tuple[int, int]]]:
    room = path.stat().st_size - len(header)
    specs, ranges = {}, {}
    try:
        for name, entry in json.loads(header[8:]).items():
            if name == "__metadata__" or name.startswith(GAP):
                continue
            spec = Spec(tuple(int(d) for d in entry["shape"]), _NAMES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            if not (0 <= start <= stop <= room and stop - start == spec.bytes and min(spec.shape, default=0) >= 0):
                raise ArtifactError(
                    f"{path}: damaged: tensor {name} of shape {spec.shape} {spec.dtype} should take {spec.bytes} "
                    f"bytes, its place is {start} to {stop} of {room}; compile it again"
                )
            specs[name], ranges[name] = spec, (start, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: damaged: its header is not that of a safetensors file ({error!r}); compile it again"
        ) from error
    return specs, ranges
