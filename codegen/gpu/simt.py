"""Tiled products without matrix units: any operands, any shape, exact float32 multiply-adds.

A block computes a square of outputs. Step by step along the depth it copies a piece of its rows of x and of W to shared
memory as float32, [depth][rows]; every thread multiplies a small square of them in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from .machine import Registers, i64, when
from .memory import load_guarded, load_run
from .product import ColumnMap, Operands, Product, RowMap

SIDE = 64  # rows and columns of a block
STEP = 16  # of the depth
EACH = 4  # rows and columns of a thread, and elements that it copies at once
THREADS = (SIDE // EACH) ** 2
PITCH = SIDE + 4  # floats between two k in shared memory: whole vectors of 4, on other banks


def column_map(product: Product) -> ColumnMap:
    """The columns of a block."""
    return ColumnMap(product.columns, SIDE, EACH // 2, product.gated)


def tile(operands: Operands, rows: RowMap, column_tile: Any) -> None:
    """Emit a block of THREADS threads: the rows of `rows`, the columns of column_map number column_tile."""
    product, m, columns = operands.product, operands.machine, column_map(operands.product)
    shared = [m.shared(STEP * PITCH) for _ in range(2)]
    coming = [m.registers(EACH) for _ in range(2)]
    sums = m.registers(EACH * EACH)
    sums.fill(0)

    # Copying: thread t brings EACH consecutive k of row t // 4 of both pieces.
    local = T.bind(T.floordiv(m.thread, STEP // EACH))
    first = T.bind(T.floormod(m.thread, STEP // EACH) * EACH)
    x, weight = operands.x, operands.weight
    x_base = T.bind(rows.source(local) * product.depth)
    w_start = weight.start(rows.weight_row(columns.weight_row(column_tile, local)))
    if weight.table:
        weight.prepare(m.shared(weight.table))

    def x_values(k: Any) -> list[Any]:
        if product.depth % EACH:
            return load_guarded(m, x, x_base, k, product.depth, EACH)
        return load_run(m, x, x_base + k, EACH)

    def fetch(step: Any) -> None:
        k = T.bind(i64(step * STEP + first))
        load(coming[0], lambda: x_values(k), k, product.depth, guarded=product.depth % EACH > 0)
        load(coming[1], lambda: weight.few(w_start, k, EACH), k, product.weight_depth)

    def put() -> None:
        for into, piece in zip(shared, coming, strict=True):
            for i in range(EACH):
                T.buffer_store(into, piece[i], [(first + i) * PITCH + local])

    # Multiplying: thread t has rows (t // 16)·4 … and columns (t % 16)·4 …
    row, column = (T.bind(f(m.thread, SIDE // EACH) * EACH) for f in (T.floordiv, T.floormod))
    a, b = m.registers(EACH), m.registers(EACH)
    steps = -(-product.depth // STEP)
    fetch(T.int32(0))
    with T.serial(0, steps) as step:
        put()
        m.barrier()
        with when(step + 1 < steps):
            fetch(step + 1)
        with T.serial(0, STEP) as k:
            for registers, piece, start in ((a, shared[0], row), (b, shared[1], column)):
                vector = piece.vload([k * PITCH + start], f"float32x{EACH}")
                T.buffer_store(registers.buffer, vector, [T.ramp(0, 1, EACH)])
            for i in range(EACH):
                for j in range(EACH):
                    sums[i * EACH + j] = m.fma(a[i], b[j], sums[i * EACH + j])
        m.barrier()

    out_column = T.bind(columns.out_column(column_tile, column))
    for i in range(EACH):
        with when(i64(row + i) < rows.count):
            y_row = T.bind(rows.row(i64(row + i)))
            found = [sums[i * EACH + j] for j in range(EACH)]
            half = EACH // 2 if product.gated else EACH
            operands.finish(y_row, out_column, found[:half], found[half:], rows.lead)


def load(into: Registers, values: Callable[[], list[Any]], k: Any, stop: int, guarded: bool = False) -> None:
    """into[:EACH] = values of elements k … of a row of `stop` elements; zero from `stop` on. guarded: they are that."""

    def put() -> None:
        for i, value in enumerate(values()):
            into[i] = value

    if guarded or stop % STEP == 0:
        put()
    else:  # a run of EACH lies wholly inside the row or wholly outside
        with T.If(k < stop):
            with T.Then():
                put()
            with T.Else():
                into.fill(0)
