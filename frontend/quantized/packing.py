"""Codes in words: what checkpoints store as int32 or bytes, taken apart into one byte a code."""

import math
from collections.abc import Callable

import numpy as np

from llmc.frontend.quantized.tensor import Computed
from llmc.frontend.weights import LazyTensor

TILE = 128  # rows that are taken apart at a time: what is in between stays in the cache
# Two words of 12 bits are 3 bytes: the four codes of 3 bits that 12 bits hold, as bytes of a word.
_FOUR_OF_3 = (np.arange(4096)[:, None] >> np.arange(0, 12, 3) & 7).astype(np.uint8).view("<u4").reshape(-1)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """words [..., w] of int32 (or bytes) -> codes [..., w * word bits / bits] uint8, the lowest bits first.

    A row is one stream of bits, so codes of 3 bits may lie across two words. bits: 3, 4 or 8.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 4:
        wide = data.astype("<u2")
        return ((wide | wide << 4) & 0x0F0F).view(np.uint8)
    filler = -data.shape[-1] % 3
    if filler:
        data = np.concatenate([data, np.zeros((*data.shape[:-1], filler), np.uint8)], axis=-1)
    three = data.reshape(*data.shape[:-1], -1, 3).astype(np.uint16)
    codes = np.empty((*three.shape[:-1], 2), "<u4")
    codes[..., 0] = _FOUR_OF_3[three[..., 0] | (three[..., 1] & 15) << 8]
    codes[..., 1] = _FOUR_OF_3[three[..., 1] >> 4 | three[..., 2] << 4]
    return codes.view(np.uint8).reshape(*data.shape[:-1], -1)


def _tiled(shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]) -> LazyTensor:
    """Codes [o, i] whose rows are computed TILE at a time."""

    def read(start: int, stop: int) -> np.ndarray:
        if stop - start <= TILE:
            return rows(start, stop)
        codes = np.empty((stop - start, *shape[1:]), np.uint8)
        for at in range(start, stop, TILE):
            codes[at - start : at - start + TILE] = rows(at, min(at + TILE, stop))
        return codes

    return Computed(shape, "uint8", read)


def along_rows(words: LazyTensor, bits: int, depth: int, inputs: np.ndarray | None = None) -> LazyTensor:
    """Codes [..., o, depth] of words [..., o, w] that hold a row's codes one after the other.

    inputs [depth]: the inputs in the order in which the result has them; by default as they are stored.
    """

    def rows(start: int, stop: int) -> np.ndarray:
        codes = unpack(words.read(start, stop), bits)
        return codes[..., :depth] if inputs is None else codes.take(inputs, axis=-1)

    return _tiled((*words.shape[:-1], depth), rows)


def along_columns(words: LazyTensor, bits: int, inputs: np.ndarray | None = None) -> LazyTensor:
    """Codes [o, i] of words [i * bits / 32, o] that hold codes of one output one after the other.

    inputs [i]: the inputs in the order in which the result has them; by default as they are stored.
    """

    def rows(start: int, stop: int) -> np.ndarray:
        codes = unpack(words.narrow(1, start, stop).read().T, bits)
        return codes if inputs is None else codes.take(inputs, axis=1)

    return _tiled((words.shape[1], words.shape[0] * 32 // bits), rows)


def as_bytes(tensor: LazyTensor) -> LazyTensor:
    """The bits of a tensor of 8-bit numbers, as uint8."""
    return Computed(tensor.shape, "uint8", lambda start, stop: tensor.read(start, stop).view(np.uint8))


def unsigned(tensor: LazyTensor) -> LazyTensor:
    """int8 as codes of which 128 is zero."""
    return Computed(tensor.shape, "uint8", lambda start, stop: tensor.read(start, stop).view(np.uint8) ^ 128)


def across(
    words: LazyTensor, bits: int, columns: int, *, places: np.ndarray | None = None, plus: int = 0
) -> LazyTensor:
    """Codes [o, n] of words [n, o * bits / 32], whose rows hold the codes of neighbouring outputs.

    columns: o. places [32 / bits]: where in its word the code of each of its outputs lies, counted in codes from the
    lowest bits; by default in their own order. plus: what is added to every word first.
    """

    def rows(start: int, stop: int) -> np.ndarray:
        low, high, first = _span(start, stop, bits, words.shape[1])
        found = words.narrow(1, low, high).read()
        if plus:
            found = (found.view(np.uint32) + np.uint32(plus)).view(np.int32)
        if 32 % bits:
            codes = unpack(found, bits).T
        else:  # a code of every word at a time: rows of the result are written whole
            turned, each = np.ascontiguousarray(found.T).view(np.uint32), 32 // bits
            codes = np.empty((len(turned), each, found.shape[0]), np.uint8)
            for at, place in enumerate(range(each) if places is None else places):
                codes[:, at] = turned >> np.uint32(bits * place) & np.uint32((1 << bits) - 1)
            codes = codes.reshape(-1, found.shape[0])
        return np.ascontiguousarray(codes[start - first : stop - first])

    return _tiled((columns, words.shape[0]), rows)


def down(words: LazyTensor, bits: int, columns: int) -> LazyTensor:
    """Codes [o, n] of words [o * bits / 32, n], whose columns hold the codes of neighbouring outputs."""

    def rows(start: int, stop: int) -> np.ndarray:
        low, high, first = _span(start, stop, bits, words.shape[0])
        codes = unpack(words.read(low, high).T, bits)
        return np.ascontiguousarray(codes[:, start - first : stop - first].T)

    return Computed((columns, words.shape[1]), "uint8", rows)


def _span(start: int, stop: int, bits: int, words: int) -> tuple[int, int, int]:
    """(first word, last word + 1, the code that the first one begins with) of words that hold codes start … stop-1."""
    codes = 32 // math.gcd(32, bits)  # after so many a code begins with a word again
    each = codes * bits // 32
    low, high = start // codes, -(-stop // codes)
    return low * each, min(high * each, words), low * codes
