"""Mixture of experts: a matrix product whose weight an index picks, row by row.

Rows are sorted by expert; the rows of one expert then pass its panels together, as in matmul.py and in the same chains,
so that a row's numbers don't depend on the others. Weights of experts that no row picked are not read.
"""

from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from ..epilogue import Epilogue
from .matmul import FloatProduct
from .product import Product
from .vector import bits, choose, i64, kernel, loop, opaque, scratch, share_out, variable, when


def expert_linear(
    target: CpuTarget,
    experts: int,
    columns: int,
    depth: int,
    *,
    weight: str = "float32",
    activation: str = "float32",
    out: str | None = None,
    ids: str = "int32",
    epilogue: Epilogue | None = None,
    name: str = "expert_linear",
) -> tvm.tirx.PrimFunc:
    """y[s] = epilogue(x[s] @ W[ids[s]]^T): the kernel of `llmc.ir.ops.expert_linear`.

    Arguments of the PrimFunc, in this order:
      x [s, depth] activation; w [experts, *layout] weight, layout as in `matmul`, an expert after the other;
      ids [s] of dtype `ids`, each in 0 … experts-1; bias [experts, columns] epilogue.bias, if there is one;
      residual [s, columns_out] epilogue.residual, if there is one; y [s, columns_out] out.
    Dtypes, epilogue and columns_out as in `matmul`. s may be 0.
    """
    product = FloatProduct(
        target=target,
        columns=columns,
        depth=depth,
        weight=weight,
        activation=activation,
        epilogue=epilogue or Epilogue(),
    )
    return expert_kernel(product, experts, ids, out or activation, name)


def expert_kernel(product: Product, experts: int, ids: str, out: str, name: str) -> tvm.tirx.PrimFunc:
    """The kernel of a product whose weight has an axis of experts before its own: expert_linear(x, *packed, ids, …)."""
    columns, depth, epilogue = product.columns, product.depth, product.epilogue
    layout, block, at_once, step = product.layout, product.block, product.rows_at_once, product.panels_at_once()
    out_columns = columns // 2 if epilogue.gate else columns
    packed = [(part, (experts, *shape), dtype) for part, shape, dtype in product.packed]
    params: list = [("x", ("s", depth), product.activation), *packed, ("ids", ("s",), ids)]
    if epilogue.bias:
        params.append(("bias", (experts, columns), epilogue.bias))
    if epilogue.residual:
        params.append(("residual", ("s", out_columns), epilogue.residual))
    params.append(("y", ("s", out_columns), out))
    draws = -(-layout.count // step)

    def body(symbols: dict, x: Any, *rest: Any) -> None:
        n = symbols["s"]
        w, ids = list(rest[: len(packed)]), rest[len(packed)]
        arguments = [bits(b) for b in rest[len(packed) + 1 :]]
        y = arguments.pop()
        residual = arguments.pop() if epilogue.residual else None
        bias = arguments.pop() if epilogue.bias else None
        x = bits(x)

        # Rows in the order of their experts: order[begin[e]] … order[begin[e + 1] - 1] are those of expert e.
        begin, order = scratch([experts + 2], "int32"), scratch([n + 1], "int32")
        with loop(0, experts + 2) as e:
            T.buffer_store(begin, T.int32(0), [e])
        with loop(0, n) as r:
            e = T.bind(i64(ids[r]))
            T.buffer_store(begin, begin[e + 2] + 1, [e + 2])
        with loop(2, experts + 2) as e:
            T.buffer_store(begin, begin[e] + begin[e - 1], [e])
        with loop(0, n) as r:  # begin[e + 1] moves from the beginning of expert e to its end
            e = T.bind(i64(ids[r]))
            T.buffer_store(order, T.Cast("int32", r), [begin[e + 1]])
            T.buffer_store(begin, begin[e + 1] + 1, [e + 1])

        # Entries: rows of one expert that pass its panels together, and where their blocks begin.
        entry = {k: scratch([n + 1], "int32") for k in ("expert", "first", "rows", "base")}
        entries, base = variable("int32", T.int32(0)), variable("int32", T.int32(0))
        with loop(0, experts) as e:
            first = T.bind(begin[e])
            count = opaque(begin[e + 1] - first, "int32")
            with loop(0, T.floordiv(count + (at_once - 1), T.int32(at_once))) as i:
                done = T.bind(T.Cast("int32", i) * at_once)
                rows = opaque(T.min(count - done, T.int32(at_once)), "int32")
                for key, value in (
                    ("expert", T.Cast("int32", e)),
                    ("first", first + done),
                    ("rows", rows),
                    ("base", base[0]),
                ):
                    T.buffer_store(entry[key], value, [entries[0]])
                T.buffer_store(entries, entries[0] + 1, [0])
                T.buffer_store(base, base[0] + T.floordiv(rows + (block - 1), T.int32(block)) * block, [0])
        many = T.bind(entries[0])
        blocks = product.blocks(n + T.min(n, T.int64(experts)) * block)

        def read(at: Any) -> tuple[Any, ...]:
            return tuple(T.bind(i64(entry[k][at])) for k in ("expert", "first", "rows", "base"))

        def copy(at: Any) -> None:
            _, first, rows, start = read(at)
            with loop(0, T.floordiv(rows + (block - 1), T.int64(block))) as b:
                done = T.bind(b * block)
                here = opaque(T.min(rows - done, T.int64(block)))
                product.copy_block(x, blocks, lambda r: i64(order[first + done + r]), start + done, here)

        def serial() -> None:
            with loop(0, many) as at:
                copy(at)

        def parallel() -> None:
            with T.parallel(T.int64(0), i64(many)) as at:
                copy(at)

        choose([(n <= block, serial)], parallel)

        def work(item: Any, tile: Any) -> None:
            e, first, rows, start = read(T.floordiv(item, T.int64(draws)))
            panel = T.bind(T.floormod(item, T.int64(draws)) * step)
            with loop(panel, T.min(panel + step, T.int64(layout.count))) as p:
                product.multiply(blocks, w, [e], p, start, rows, tile)
                product.store(tile, p, rows, lambda r: i64(order[first + r]), y, bias, residual, [e])

        with when(n > 0):
            share_out(many * draws, work, lambda: product.tile(T.min(n, T.int64(at_once))))

    return kernel(name, params, body, product.target, product.llvm_text)
