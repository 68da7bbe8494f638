"""Tiled products without matrix units: any operands, any shape, exact float32 multiply-adds.

A block computes a square of outputs. Step by step along the depth it copies a piece of its rows of x and of W to shared
memory as float32, [depth][rows]; every thread multiplies a small square of them in registers.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from .machine import Machine, Registers, i64, when
from .product import ColumnMap, Memory, Operands, Product, RowMap, load_guarded, load_run

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
    sources = [
        (operands.x, T.bind(rows.source(local) * product.depth), product.depth),
        (operands.w, T.bind(rows.weight_row(columns.weight_row(column_tile, local)) * product.weight_depth),
         product.weight_depth),
    ]  # fmt: skip

    def fetch(step: Any) -> None:
        k = T.bind(i64(step * STEP + first))
        for into, (source, base, stop) in zip(coming, sources, strict=True):
            load(m, into, source, base, k, stop)

    def put() -> None:
        for into, piece in zip(shared, coming, strict=True):
            for i in range(EACH):
                T.buffer_store(into, piece[i], [(first + i) * PITCH + local])

    # Multiplying: thread t has rows (t // 16)·4 … and columns (t % 16)·4 …
    row, column = (T.bind(f(m.thread, SIDE // EACH) * EACH) for f in (T.floordiv, T.floormod))
    a, b = m.registers(EACH), m.registers(EACH)
    steps = -(-product.weight_depth // STEP)
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


def load(m: Machine, into: Registers, source: Memory, base: Any, k: Any, stop: int) -> None:
    """into[:EACH] = elements k … of a row of `stop` elements at `base`, as float32; zero from `stop` on."""

    def put(values: list[Any]) -> None:
        for i, value in enumerate(values):
            into[i] = value

    if stop % EACH:
        put(load_guarded(m, source, base, k, stop, EACH))
    elif stop % STEP:  # a run of EACH lies wholly inside the row or wholly outside
        with T.If(k < stop):
            with T.Then():
                put(load_run(m, source, base + k, EACH))
            with T.Else():
                into.fill(0)
    else:
        put(load_run(m, source, base + k, EACH))
