"""Matrix products with packed weights: y = x @ W^T, each output one chain of multiply-adds in rising k.

Weights lie in panels of `panel` output columns (see pack.py). Rows are taken in blocks, copied so that four consecutive
k of one row lie together: [K/4][rows][4].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from ..epilogue import Epilogue
from .pack import Panels, panels
from .product import Product, matmul_kernel
from .vector import Vector, choose, i64, loop, scratch

RUN = 4  # elements of one row that lie together in a block


@dataclass(frozen=True, kw_only=True)
class FloatProduct(Product):
    """A product with a weight of floating-point numbers.

    weight: its dtype, "float32", "float16" or "bfloat16".
    """

    weight: str

    @property
    def layout(self) -> Panels:
        return panels(self.target, self.columns, self.depth, self.weight, halves=self.epilogue.gate is not None)

    @property
    def dots(self) -> bool:
        """Sums pairs of bfloat16 products by one instruction."""
        return self.target.has_bf16_dot and self.weight == self.activation == "bfloat16"

    @property
    def elements(self) -> int:
        """Elements of a row in a block: float32, or pairs of bfloat16 as int32; a multiple of RUN."""
        steps = (self.depth + 1) // 2 if self.dots else self.depth
        return -(-steps // RUN) * RUN

    @property
    def block(self) -> int:
        """Rows of a full block: accumulators fill three quarters of the registers."""
        return self.target.vector_registers * 3 // 4 // self.layout.vectors

    @property
    def packed(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [("w", self.layout.shape, self.weight)]

    @property
    def row_bytes(self) -> int:
        return self.elements * 4

    @property
    def panel_bytes(self) -> int:
        return self.elements * self.layout.width * (4 if self.weight == "float32" or self.dots else 2)

    @property
    def depth_at_once(self) -> int:
        """Runs of RUN elements in a part of a panel that stays in a quarter of the second cache."""
        runs = self.elements // RUN
        bytes_of_run = RUN * self.layout.width * (4 if self.dots or self.weight == "float32" else 2)
        parts = max(1, -(-runs * bytes_of_run // (self.target.l2 // 2)))
        return -(-runs // parts)

    def copy_block(self, x: Any, blocks: Any, source: Callable[[Any], Any], base: Any, rows: Any) -> None:
        """Emit the copy of rows source(0) … source(rows-1) of x into the block at row `base` of `blocks`."""
        padded = T.bind(self.padded(rows))
        four = Vector(RUN)
        each = 2 * RUN if self.dots else RUN
        start = T.bind(base * self.elements)
        with loop(0, padded) as r:

            def put(run: Any, value: Any, element: int | None = None) -> None:
                at = start + (run * padded + r) * RUN
                if element is None:
                    T.buffer_store(blocks, value, [T.ramp(at, 1, RUN)])
                else:
                    T.buffer_store(blocks, value, [at + element])

            def copy() -> None:
                row = T.bind(source(r))
                with loop(0, self.depth // each) as run:
                    if self.dots:
                        put(run, pairs(row, run))
                    else:
                        put(run, four.load(x, [row, run * RUN]))
                rest = self.depth % each
                for e in range(RUN if rest else 0):
                    last = T.int64(self.depth // each)
                    put(last, tail(row, e, rest), e)

            def pairs(row: Any, run: Any) -> Any:
                return T.reinterpret("int32x4", x.vload([row, run * each], "uint16x8"))

            def tail(row: Any, e: int, rest: int) -> Any:
                first = self.depth - rest
                if not self.dots:
                    return Vector(1).load(x, [row, i64(first + e)]) if e < rest else T.float32(0)
                half = [
                    T.Cast("int32", x[row, i64(first + 2 * e + h)]) if 2 * e + h < rest else T.int32(0) for h in (0, 1)
                ]
                return T.bitwise_or(half[0], T.shift_left(half[1], T.int32(16)))

            def zero() -> None:
                nothing = T.int32(0) if self.dots else T.float32(0)
                with loop(0, self.elements // RUN) as run:
                    put(run, T.broadcast(nothing, RUN))

            choose([(r < rows, copy)], zero)

    def blocks(self, rows: Any) -> Any:
        """Scratch for so many rows in blocks."""
        return scratch([(rows + self.block) * self.elements], "int32" if self.dots else "float32")

    def multiply(self, blocks: Any, w: Sequence[Any], lead: list[Any], p: Any, base: Any, rows: Any, tile: Any) -> None:
        """Emit: tile[:rows] = the product of `rows` rows of blocks, from row `base` on, and panel p."""
        [weight] = w
        runs, at_once, vectors = self.elements // RUN, self.depth_at_once, self.layout.vectors
        v = Vector(self.target.lanes)
        divided = at_once < runs
        pairs: Any = None
        if self.weight == "bfloat16":
            pairs = T.decl_buffer(tuple(weight.shape)[:-1], "int32", data=weight.data)
        if divided:
            with loop(0, -(-rows // self.block) * self.block) as r:
                for j in range(vectors):
                    v.store(tile, v.const(0.0), [r, T.int64(j * v.lanes)])

        def weights(element: Any) -> list[list[Any]]:
            """Vectors of the panel for one element, each a list: one for each k that the element stands for."""
            found = []
            for j in range(vectors):
                if self.dots:
                    found.append([T.bind(pairs.vload([*lead, p, element, j, 0], v.i32))])
                else:
                    found.append([v.load(weight, [*lead, p, element, j, 0])])
            return found

        def step(x: Callable[[int, Any, int], Any], sums: list, run: Any) -> None:
            for e in range(RUN):
                if self.weight == "bfloat16" and not self.dots:
                    if e % 2:
                        continue
                    pair = [
                        T.bind(pairs.vload([*lead, p, run * (RUN // 2) + e // 2, j, 0], v.i32)) for j in range(vectors)
                    ]
                    columns = [[T.bind(v.low_bf16(q)), T.bind(v.high_bf16(q))] for q in pair]
                else:
                    columns = weights(run * RUN + e)
                for k in range(len(columns[0])):
                    for r, row in enumerate(sums):
                        a = T.bind(v.broadcast(x(r, run, e + k)))
                        for j in range(vectors):
                            product = v.dot_bf16 if self.dots else v.fma
                            row[j].set(product(columns[j][k], a, row[j].get()))

        def micro(size: int, block_base: Any, first: Any, lo: Any, hi: Any) -> None:
            start = T.bind(block_base * self.elements)
            sums = [
                [
                    v.register(v.load(tile, [first + r, T.int64(j * v.lanes)]) if divided else v.const(0.0))
                    for j in range(vectors)
                ]
                for r in range(size)
            ]
            with loop(lo, hi) as run:
                step(lambda r, run, e: blocks[start + (run * size + r) * RUN + e], sums, run)
            for r in range(size):
                for j in range(vectors):
                    v.store(tile, sums[r][j].get(), [first + r, T.int64(j * v.lanes)])

        with loop(0, -(-runs // at_once)) as part:
            lo = T.bind(part * at_once)
            hi = T.bind(T.min(lo + at_once, T.int64(runs)))

            def case(size: int, first: Any, lo: Any = lo, hi: Any = hi) -> None:
                micro(size, base + first, first, lo, hi)

            self.by_block(rows, case)


def matmul(
    target: CpuTarget,
    columns: int,
    depth: int,
    *,
    weight: str = "float32",
    activation: str = "float32",
    out: str | None = None,
    epilogue: Epilogue | None = None,
    name: str = "matmul",
) -> tvm.tirx.PrimFunc:
    """y = epilogue(x @ W^T), summed in float32 in rising k, rounded once.

    columns, depth: the shape of W as a checkpoint has it, [columns, depth]. weight: its dtype, "float32", "float16" or
    "bfloat16". activation: dtype of x, "float32" or "bfloat16". out: dtype of y, default that of x.
    bfloat16 activations and weights are multiplied by the CPU's dot product where it has one; float32 activations
    are multiplied exactly whatever the weight's dtype.

    Arguments of the PrimFunc, in this order:
      x [n, depth] activation; w: packed by `pack.panels(target, columns, depth, weight, halves=gate is not None)`;
      bias [columns] epilogue.bias, if there is one; residual [n, columns_out] epilogue.residual, if there is one;
      y [n, columns_out] out, where columns_out is columns, or columns // 2 with a gate. n may be 0.
    """
    product = FloatProduct(
        target=target,
        columns=columns,
        depth=depth,
        weight=weight,
        activation=activation,
        epilogue=epilogue or Epilogue(),
    )
    return matmul_kernel(product, out or activation, name)
