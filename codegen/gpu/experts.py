"""Mixture of experts: a matrix product whose weight an index picks, row by row.

Few rows are products of their own, each with its expert's weight. Many are sorted by expert on the device; the rows of
one expert then pass its weight together, tile by tile. Weights of experts that no row picked are not read. A row's
numbers don't depend on where it stands among the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format
from llmc.targets.gpu import GpuTarget

from ..epilogue import Epilogue
from . import gemm, gemv, simt
from .code_units import code_unit
from .machine import INVARIANT, Machine, choose, i64, kernel, loop, when
from .matmul import Cases, allowed
from .matrix_units import MatrixUnit, matrix_unit
from .memory import Memory
from .product import Operands, Product, RowMap
from .round_rows import round_codes, round_rows

FEW = 8  # rows that are never sorted
SORTERS = 256  # threads of a block that sorts
NONE = -1  # a tile without rows


def expert_linear(
    target: GpuTarget,
    experts: int,
    columns: int,
    depth: int,
    *,
    weight: str | Format = "float32",
    activation: str = "float32",
    out: str | None = None,
    ids: str = "int32",
    epilogue: Epilogue | None = None,
    batch_invariant: bool | None = False,
    rounded: int | None = None,
    name: str = "expert_linear",
) -> tvm.tirx.PrimFunc:
    """y[s] = epilogue(x[s] @ W[ids[s]]^T): the kernel of `llmc.ir.ops.expert_linear`.

    Arguments of the PrimFunc, in this order:
      x [s, depth] activation; the weight's tensors with [experts, columns, …], as those of `matmul`;
      ids [s] of dtype `ids`, each in 0 … experts-1; bias [experts, columns] epilogue.bias, if there is one;
      residual [s, columns_out] epilogue.residual, if there is one; invariant, if batch_invariant is None;
      y [s, columns_out] out.
    Dtypes, epilogue, columns_out, rounded and batch_invariant as in `matmul`. s may be 0.
    """
    out, epilogue = out or activation, epilogue or Epilogue()
    product = Product(target, columns, depth, weight, activation, out, epilogue, experts, rounded)

    def body(symbols: dict, *arguments: Any) -> None:
        n, machine = symbols["n"], Machine(target)
        *inputs, y = arguments
        invariant = inputs.pop() if batch_invariant is None else batch_invariant
        operands = Operands.of(product, machine, [*inputs, y], ids)
        picked = Memory(inputs[1 + len(product.weight_tensors())])

        with when(n > 0):
            launches(operands, picked, n, invariant)

    *inputs, y = product.params(ids)
    return kernel(name, [*inputs, *([INVARIANT] if batch_invariant is None else []), y], body)


def launches(operands: Operands, picked: Memory, n: Any, invariant: Any) -> None:
    """The kernels of n rows, n int64 and not 0, of which those of one case are launched.

    picked: experts of rows. invariant: as of matmul.launches.
    """
    product, machine = operands.product, operands.machine
    unit = code_unit(machine, product)
    some = n <= max(FEW, product.experts or 1)
    if unit is None:
        operands = round_rows(operands, n)
        cases, otherwise = many_rows(operands, picked, matrix_unit(machine, product), n)
        cases = [(some, lambda: alone(operands, picked, n)), *cases]
        return choose(allowed(cases, len(cases), invariant), otherwise)

    def many() -> None:
        cases, otherwise = many_rows(round_codes(operands, n), picked, unit, n)
        choose(allowed(cases, len(cases), invariant), otherwise)

    few: Cases = [(some, lambda: alone(round_rows(operands, n), picked, n))]
    return choose(allowed(few, 1, invariant), many)


def alone(operands: Operands, picked: Memory, n: Any) -> None:
    """Launch a matrix-vector kernel for every row."""
    product, machine = operands.product, operands.machine
    made = gemv.plan(product, 1)
    with machine.launch([n, made.columns(product).tiles], gemv.WARPS * product.target.warp) as (row, column_tile):
        lead = T.bind(i64(picked.elements[i64(row)]) * product.columns)
        gemv.tile(operands, RowMap(T.int64(1), lambda r: i64(row) + r, lead), made, column_tile)


def many_rows(operands: Operands, picked: Memory, unit: MatrixUnit | None, n: Any) -> tuple[Cases, Callable[[], None]]:
    """Tiled kernels over sorted rows: the cases, each of which sums in an order of its own, and what else is taken."""
    product, machine = operands.product, operands.machine
    columns, experts = product.columns, product.experts or 1

    def together(height: int, threads: int, tiles: int, emit: Callable[[RowMap, Any], None]) -> Callable[[], None]:
        def launch() -> None:
            slots = T.floordiv(n, T.int64(height)) + experts
            order = Memory(T.alloc_buffer((n,), "int32"))
            plan = Memory(T.alloc_buffer((slots * 3,), "int32"))
            with machine.launch([experts], SORTERS) as (expert,):
                sort(machine, picked, n, expert, height, order, plan)
            with machine.launch([slots, tiles], threads) as (slot, column_tile):
                expert, first, count = (T.bind(plan.elements[i64(slot) * 3 + i]) for i in range(3))
                with when(expert != NONE):
                    lead = T.bind(i64(expert) * columns)
                    emit(RowMap(i64(count), lambda r: i64(order.elements[i64(first) + r]), lead), column_tile)

        return launch

    if unit is None:
        tiles = simt.column_map(product).tiles
        return [], together(simt.SIDE, simt.THREADS, tiles, lambda rows, tile: simt.tile(operands, rows, tile))

    def on_unit(tiling: gemm.Tiling) -> Callable[[], None]:
        def emit(rows: RowMap, column_tile: Any) -> None:
            gemm.tile(operands, unit, rows, tiling, column_tile)

        tiles = tiling.column_map(product, unit).tiles
        return together(tiling.rows, tiling.warps * product.target.warp, tiles, emit)

    short, middle, _ = gemm.tilings(product, unit)
    return [(n <= 2 * short.rows * experts, on_unit(short))], on_unit(middle)


def sort(m: Machine, ids: Memory, n: Any, expert: Any, height: int, order: Memory, plan: Memory) -> None:
    """Emit a block of SORTERS threads, for one expert: its rows, one after the other, and its tiles of `height` rows.

    Sorted rows go to order [n]. Tiles go to plan [n // height + experts][expert, first place in order, rows], to slots
    that no other expert has: an expert whose rows begin at place b has slot b // height + expert and those up to the
    next expert's first. These are as many as its rows need, or one more, which says that it is of no expert.

    Nothing is passed between blocks: where an expert's rows begin is how many rows picked one before it.
    """
    found = m.registers(2, "int32")  # rows of this thread: of experts before this one, of this one
    found.fill(0)
    rows = T.bind(T.Cast("int32", n))

    def each(emit: Callable[[Any, Any], None]) -> None:
        with loop(rows - m.thread, step=SORTERS) as offset:
            row = T.bind(offset + m.thread)
            emit(row, T.bind(T.Cast("int32", ids.elements[i64(row)])))

    def count(row: Any, picked: Any) -> None:
        found[0] = found[0] + T.Cast("int32", picked < expert)
        found[1] = found[1] + T.Cast("int32", picked == expert)

    each(count)
    shared = m.shared(2 * SORTERS, "int32")
    for i in range(2):
        T.buffer_store(shared, found[i], [m.thread + i * SORTERS])
    m.barrier()
    totals = m.registers(3, "int32")  # rows of experts before; of this one; of this one, of threads before
    totals.fill(0)
    with loop(SORTERS) as thread:
        own = T.bind(shared[thread + SORTERS])
        totals[0] = totals[0] + shared[thread]
        totals[1] = totals[1] + own
        totals[2] = totals[2] + T.Select(thread < m.thread, own, T.int32(0))
    begin, many, place = (T.bind(totals[i]) for i in range(3))
    next_place = m.registers(1, "int32")
    next_place[0] = begin + place

    def put(row: Any, picked: Any) -> None:
        with when(picked == expert):
            T.buffer_store(order.elements, row, [i64(next_place[0])])
            next_place[0] = next_place[0] + 1

    each(put)
    first_slot = T.bind(T.floordiv(begin, height) + expert)
    slots = T.bind(T.floordiv(begin + many, height) + expert + 1 - first_slot)
    with loop(slots - m.thread, step=SORTERS) as offset:
        i = T.bind(offset + m.thread)
        left = T.bind(many - i * height)
        tile = (T.Select(left > 0, expert, T.int32(NONE)), begin + i * height, T.min(left, T.int32(height)))
        for part, value in enumerate(tile):
            T.buffer_store(plan.elements, value, [i64(first_slot + i) * 3 + part])
