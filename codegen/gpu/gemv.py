"""Products of a few rows: as fast as the weight can be read.

A warp reads 16 bytes a lane of each of a few rows of W, several times over before it computes with the first, so that
enough bytes are on their way. Where columns are few, the warps of a block share the depth. The order of a sum depends
on the shape of W, on the operands' dtypes and on the plan, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Registers, i64, when
from .product import ColumnMap, Operands, Product, RowMap, load_guarded, load_run

WARPS = 4  # of a block


@dataclass(frozen=True)
class Plan:
    """How a product of at most `batch` rows is shared out.

    width: rows of W that a warp reads together. split: warps of a block that share the depth of the same rows of W.
    ahead: pieces of the depth that are read before the first is computed with.
    """

    batch: int
    width: int
    split: int
    ahead: int

    @property
    def groups(self) -> int:
        """Sets of warps with rows of W of their own, in a block."""
        return WARPS // self.split

    def columns(self, product: Product) -> ColumnMap:
        """The columns of a block."""
        return ColumnMap(product.columns, self.width * self.groups, self.width // 2, product.gated)


def plan(product: Product, batch: int) -> Plan:
    """Enough warps to fill the machine, each with enough of the depth to read, and registers for all sums."""
    target = product.target
    pieces = -(-product.weight_depth // (target.warp * product.chunk))
    full = target.multiprocessors * 16  # warps that hide the memory's latency
    width = 4 if product.columns >= 4 * full else 2
    split = 1
    while split < WARPS and product.columns // width * split < full and pieces >= 4 * split:
        split *= 2
    ahead = max(1, min((8 if batch <= 4 else 4) // width, pieces // split))
    return Plan(batch, width, split, ahead)


def tile(operands: Operands, rows: RowMap, made: Plan, column_tile: Any) -> None:
    """Emit a block of WARPS warps: at most made.batch rows, the columns of made.columns number column_tile."""
    product, m, columns = operands.product, operands.machine, made.columns(operands.product)
    batch, width, chunk = made.batch, made.width, product.chunk
    lane, warp = T.bind(m.lane), T.bind(m.warp_number)
    group, part = T.bind(T.floordiv(warp, made.split)), T.bind(T.floormod(warp, made.split))
    weights = [
        T.bind(rows.weight_row(columns.weight_row(column_tile, group * width + j)) * product.weight_depth)
        for j in range(width)
    ]
    sources = [T.bind(rows.source(T.int64(r)) * product.depth) for r in range(batch)]
    sums = m.registers(batch * width)
    sums.fill(0)
    stride = m.warp * chunk * made.split  # elements of the depth that the warps of a group pass together

    def read(words: Registers, k: Any) -> None:
        for j, base in enumerate(weights):
            m.fetch(operands.w.words, base + k, product.weight, words, j * 4, chunk, once=True)

    def multiply(words: Registers, k: Any) -> None:
        w = [m.unpack(words, j * 4, product.weight, chunk) for j in range(width)]
        for r, base in enumerate(sources):
            if product.depth % chunk == 0:
                x = load_run(m, operands.x, base + k, chunk)
            else:
                x = load_guarded(m, operands.x, base, k, product.depth, chunk)
            for j in range(width):
                for e in range(chunk):
                    sums[r * width + j] = m.fma(w[j][e], x[e], sums[r * width + j])

    def pieces(k: Any, count: int) -> None:
        """The pieces at k, k + stride, …: all read, then all multiplied."""
        words = [m.registers(width * 4, "uint32") for _ in range(count)]
        for p in range(count):
            read(words[p], k + p * stride)
        for p in range(count):
            multiply(words[p], k + p * stride)

    first = T.bind(i64((part * m.warp + lane) * chunk))
    whole = product.weight_depth // stride
    turns, rest = divmod(whole, made.ahead)
    if turns:
        with T.serial(0, turns) as turn:
            pieces(T.bind(first + i64(turn) * (stride * made.ahead)), made.ahead)
    if rest:
        pieces(T.bind(first + turns * made.ahead * stride), rest)
    if product.weight_depth % stride:
        last = T.bind(first + whole * stride)
        with when(last < product.weight_depth):
            pieces(last, 1)

    # Every warp leaves its sums in shared memory; then a thread takes an output.
    partial = m.shared(WARPS * batch * width)
    for i in range(batch * width):
        total = m.warp_reduce(lambda a, b: a + b, T.bind(sums[i]))
        with when(lane == 0):
            T.buffer_store(partial, total, [warp * (batch * width) + i])
    m.barrier()
    out_width = columns.out_width // made.groups
    with when(m.thread < batch * columns.out_width):
        r = T.bind(T.floordiv(m.thread, columns.out_width))
        local = T.bind(T.floormod(m.thread, columns.out_width))
        owner, at = T.bind(T.floordiv(local, out_width)), T.bind(T.floormod(local, out_width))

        def total_of(index: Any) -> Any:
            found = T.float32(0)
            for s in range(made.split):
                found = found + partial[((owner * made.split + s) * batch + r) * width + index]
            return T.bind(found)

        with when(i64(r) < rows.count):
            partners = [total_of(at + width // 2)] if product.gated else []
            column = T.bind(i64(column_tile) * columns.out_width + i64(local))
            operands.finish(T.bind(rows.row(i64(r))), column, [total_of(at)], partners, rows.lead)
