"""What a tiled product of codes by codes has beside its pieces: scales of groups, and sums that they multiply.

Where neither operand has groups, integers are summed over the whole depth, and scales wait for the end. Else sums are
of a *period* of the depth, within which no scale changes, and sum + period's sum · scales is rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from tvm.tirx.script import builder as T

from .code_units import CodeUnit
from .gemm_sides import CodeSide, there
from .machine import Machine, Registers, i64
from .matrix_units import ptx
from .product import Product

__all__ = ["ByteSide", "ScaleSide", "Scaling", "period_of"]


def period_of(product: Product, unit: CodeUnit, share: int) -> int:
    """Codes of a period, where a warp multiplies so many consecutive ones of a step; 0: the whole depth."""
    groups = [g for g in (product.rounded, getattr(product.weight, "group", 0)) if g]
    return gcd(share, unit.longest, *groups) if groups or unit.always else 0


class ByteSide(CodeSide):
    """Rows of 4-bit codes, which become signed bytes."""

    codes_only = True

    def decode(self, begin: Any, start: Any, local: Any, held: Registers, k: Any) -> None:
        words = self.rows.bytes_run(held, 0, start, k)
        for i in range(self.rows.run // self.unit.chunk):
            chunk = self.unit.hold()
            for j in range(len(chunk)):
                chunk[j] = words[i * len(chunk) + j]
            self.unit.put(chunk, self.piece, self.place(begin, local, i))


class ScaleSide:
    """See gemm_sides.Side. The scales of a step's periods, [rows][periods] float32, one step ahead in registers.

    rows: of the piece; groups: of a row in memory, of `group` elements each. scale(row, group): the scale of a group of
    a piece's row.
    """

    def __init__(
        self,
        m: Machine,
        rows: int,
        step: int,
        period: int,
        stages: int,
        group: int,
        groups: int,
        scale: Callable[[Any, Any], Any],
    ):
        self.m, self.step, self.period, self.group, self.groups, self.scale = m, step, period, group, groups, scale
        self.periods = step // period
        self.size, self.pieces = rows * self.periods, 2 if stages > 1 else 1
        self.piece = m.shared(self.pieces * self.size)
        self.held: Registers | None = None

    def begin(self, step: Any, stage: Any) -> Any:
        return T.bind(T.floormod(step, 2) * self.size) if self.pieces > 1 else 0

    def each(self, emit: Callable[[int, Any], None]) -> None:
        """emit(number, place in the piece) for what this thread brings."""
        for i in range(-(-self.size // self.m.threads)):
            place = T.bind(self.m.thread + i * self.m.threads)
            with there(None if (i + 1) * self.m.threads <= self.size else place < self.size):
                emit(i, place)

    def hold(self) -> None:
        self.held = self.m.registers(-(-self.size // self.m.threads))

    def fetch(self, step: Any) -> None:
        held = self.held

        def one(i: int, place: Any) -> None:
            k = i64(step * self.step + T.floormod(place, self.periods) * self.period)
            # Past the depth there are zeros, whatever their scale.
            group = T.bind(T.min(T.floordiv(k, self.group), self.groups - 1))
            held[i] = self.scale(T.bind(T.floordiv(place, self.periods)), group)  # type: ignore[index]

        self.each(one)

    def put(self, step: Any) -> None:
        begin, held = self.begin(step, 0), self.held

        def one(i: int, place: Any) -> None:
            if self.pieces > 1:  # by an instruction: TVM would want a barrier after plain stores, and finds no place
                ptx("st.shared.b32", self.piece.ptr_to([begin + place]), T.reinterpret("uint32", held[i]))  # type: ignore[index]
            else:
                T.buffer_store(self.piece, held[i], [begin + place])  # type: ignore[index]

        self.each(one)

    def copy(self, step: Any, stage: Any) -> None:
        """Scales pass registers: those of the first step, here; of all others, when the one before has landed."""
        if self.held is None:
            self.hold()
            self.fetch(step)

    def land(self, step: Any, stage: Any) -> None:
        self.put(step)
        self.fetch(step + 1)


class Scaling:
    """Sums of periods, scaled and added up. x, w: the scales of the operands; None: they have none but rows'.

    row, column: of the warp in the block, where fragments of x and of W begin.
    """

    def __init__(self, unit: CodeUnit, period: int, x: ScaleSide | None, w: ScaleSide | None, row: Any, column: Any):
        self.unit, self.period, self.x, self.w, self.row, self.column = unit, period, x, w, row, column
        self.rows, self.columns = ([T.bind(at) for at in found] for found in (unit.lane_rows(), unit.lane_columns()))
        self.partial = unit.sums(1, unit.sum_dtype)

    def sides(self) -> list[ScaleSide]:
        return [side for side in (self.x, self.w) if side]

    def multiply(
        self,
        sums: Registers,
        step: Any,
        part: Any,
        strides: int,
        x: Callable[[int, int], Any],
        w: Callable[[int, int], Any],
        down: int,
        across: int,
    ) -> None:
        """Add up a step. x(i, stride), w(j, stride): what a warp reads of fragments, of which it has down by across;
        part: its part of the step, of so many strides.

        Fragments of W come one after the other, that registers suffice for whole periods of those of x.
        """
        each = self.period // self.unit.stride
        for first in range(0, strides, each):
            self.unit.machine.in_turn()
            number = part * (strides // each) + first // each
            of_rows = self.of_rows(step, number, down)
            a = [[x(i, s) for s in range(first, first + each)] for i in range(down)]
            for j in range(across):
                self.unit.machine.in_turn()
                b = [w(j, s) for s in range(first, first + each)]
                of_columns = self.of_columns(step, number, j)
                for i in range(down):
                    self.unit.start(self.partial)
                    for s in range(each):
                        self.unit.multiply(self.partial, 0, a[i][s], b[s])
                    self.add(sums, i * across + j, of_rows[i], of_columns)

    def of_rows(self, step: Any, number: Any, fragments: int) -> list[list[Any]]:
        """fragment -> scales of x for this lane's rows of it, in the step's period of that number."""
        if self.x is None:
            return [[None] * len(self.rows)] * fragments
        return [self._read(self.x, step, number, self.row + i * self.unit.rows, self.rows) for i in range(fragments)]

    def of_columns(self, step: Any, number: Any, fragment: int) -> list[list[Any]]:
        """Scales of W for the columns of this lane's runs of a fragment."""
        if self.w is None:
            return [[None] * self.unit.run] * len(self.columns)
        first = self.column + fragment * self.unit.columns
        each = [[at + e for e in range(self.unit.run)] for at in self.columns]
        return [self._read(self.w, step, number, first, run) for run in each]

    def _read(self, side: ScaleSide, step: Any, number: Any, first: Any, rows: Sequence[Any]) -> list[Any]:
        begin = side.begin(step, 0)
        return [T.bind(side.piece[begin + (first + at) * side.periods + number]) for at in rows]

    def add(self, sums: Registers, fragment: int, x: Sequence[Any], w: Sequence[Sequence[Any]]) -> None:
        """A fragment's sums += those of the period, scaled."""
        m, base = self.unit.machine, fragment * self.unit.lane_sums
        for row, column, first, apart in self.unit.places():
            for e in range(self.unit.run):
                at = first + apart * e
                factors = [f for f in (x[row], w[column][e]) if f is not None]
                value = self.unit.part(self.partial[at])
                if not factors:
                    sums[base + at] = sums[base + at] + value
                    continue
                factor = factors[0] if len(factors) == 1 else T.bind(factors[0] * factors[1])
                sums[base + at] = m.fma(value, factor, sums[base + at])
