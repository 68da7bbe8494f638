"""What every product with packed weights is made of: blocks of rows pass panels of output columns, panel by panel.

One vector lane owns one output for the whole sum, so a row's numbers are the same bits whatever other rows stand beside
it. How rows are copied into blocks and how a block passes a panel is a kind of weight's own (matmul.py,
quantized_*.py); sharing out the panels, tiles and epilogues are here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from ..epilogue import Epilogue
from .vector import Vector, bits, choose, kernel, loop, opaque, scratch, share_out, when

_GATES = {"silu": Vector.silu, "gelu_tanh": Vector.gelu_tanh}


class Layout(Protocol):
    """How a packed weight lies: `count` panels of `vectors` vectors of columns, `width` columns in all."""

    @property
    def vectors(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def count(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Product:
    """The geometry of one matrix product on one target, and the emission of its parts."""

    target: CpuTarget
    columns: int
    depth: int
    activation: str
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def layout(self) -> Layout:
        """How the weight lies."""
        raise NotImplementedError

    @property
    def packed(self) -> list[tuple[str, tuple[int, ...], str]]:
        """The stored tensors of the weight: name, shape, dtype."""
        raise NotImplementedError

    @property
    def llvm_text(self) -> str:
        """LLVM functions that the kernel calls."""
        return ""

    @property
    def block(self) -> int:
        """Rows of a full block: their accumulators fit in the registers."""
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a block."""
        raise NotImplementedError

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        raise NotImplementedError

    def blocks(self, rows: Any) -> Any:
        """Scratch for so many rows in blocks."""
        raise NotImplementedError

    def copy_block(self, x: Any, blocks: Any, source: Callable[[Any], Any], base: Any, rows: Any) -> None:
        """Emit the copy of rows source(0) … source(rows-1) of x into the block at row `base` of `blocks`."""
        raise NotImplementedError

    def multiply(self, blocks: Any, w: Sequence[Any], lead: list[Any], p: Any, base: Any, rows: Any, tile: Any) -> None:
        """Emit: tile[:rows] = the product of `rows` rows of blocks, from row `base` on, and panel p.

        w: the stored tensors of the weight, with the indices `lead` before the panel's.
        """
        raise NotImplementedError

    @property
    def sizes(self) -> list[int]:
        """Rows that code is unrolled for: a block's rows are rounded up to one of these, padded with zeros."""
        return sorted({1, -(-self.block // 3), -(-2 * self.block // 3), self.block})

    @property
    def rows_at_once(self) -> int:
        """Rows that pass one panel before the next: their blocks stay in a quarter of the last cache."""
        fit = self.target.l3 // 4 // self.row_bytes
        return max(1, min(fit, 1024) // self.block) * self.block

    def panels_at_once(self) -> int:
        """Panels that a thread draws at once: enough to make drawing cheap, few enough to share out evenly."""
        return max(1, min((64 << 10) // self.panel_bytes, self.layout.count // 16))

    def padded(self, rows: Any) -> Any:
        """Rows of a block of so many rows, with its padding."""
        value = T.int64(self.block)
        for size in reversed(self.sizes[:-1]):
            value = T.Select(rows <= size, T.int64(size), value)
        return value

    def tile(self, rows: Any) -> Any:
        """Scratch of one thread: sums of one panel."""
        return scratch([rows + self.block, self.layout.width])

    def by_block(self, rows: Any, micro: Callable[[int, Any], None]) -> None:
        """Emit micro(rows of a block with its padding, its first row) for all blocks of so many rows."""
        with loop(0, T.floordiv(rows + (self.block - 1), T.int64(self.block))) as b:
            first = T.bind(b * self.block)
            left = T.bind(rows - first)

            def case(size: int) -> Callable[[], None]:
                return lambda: micro(size, first)

            choose([(left <= size, case(size)) for size in self.sizes[:-1]], case(self.block))

    def store(self, tile: Any, p: Any, rows: Any, target_row: Callable[[Any], Any], y: Any, bias: Any, residual: Any,
              lead: list[Any]) -> None:  # fmt: skip
        """Emit the epilogue of a panel: tile[:rows] to y."""
        layout, epilogue = self.layout, self.epilogue
        out_columns = self.columns // 2 if epilogue.gate else self.columns
        out_width = layout.width // 2 if epilogue.gate else layout.width

        def finish(v: Vector, r: Any, row: Any, offset: Any) -> None:
            column = T.bind(p * out_width + offset)
            value = v.load(tile, [r, offset])
            if epilogue.bias:
                value = T.bind(value + v.load(bias, [*lead, column]))
            if epilogue.gate:
                other = v.load(tile, [r, offset + out_width])
                if epilogue.bias:
                    other = T.bind(other + v.load(bias, [*lead, column + out_columns]))
                value = T.bind(_GATES[epilogue.gate](v, value) * other)
            if epilogue.residual:
                value = T.bind(value + v.load(residual, [row, column]))
            v.store(y, value, [row, column])

        full, rest = divmod(out_columns, out_width)

        def whole() -> None:
            with loop(0, rows) as r:
                row = T.bind(target_row(r))
                for offset, width in chunks_of(out_width, self.target.lanes):
                    finish(Vector(width), r, row, T.int64(offset))

        def partial() -> None:
            with loop(0, rows) as r:
                row = T.bind(target_row(r))
                with loop(0, rest) as offset:
                    finish(Vector(1), r, row, offset)

        if rest and full:
            choose([(p < full, whole)], partial)
        else:
            (partial if rest else whole)()


def chunks_of(size: int, lanes: int) -> list[tuple[int, int]]:
    return [(offset, min(lanes, size)) for offset in range(0, size, lanes)]


def matmul_kernel(product: Product, out: str, name: str) -> tvm.tirx.PrimFunc:
    """The kernel of a product: matmul(x, *packed, (bias,) (residual,) y), see matmul.py."""
    columns, depth, epilogue = product.columns, product.depth, product.epilogue
    layout = product.layout
    out_columns = columns // 2 if epilogue.gate else columns
    params: list = [("x", ("n", depth), product.activation), *product.packed]
    if epilogue.bias:
        params.append(("bias", (columns,), epilogue.bias))
    if epilogue.residual:
        params.append(("residual", ("n", out_columns), epilogue.residual))
    params.append(("y", ("n", out_columns), out))
    block, at_once, step = product.block, product.rows_at_once, product.panels_at_once()
    draws = -(-layout.count // step)

    def body(symbols: dict, x: Any, *rest: Any) -> None:
        n = symbols["n"]
        w, arguments = list(rest[: len(product.packed)]), [bits(b) for b in rest[len(product.packed) :]]
        y = arguments.pop()
        residual = arguments.pop() if epilogue.residual else None
        bias = arguments.pop() if epilogue.bias else None
        x = bits(x)
        blocks = product.blocks(n)

        def copy(b: Any) -> None:
            base = T.bind(b * block)
            product.copy_block(x, blocks, lambda r: base + r, base, T.bind(T.min(n - base, T.int64(block))))

        def serial() -> None:
            with when(n > 0):
                copy(T.int64(0))

        def parallel() -> None:
            with T.parallel(T.int64(0), T.floordiv(n + (block - 1), T.int64(block))) as b:
                copy(b)

        choose([(n <= block, serial)], parallel)

        # Every pass over the weight serves equally many rows: a short last one would read it all for little.
        passes = opaque(T.floordiv(n + (at_once - 1), T.int64(at_once)))
        blocks_at_once = T.floordiv(n + (block * passes - 1), T.max(block * passes, T.int64(1)))
        rows_at_once = opaque(blocks_at_once * block)

        def work(item: Any, tile: Any) -> None:
            base = opaque(T.floordiv(item, T.int64(draws)) * rows_at_once)
            rows = opaque(T.min(n - base, rows_at_once))
            first = T.bind(T.floormod(item, T.int64(draws)) * step)
            with loop(first, T.min(first + step, T.int64(layout.count))) as p:
                product.multiply(blocks, w, [], p, base, rows, tile)
                product.store(tile, p, rows, lambda r: base + r, y, bias, residual, [])

        share_out(passes * draws, work, lambda: product.tile(T.min(n, T.int64(at_once))))

    return kernel(name, params, body, product.target, product.llvm_text)
