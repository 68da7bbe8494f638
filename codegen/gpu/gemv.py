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
from .memory import load_guarded, load_run
from .product import ColumnMap, Operands, Product, RowMap

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
    pieces = -(-product.weight_depth // (target.warp * product.run))
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
    weight, batch, width = operands.weight, made.batch, made.width
    words_of, run = weight.words, weight.run
    lane, warp = T.bind(m.lane), T.bind(m.warp_number)
    group, part = T.bind(T.floordiv(warp, made.split)), T.bind(T.floormod(warp, made.split))
    weights = [weight.start(rows.weight_row(columns.weight_row(column_tile, group * width + j))) for j in range(width)]
    sources = [T.bind(rows.source(T.int64(r)) * product.depth) for r in range(batch)]
    sums = m.registers(batch * width)
    sums.fill(0)
    # Memory of the block, at once: a lookup's values, and then what every warp leaves for the end.
    shared = m.shared(weight.table + WARPS * batch * width)
    weight.prepare(shared)
    stride = m.warp * run * made.split  # elements of the depth that the warps of a group pass together

    def multiply(words: Registers, k: Any) -> None:
        for part in range(run // weight.part):
            into = m.registers(batch * width) if weight.scaled else sums
            if weight.scaled:
                into.fill(0)
            for first in range(part * weight.part, (part + 1) * weight.part, weight.step):
                w = [weight.numbers(words, j * words_of, start, k, first) for j, start in enumerate(weights)]
                for r, base in enumerate(sources):
                    if product.depth % weight.step == 0 and product.depth == product.weight_depth:
                        x = load_run(m, operands.x, base + k + first, weight.step)
                    else:
                        x = load_guarded(m, operands.x, base, k + first, product.depth, weight.step)
                    for j in range(width):
                        for e in range(weight.step):
                            into[r * width + j] = m.fma(w[j][e], x[e], into[r * width + j])
            if weight.scaled:
                for j in range(width):
                    scale = weight.scale(words, j * words_of, k, part)
                    for r in range(batch):
                        sums[r * width + j] = m.fma(scale, into[r * width + j], sums[r * width + j])

    def pieces(k: Any, count: int) -> None:
        """The pieces at k, k + stride, …: all read, then all multiplied."""
        words = [m.registers(width * words_of, "uint32") for _ in range(count)]
        for p in range(count):
            for j, start in enumerate(weights):
                weight.fetch(words[p], j * words_of, start, k + p * stride)
        for p in range(count):
            multiply(words[p], k + p * stride)

    first = T.bind(i64((part * m.warp + lane) * run))
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
    if weight.table:
        m.barrier()
    # All before the first is stored: LLVM sinks sums past a branch, and keeps all that they are made of until then.
    totals = [m.warp_reduce(lambda a, b: a + b, T.bind(sums[i])) for i in range(batch * width)]
    with when(lane == 0):
        for i, total in enumerate(totals):
            T.buffer_store(shared, total, [weight.table + warp * (batch * width) + i])
    m.barrier()
    out_width = columns.out_width // made.groups
    with when(m.thread < batch * columns.out_width):
        r = T.bind(T.floordiv(m.thread, columns.out_width))
        local = T.bind(T.floormod(m.thread, columns.out_width))
        owner, at = T.bind(T.floordiv(local, out_width)), T.bind(T.floormod(local, out_width))

        def total_of(index: Any) -> Any:
            found = T.float32(0)
            for s in range(made.split):
                found = found + shared[weight.table + ((owner * made.split + s) * batch + r) * width + index]
            return T.bind(found)

        with when(i64(r) < rows.count):
            partners = [total_of(at + width // 2)] if product.gated else []
            column = T.bind(i64(column_tile) * columns.out_width + i64(local))
            operands.finish(T.bind(rows.row(i64(r))), column, [total_of(at)], partners, rows.lead)
