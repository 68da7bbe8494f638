"""Weights, lazy: memory-mapped tensors, and transformers' conversions of published layouts applied to them unread.

transformers stacks, joins, splits and turns tensors when it loads a checkpoint (the experts of a mixture are stored
one by one, for instance). Its own conversion operations run here on tensors that are only descriptions; rows are
computed when they are read. What those operations ask of a tensor and is not known here is refused by name.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from llmc.ir.errors import SourceError

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("int16"),
    "I32": np.dtype("int32"),
    "I64": np.dtype("int64"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_HEADER = 100 << 20  # bytes; the format's own limit


class LazyTensor:
    """A tensor that is read in slices of rows.

    shape: tuple of int. dtype: its name as numpy and Relax spell it ('bfloat16', 'float32', …).
    PyTorch's functions stack, cat, chunk, split and transpose and the methods that conversions use give LazyTensors.
    """

    shape: tuple[int, ...]
    dtype: str

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start … stop-1 along the first axis (ml_dtypes.bfloat16 for bfloat16). A scalar is read whole."""
        if not self.shape:
            return self._rows(0, 1)
        return self._rows(start, self.shape[0] if stop is None else min(stop, self.shape[0]))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(numpy_dtype(self.dtype)).itemsize

    def size(self, dim: int | None = None):
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def contiguous(self) -> "LazyTensor":
        return self

    def transpose(self, dim0: int, dim1: int) -> "LazyTensor":
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self._permuted([d % self.ndim for d in order])

    def reshape(self, *sizes) -> "LazyTensor":
        shape = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], Iterable) else sizes)
        if -1 in shape:
            shape[shape.index(-1)] = math.prod(self.shape) // -math.prod(shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"a tensor of shape {list(self.shape)} cannot become {shape}")
        return self._reshaped(tuple(shape))

    view = reshape

    def squeeze(self, dim: int) -> "LazyTensor":
        dim %= self.ndim
        return self if self.shape[dim] != 1 else self.reshape(self.shape[:dim] + self.shape[dim + 1 :])

    def narrow(self, dim: int, start: int, stop: int) -> "LazyTensor":
        """Entries start … stop-1 of axis dim."""
        return _Narrowed(self, dim % self.ndim, start, stop)

    def _stack(self, tensors: Sequence["LazyTensor"]) -> "LazyTensor":
        """Tensors, of which this is the first, side by side along a new first axis."""
        return _Stacked(tensors)

    def _join(self, tensors: Sequence["LazyTensor"], dim: int) -> "LazyTensor":
        """Tensors, of which this is the first, one after the other along an axis that they have."""
        return _Joined(tensors, dim)

    def _permuted(self, order: list[int]) -> "LazyTensor":
        return self if order == sorted(order) else _Permuted(self, order)

    def _reshaped(self, shape: tuple[int, ...]) -> "LazyTensor":
        return self if shape == self.shape else _Reshaped(self, shape)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in _FUNCTIONS:
            raise _UnknownOperation(f"torch.{getattr(function, '__name__', function)}")
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise _UnknownOperation(f"Tensor.{name}")


class _UnknownOperation(Exception):
    """A conversion asked for something that lazy tensors don't know."""


class Stored(LazyTensor):
    """A tensor of a file: a (possibly strided) view of its memory map."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.shape, self.dtype = tuple(array.shape), array.dtype.name

    def _rows(self, start, stop):
        return self.array[start:stop] if self.shape else self.array

    def narrow(self, dim, start, stop):
        return Stored(self.array[(slice(None),) * (dim % self.ndim) + (slice(start, stop),)])

    def _permuted(self, order):
        return Stored(self.array.transpose(order))

    def _reshaped(self, shape):
        try:
            return Stored(self.array.reshape(shape, copy=False))
        except ValueError:  # not without a copy
            return super()._reshaped(shape)


class _Joined(LazyTensor):
    """Tensors put one after the other along an axis that they have."""

    def __init__(self, parts: Sequence[LazyTensor], dim: int):
        _demand_alike(parts, dim)
        self.parts, self.dim, self.dtype = list(parts), dim, parts[0].dtype
        sizes = list(parts[0].shape)
        sizes[dim] = sum(p.shape[dim] for p in parts)
        self.shape = tuple(sizes)

    def _rows(self, start, stop):
        if self.dim:
            return np.concatenate([p.read(start, stop) for p in self.parts], axis=self.dim)
        pieces, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.shape[0])
            if low < high:
                pieces.append(part.read(low, high))
            at += part.shape[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, self.parts[0].read(0, 0)])

    def _permuted(self, order):
        return _Joined([p._permuted(order) for p in self.parts], order.index(self.dim))


class _Stacked(LazyTensor):
    """Tensors of one shape put side by side along a new first axis."""

    def __init__(self, parts: Sequence[LazyTensor]):
        _demand_alike(parts, None)
        self.parts, self.dtype = list(parts), parts[0].dtype
        self.shape = (len(parts), *parts[0].shape)

    def _rows(self, start, stop):
        out = np.empty((max(stop - start, 0), *self.shape[1:]), numpy_dtype(self.dtype))
        for row, part in enumerate(self.parts[start:stop]):
            out[row] = part.read()
        return out

    def _permuted(self, order):
        if order[0] != 0:
            return super()._permuted(order)
        return _Stacked([p._permuted([d - 1 for d in order[1:]]) for p in self.parts])

    def narrow(self, dim, start, stop):
        dim %= self.ndim
        return _Stacked([p.narrow(dim - 1, start, stop) for p in self.parts] if dim else self.parts[start:stop])


class _Narrowed(LazyTensor):
    def __init__(self, whole: LazyTensor, dim: int, start: int, stop: int):
        self.whole, self.dim, self.start, self.dtype = whole, dim, start, whole.dtype
        self.shape = (*whole.shape[:dim], stop - start, *whole.shape[dim + 1 :])

    def _rows(self, start, stop):
        if self.dim == 0:
            return self.whole.read(self.start + start, self.start + stop)
        part = slice(self.start, self.start + self.shape[self.dim])
        return self.whole.read(start, stop)[(slice(None),) * self.dim + (part,)]


class _Permuted(LazyTensor):
    def __init__(self, whole: LazyTensor, order: list[int]):
        self.whole, self.order, self.dtype = whole, order, whole.dtype
        self.shape = tuple(whole.shape[d] for d in order)

    def _rows(self, start, stop):
        if self.order[0] == 0:
            return self.whole.read(start, stop).transpose(self.order)
        return self.whole.read().transpose(self.order)[start:stop]


class _Reshaped(LazyTensor):
    """Rows of the new shape lie in a run of rows of the old one: only these are read."""

    def __init__(self, whole: LazyTensor, shape: tuple[int, ...]):
        self.whole, self.shape, self.dtype = whole, shape, whole.dtype

    def _rows(self, start, stop):
        new, old = math.prod(self.shape[1:]), math.prod(self.whole.shape[1:])
        first, last = start * new, stop * new
        low, high = first // old, -(-last // old)
        flat = np.ascontiguousarray(self.whole.read(low, high)).reshape(-1)
        return flat[first - low * old : last - low * old].reshape((stop - start, *self.shape[1:]))


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, dtype)) if dtype.startswith(("bfloat", "float8")) else np.dtype(dtype)


def _demand_alike(parts: Sequence[LazyTensor], dim: int | None) -> None:
    shapes = {tuple(s for d, s in enumerate(p.shape) if d != dim) for p in parts}
    dtypes = sorted({p.dtype for p in parts})
    if len(shapes) > 1 or len(dtypes) > 1:
        found = ", ".join(sorted({f"{p.dtype} {list(p.shape)}" for p in parts}))
        raise ValueError(f"expected tensors alike in shape and dtype, to be joined into one, found {found}")


def _stack(tensors, dim=0):
    if isinstance(tensors, LazyTensor):
        return tensors
    stacked = tensors[0]._stack(tensors)
    dim %= stacked.ndim
    return stacked._permuted([*range(1, dim + 1), 0, *range(dim + 1, stacked.ndim)])


def _cat(tensors, dim=0):
    return tensors[0] if len(tensors) == 1 else tensors[0]._join(tensors, dim % tensors[0].ndim)


def _chunk(tensor, chunks, dim=0):
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _split(tensor, split_size_or_sections, dim=0):
    sizes, total = split_size_or_sections, tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    if sum(sizes) != total:
        raise ValueError(f"axis {dim} of a tensor of shape {list(tensor.shape)} cannot be split into {list(sizes)}")
    ends = np.cumsum(sizes).tolist()
    return tuple(tensor.narrow(dim, end - size, end) for size, end in zip(sizes, ends, strict=True))


_FUNCTIONS: dict[Callable, Callable] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.chunk: _chunk,
    torch.split: _split,
    torch.transpose: lambda input, dim0, dim1: input.transpose(dim0, dim1),
    torch.unbind: lambda input, dim=0: tuple(c.squeeze(dim) for c in _split(input, 1, dim)),
}


# Files.


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, mapped and unread. SourceError if the header is not true."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= min(MOST_HEADER, size) else b""
            if size < 8 or len(header) < length or not header:
                raise SourceError(
                    f"{path}: expected a safetensors header of {length} bytes, found a file of {size}: it is cut short "
                    "or no safetensors file; download it again"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise SourceError(f"{path}: expected a file of weights, found none; download it again") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        described = {name: _described(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(
            f"{path}: expected a safetensors header, found bytes that are none; download it again"
        ) from None
    tensors: dict[str, Stored] = {}
    for name, (kind, shape, start, stop) in described.items():
        if kind not in DTYPES:
            tensors[name] = _Unreadable(kind, tuple(shape), f"{path}: {name}")
            continue
        needed = math.prod(shape) * DTYPES[kind].itemsize
        if min([*shape, 0]) < 0 or not 0 <= start <= stop <= size - 8 - length or stop - start != needed:
            raise SourceError(
                f"{path}: {name}: expected {needed} bytes for {kind} {shape}, found bytes {start} to {stop} of "
                f"{size - 8 - length}: the file is damaged or cut short; download it again"
            )
        array = np.frombuffer(mapped, DTYPES[kind], math.prod(shape), 8 + length + start)
        tensors[name] = Stored(array.reshape(shape))
    return tensors


def _described(entry: dict) -> tuple[str, list[int], int, int]:
    """A header's entry: dtype, shape, and where its bytes start and stop."""
    start, stop = map(int, entry["data_offsets"])
    return str(entry["dtype"]), [int(d) for d in entry["shape"]], start, stop


class _Unreadable(Stored):
    """A tensor of a dtype that is not read (4-bit floats, …): an error once somebody wants it, not before."""

    def __init__(self, kind: str, shape: tuple[int, ...], place: str):
        self.shape, self.dtype, self.place = shape, kind.lower(), place

    def _rows(self, start, stop):
        raise SourceError(f"{self.place}: expected one of {', '.join(DTYPES)}, found dtype {self.dtype.upper()}")


def open_checkpoint(folder: Path, file: Path | None = None) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint by their published names: of one safetensors file or of those an index lists.

    file: the safetensors file or index to take; by default what the folder has. SourceError if there is none, if a
    shard is missing or lies outside the folder, or if a shard lacks a tensor that the index gives it.
    """
    if file is None:
        file = next((folder / name for name in (INDEX, SINGLE) if (folder / name).exists()), None)
    if file is None:
        others = sorted(folder.glob("*.safetensors"))
        if len(others) != 1:
            pickled = " (only pickled weights, which llmc never loads)" if list(folder.glob("*.bin")) else ""
            raise SourceError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{pickled}")
        file = others[0]
    if file.suffix != ".json":
        return dict(open_safetensors(file))
    try:
        placed = json.loads(file.read_text())["weight_map"]
        shards = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(f"{file}: expected an index with a weight_map, found none; download it again") from None
    for shard in shards:
        # Names, not targets: the hub's cache is made of links that leave the folder.
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise SourceError(f"{file}: expected shards inside the folder, found the path {shard}: refused")
    opened = {shard: open_safetensors(file.parent / shard) for shard in shards}
    lacking = [f"{name} in {shard}" for name, shard in placed.items() if name not in opened[shard]]
    if lacking:
        raise SourceError(f"{file}: expected {lacking[0]}, found no such tensor there; download it again")
    return {name: opened[shard][name] for name, shard in placed.items()}


# Conversion.


def convert(model, stored: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The checkpoint's tensors under the model's names, and the names of the checkpoint that the model has no use for.

    Follows transformers' loading: renamings, then at most one converter a tensor, then the base model's prefix. Of
    tied parameters each gets the tensor that any of them has. SourceError if a conversion cannot be applied.
    """
    from copy import deepcopy

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model, getattr(type(model), "_checkpoint_conversion_mapping", None) or None)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    loads: dict[str, WeightRenaming | WeightConverter] = {}
    unused = []
    prefix = model.base_model_prefix
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unused.append(name)
            continue
        if pattern is None:
            load, pattern = loads.setdefault(target, WeightRenaming(name, target)), name
        else:
            load = loads.setdefault(target, deepcopy(of_pattern[pattern]))
        load.add_tensor(target, name, pattern, stored[name])
    weights: dict[str, LazyTensor] = {}
    for target, load in loads.items():
        operations = " ".join(type(o).__name__ for o in getattr(load, "operations", [])) or type(load).__name__
        try:
            made = load.convert(target, model=model, config=model.config)
        except SourceError:
            raise
        except _UnknownOperation as error:
            raise SourceError(
                f"{target}: transformers' conversion {operations} needs {error}, which llmc does not know"
            ) from None
        except Exception as error:
            raise SourceError(f"{target}: transformers' conversion {operations} failed: {error}") from None
        for key, value in made.items():
            value = value[0] if isinstance(value, list) else value
            if not isinstance(value, LazyTensor):
                raise SourceError(f"{key}: transformers' conversion {operations} gave no tensor that llmc can read")
            weights[key] = value
    return weights, unused
