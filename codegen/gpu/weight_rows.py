"""Rows of a weight as a product's thread reads them: floats as they are, or codes that it decodes in registers.

A thread reads *runs*: so many elements of one row, in as few accesses as can be, into registers. It computes with a
*step* of them at a time. Elements of a run's *part* share a scale, with which their sum is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format

from .machine import BYTES, Machine, Registers
from .memory import Memory, load_run
from .pack import UNIT, row_elements
from .quantized_layout import Layout
from .quantized_rows import QuantizedRows

__all__ = ["FloatRows", "QuantizedRows", "WeightRows", "weight_depth", "weight_rows", "weight_run", "weight_tensors"]


class WeightRows(Protocol):
    """The rows of one weight.

    run: elements that are read together; part: of them, those that share a scale; step: of those, such as are decoded
    together. words: registers of a run. table: words of shared memory that decoding looks values up in. scaled: parts
    have scales. rows_scaled: a row has one, for its sums over the whole depth.
    """

    run: int
    part: int
    step: int
    words: int
    table: int
    scaled: bool
    rows_scaled: bool

    def prepare(self, shared: Any) -> None:
        """Fill the first `table` floats of shared memory; all threads of a block come here before any decodes."""

    def start(self, row: Any) -> Any:
        """What the other functions want to know of a row (int64, of all experts' rows)."""

    def fetch(self, held: Registers, at: int, start: Any, k: Any) -> None:
        """The words held[at], … = the run of a row that begins at element k, int64, a multiple of `run`."""

    def numbers(self, held: Registers, at: int, start: Any, k: Any, first: int) -> list[Any]:
        """Elements first … first + step - 1 of that run as float32, not yet scaled."""

    def scale(self, held: Registers, at: int, k: Any, part: int) -> Any:
        """The scale of a part of that run, float32; only if scaled."""

    def row_scale(self, row: Any) -> Any:
        """The scale of a row, float32; only if rows_scaled."""

    def few(self, start: Any, k: Any, count: int) -> list[Any]:
        """Elements k, k + 1, … as float32, scaled but for what rows have; `count` is 4, k a multiple of it."""


class FloatRows:
    """Rows of floats: a run is 16 bytes, and needs no decoding."""

    words = 4
    table = 0
    scaled = rows_scaled = False

    def __init__(self, machine: Machine, source: Memory, depth: int):
        self.machine, self.source, self.depth = machine, source, depth
        self.run = self.part = self.step = UNIT // BYTES[source.dtype]

    def prepare(self, shared: Any) -> None:
        pass

    def start(self, row: Any) -> Any:
        return T.bind(row * self.depth)

    def fetch(self, held: Registers, at: int, start: Any, k: Any) -> None:
        self.machine.fetch(self.source.words, start + k, self.source.dtype, held, at, self.run, once=True)

    def numbers(self, held: Registers, at: int, start: Any, k: Any, first: int) -> list[Any]:
        return self.machine.unpack(held, at, self.source.dtype, self.run)

    def scale(self, held: Registers, at: int, k: Any, part: int) -> Any:
        raise NotImplementedError

    def row_scale(self, row: Any) -> Any:
        raise NotImplementedError

    def few(self, start: Any, k: Any, count: int) -> list[Any]:
        return load_run(self.machine, self.source, start + k, count)


def weight_depth(weight: str | Format, depth: int) -> int:
    """Elements of a stored row."""
    return row_elements(depth, weight) if isinstance(weight, str) else Layout(weight, depth).stored_depth


def weight_run(weight: str | Format, depth: int) -> int:
    """Elements that a thread of a matrix-vector kernel reads together."""
    return UNIT // BYTES[weight] if isinstance(weight, str) else Layout(weight, depth).run()


def weight_tensors(
    weight: str | Format, columns: int, depth: int, lead: Sequence[int] = ()
) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of the tensors of a stored weight [*lead, columns, depth]."""
    if isinstance(weight, Format):
        return Layout(weight, depth).tensors(columns, lead)
    return [("w", (*lead, columns, row_elements(depth, weight)), weight)]


def weight_rows(machine: Machine, weight: str | Format, depth: int, memories: Sequence[Memory]) -> WeightRows:
    """The reader of a weight whose tensors those of weight_tensors are."""
    if isinstance(weight, Format):
        return QuantizedRows(machine, Layout(weight, depth), memories)
    return FloatRows(machine, memories[0], row_elements(depth, weight))
