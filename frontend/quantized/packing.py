"""Codes in words: what checkpoints store as int32 or bytes, taken apart into one byte a code."""

import math

import numpy as np

from llmc.frontend.quantized.tensor import Computed
from llmc.frontend.weights import LazyTensor


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """words [..., w] of int32 (or bytes) -> codes [..., w * word bits / bits] uint8, the lowest bits first.

    A row is one stream of bits, so codes of 3 bits may lie across two words.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 4:
        codes = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
        codes[..., ::2], codes[..., 1::2] = data & 15, data >> 4
        return codes
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    digits = stream.reshape(*stream.shape[:-1], -1, bits)
    return (digits << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def along_rows(words: LazyTensor, bits: int, depth: int, inputs: np.ndarray | None = None) -> LazyTensor:
    """Codes [..., o, depth] of words [..., o, w] that hold a row's codes one after the other.

    inputs [depth]: the inputs in the order in which the result has them; by default as they are stored.
    """

    def rows(start: int, stop: int) -> np.ndarray:
        codes = unpack(words.read(start, stop), bits)
        return codes[..., :depth] if inputs is None else codes[..., inputs]

    return Computed((*words.shape[:-1], depth), "uint8", rows)


def along_columns(words: LazyTensor, bits: int, inputs: np.ndarray | None = None) -> LazyTensor:
    """Codes [o, i] of words [i * bits / 32, o] that hold codes of one output one after the other.

    inputs [i]: the inputs in the order in which the result has them; by default as they are stored.
    """

    def rows(start: int, stop: int) -> np.ndarray:
        codes = unpack(words.narrow(1, start, stop).read().T, bits)
        return codes if inputs is None else codes[:, inputs]

    return Computed((words.shape[1], words.shape[0] * 32 // bits), "uint8", rows)


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
        codes = unpack(found, bits)
        if places is not None:
            codes = codes.reshape(len(codes), -1, len(places))[..., places].reshape(len(codes), -1)
        return np.ascontiguousarray(codes[:, start - first : stop - first].T)

    return Computed((columns, words.shape[0]), "uint8", rows)


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
