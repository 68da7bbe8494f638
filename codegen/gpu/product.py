"""What every product kernel of a GPU shares: its operands in memory, and what becomes of its sums.

A kernel computes tiles of y = epilogue(x @ W^T) from rows of x and rows of W, which are output columns. Sums are
float32 whatever the operands are, and are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.tirx.script import builder as T

from llmc.targets.gpu import GpuTarget

from ..cpu.vector import Params
from ..epilogue import Epilogue
from .machine import BYTES, Machine, flat, i64, when, widen
from .pack import row_elements


@dataclass(frozen=True)
class Product:
    """One matrix product on one target. experts: how many weights lie one after the other; None where there is one."""

    target: GpuTarget
    columns: int
    depth: int
    weight: str
    activation: str
    out: str
    epilogue: Epilogue = field(default_factory=Epilogue)
    experts: int | None = None

    @property
    def gated(self) -> bool:
        return self.epilogue.gate is not None

    @property
    def out_columns(self) -> int:
        return self.columns // 2 if self.gated else self.columns

    @property
    def weight_depth(self) -> int:
        """Elements of a stored row of the weight."""
        return row_elements(self.depth, self.weight)

    @property
    def chunk(self) -> int:
        """Elements of the weight in 16 bytes."""
        return 16 // BYTES[self.weight]

    def params(self, ids: str | None = None) -> Params:
        """Parameters of the PrimFunc; the symbol n counts the rows of x."""
        epilogue, lead = self.epilogue, () if self.experts is None else (self.experts,)
        found: list = [
            ("x", ("n", self.depth), self.activation),
            ("w", (*lead, self.columns, self.weight_depth), self.weight),
        ]
        if ids:
            found.append(("ids", ("n",), ids))
        if epilogue.bias:
            found.append(("bias", (*lead, self.columns), epilogue.bias))
        if epilogue.residual:
            found.append(("residual", ("n", self.out_columns), epilogue.residual))
        return [*found, ("y", ("n", self.out_columns), self.out)]


class Memory:
    """A tensor as flat memory: elements (bfloat16 as its bits in uint16), and words of 4 bytes."""

    def __init__(self, buffer: Any):
        self.dtype = str(buffer.dtype)
        self.buffer = buffer
        self.elements = flat(buffer)
        self.words = flat(buffer, "uint32")


@dataclass(frozen=True)
class Operands:
    """The tensors of one product."""

    product: Product
    machine: Machine
    x: Memory
    w: Memory
    y: Memory
    bias: Memory | None = None
    residual: Memory | None = None

    @classmethod
    def of(cls, product: Product, machine: Machine, buffers: Sequence[Any], ids: str | None = None) -> Operands:
        """From the buffers of product.params(ids)."""
        names = [name for name, _, _ in product.params(ids)]
        memories = {name: Memory(b) for name, b in zip(names, buffers, strict=True) if name != "ids"}
        return cls(product, machine, **memories)

    def finish(
        self, row: Any, column: Any, sums: Sequence[Any], partners: Sequence[Any] = (), lead: Any = None
    ) -> None:
        """Emit the epilogue of one row's sums of the out columns column, column + 1, …, and their stores.

        row: int64, of x and y. column: int64, a multiple of their number; columns past the last are dropped. partners:
        with a gate, the sums of what the gates let through. lead: int64, the weight's first column among all experts'.
        """
        product, epilogue, m = self.product, self.product.epilogue, self.machine
        columns, run = product.out_columns, len(sums)
        base = T.bind(row * columns + column)

        def value(i: int) -> Any:
            found = sums[i]
            at = column + i if lead is None else lead + column + i
            if self.bias:
                found = T.bind(found + m.load_f32(self.bias.elements, [at]))
            if epilogue.gate:
                other = partners[i]
                if self.bias:
                    other = T.bind(other + m.load_f32(self.bias.elements, [at + columns]))
                found = T.bind(activation(m, epilogue.gate, found) * other)
            if self.residual:
                found = T.bind(found + m.load_f32(self.residual.elements, [base + i]))
            return found

        if columns % run == 0:
            with when(column < columns):
                store_run(m, self.y.elements, base, [value(i) for i in range(run)])
        else:
            for i in range(run):
                with when(column + i < columns):
                    m.store(self.y.elements, [base + i], value(i))


def store_run(m: Machine, to: Any, element: Any, values: Sequence[Any]) -> None:
    """Store float32 values to consecutive elements in one access; `element` is a multiple of their number."""
    if len(values) == 1:
        m.store(to, [element], values[0])
        return
    dtype = str(to.dtype)
    run = m.registers(len(values), dtype)
    for i, value in enumerate(values):
        run[i] = m.narrow(value, dtype)
    vector = run.buffer.vload([0], f"{dtype}x{len(values)}")
    T.buffer_store(to, vector, [T.ramp(element, 1, len(values))])


def load_run(m: Machine, source: Memory, element: Any, count: int) -> list[Any]:
    """`count` consecutive elements as float32, in as few accesses as can be; `element` is a multiple of `count`."""
    at_once = min(count, 16 // BYTES[source.dtype])
    words = m.registers(count * BYTES[source.dtype] // 4, "uint32")
    each = at_once * BYTES[source.dtype] // 4
    for i in range(count // at_once):
        m.fetch(source.words, element + i * at_once, source.dtype, words, i * each, at_once)
    return m.unpack(words, 0, source.dtype, count)


def load_guarded(m: Machine, source: Memory, base: Any, first: Any, stop: int, count: int) -> list[Any]:
    """Elements base + first, … of a row of `stop` elements that begins at `base` as float32; zero from `stop` on."""
    return [
        T.bind(T.if_then_else(first + i < stop, widened(source, base + first + i), T.float32(0))) for i in range(count)
    ]


def widened(source: Memory, element: Any) -> Any:
    """An element as a float32 expression: for use in a branch that is not always taken."""
    return widen(source.elements[element])


@dataclass(frozen=True)
class RowMap:
    """Which rows of x and y a tile computes, with which weight.

    count: int64, how many of the tile's rows are there (at least one). row(local), int64: where they stand in x and y.
    lead: int64, the first column of the weight among all experts'; None where there is one weight.
    """

    count: Any
    row: Callable[[Any], Any]
    lead: Any = None

    def source(self, local: Any) -> Any:
        """int64: the row of x to read for a tile's row; past the last, one that exists."""
        return self.row(T.min(i64(local), self.count - 1))

    def weight_row(self, row: Any) -> Any:
        """int64: a row of the tile's weight among all experts'."""
        return row if self.lead is None else self.lead + row


@dataclass(frozen=True)
class ColumnMap:
    """Which rows of the weight stand in a tile of `width` local columns.

    With a gate, `group` gates stand beside the `group` columns that they gate, so that the thread that has a sum has
    its partner's: local columns 0 … group-1 are gates, group … 2·group-1 their partners, and so on.
    """

    columns: int
    width: int
    group: int
    gated: bool

    @property
    def out_columns(self) -> int:
        return self.columns // 2 if self.gated else self.columns

    @property
    def out_width(self) -> int:
        """Out columns of a tile."""
        return self.width // 2 if self.gated else self.width

    @property
    def tiles(self) -> int:
        return -(-self.out_columns // self.out_width)

    def out_column(self, tile: Any, local: Any) -> Any:
        """int64: the out column of a tile's local column (of a gate or of its partner)."""
        if self.gated:
            local = T.floordiv(local, 2 * self.group) * self.group + T.floormod(local, self.group)
        return i64(tile) * self.out_width + i64(local)

    def weight_row(self, tile: Any, local: Any) -> Any:
        """int64: the weight's row at a tile's local column; past the last, one that exists."""
        column = self.out_column(tile, local)
        if self.out_columns % self.out_width:
            column = T.min(column, T.int64(self.out_columns - 1))
        if not self.gated:
            return column
        return column + i64(T.floormod(T.floordiv(local, self.group), 2)) * self.out_columns


def activation(m: Machine, name: str, x: Any) -> Any:
    """silu(x) or gelu_tanh(x) within a few ulp of float32."""
    if name == "silu":
        return T.bind(x * sigmoid(m, x))
    # gelu_tanh: x/2 · (1 + tanh(u)) = x · sigmoid(2u), u = sqrt(2/π) · (x + 0.044715 x³)
    scale = 2 * 0.7978845608028654
    inner = T.bind(x * m.fma(x * x, T.float32(scale * 0.044715), T.float32(scale)))
    return T.bind(x * sigmoid(m, inner))


def sigmoid(m: Machine, x: Any) -> Any:
    """1 / (1 + e**-x). e**80 is finite; what it is divided by vanishes beside float32's ordinary numbers."""
    return T.bind(T.float32(1) / (T.float32(1) + m.exp(T.min(T.float32(0) - x, T.float32(80)))))
