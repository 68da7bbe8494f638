"""What every product kernel of a GPU shares: its operands in memory, and what becomes of its sums.

A kernel computes tiles of y = epilogue(x @ W^T) from rows of x and rows of W, which are output columns. Sums are
float32 whatever the operands are, and are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format
from llmc.targets.gpu import GpuTarget

from ..cpu.vector import Params
from ..epilogue import Epilogue
from .machine import Machine, i64, when
from .memory import Memory, store_run
from .weight_rows import WeightRows, weight_depth, weight_rows, weight_run, weight_tensors


@dataclass(frozen=True)
class Product:
    """One matrix product on one target.

    weight: dtype of W, or its format. experts: how many weights lie one after the other; None where there is one.
    rounded: the group (0: rows) in which x is rounded to 8 bits first; None: it is not.
    """

    target: GpuTarget
    columns: int
    depth: int
    weight: str | Format
    activation: str
    out: str
    epilogue: Epilogue = field(default_factory=Epilogue)
    experts: int | None = None
    rounded: int | None = None

    @property
    def gated(self) -> bool:
        return self.epilogue.gate is not None

    @property
    def out_columns(self) -> int:
        return self.columns // 2 if self.gated else self.columns

    @property
    def weight_depth(self) -> int:
        """Elements of a stored row of the weight."""
        return weight_depth(self.weight, self.depth)

    @property
    def run(self) -> int:
        """Elements of the weight that a thread reads together: 16 bytes, or nearly."""
        return weight_run(self.weight, self.depth)

    def weight_tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of what the weight is stored as."""
        return weight_tensors(self.weight, self.columns, self.depth, () if self.experts is None else (self.experts,))

    def params(self, ids: str | None = None) -> Params:
        """Parameters of the PrimFunc; the symbol n counts the rows of x."""
        epilogue, lead = self.epilogue, () if self.experts is None else (self.experts,)
        found: list = [("x", ("n", self.depth), self.activation), *self.weight_tensors()]
        if ids:
            found.append(("ids", ("n",), ids))
        if epilogue.bias:
            found.append(("bias", (*lead, self.columns), epilogue.bias))
        if epilogue.residual:
            found.append(("residual", ("n", self.out_columns), epilogue.residual))
        return [*found, ("y", ("n", self.out_columns), self.out)]


@dataclass(frozen=True)
class Operands:
    """The tensors of one product. w: those of the weight; weight: its rows.

    x_scales: of x's groups [n, groups] float32, where x is codes; see round_rows.round_codes.
    """

    product: Product
    machine: Machine
    x: Memory
    w: tuple[Memory, ...]
    weight: WeightRows
    y: Memory
    bias: Memory | None = None
    residual: Memory | None = None
    x_scales: Memory | None = None

    @classmethod
    def of(cls, product: Product, machine: Machine, buffers: Sequence[Any], ids: str | None = None) -> Operands:
        """From the buffers of product.params(ids)."""
        names = [name for name, _, _ in product.params(ids)]
        memories = {name: Memory(b) for name, b in zip(names, buffers, strict=True) if name != "ids"}
        w = tuple(memories.pop(name) for name, _, _ in product.weight_tensors())
        return cls(product, machine, w=w, weight=weight_rows(machine, product.weight, product.depth, w), **memories)

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

        def scaled(found: Any, at: Any) -> Any:
            return T.bind(found * self.weight.row_scale(at)) if self.weight.rows_scaled else found

        def value(i: int) -> Any:
            at = column + i if lead is None else lead + column + i
            found = scaled(sums[i], at)
            if self.bias:
                found = T.bind(found + m.load_f32(self.bias.elements, [at]))
            if epilogue.gate:
                other = scaled(partners[i], at + columns)
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
