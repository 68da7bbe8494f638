"""Products of quantized weights on any CPU: a code becomes its float32 number in a register and is multiplied there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.errors import CompileError

from . import quantized_numbers
from .matmul import RUN, FloatProduct
from .quantized_activation import largest, whole
from .quantized_layout import QuantizedProduct
from .vector import Vector, loop


@dataclass(frozen=True, kw_only=True)
class DequantizingProduct(QuantizedProduct, FloatProduct):  # type: ignore[misc]  # panels of codes, not of floats
    """A product with a quantized weight by float32 multiply-adds in rising k."""

    weight: str = "float32"  # what codes become

    def __post_init__(self):
        if self.rounded and (self.rounded % RUN or self.depth % self.rounded):
            raise CompileError(
                f"{self.target.name} rounds activations in groups of a multiple of {RUN} that fill a row, "
                f"found groups of {self.rounded} in rows of {self.depth}"
            )

    @property
    def llvm_text(self) -> str:
        return quantized_numbers.text(self.format, self.target.lanes)

    def copy_block(self, x: Any, blocks: Any, source: Callable[[Any], Any], base: Any, rows: Any) -> None:
        super().copy_block(x, blocks, source, base, rows)
        if self.rounded is None:
            return
        padded = T.bind(self.padded(rows))
        start = T.bind(base * self.elements)
        size = self.rounded or self.depth
        with loop(0, rows) as r:
            row = T.bind(source(r))
            with loop(0, self.depth // size) as g:
                factor, scale = largest(x, row, T.bind(g * size), size, self.target.lanes, 127.0)
                with loop(0, -(-size // RUN)) as run:
                    four = Vector(RUN)
                    at = T.bind(start + ((g * (size // RUN) + run) * padded + r) * RUN)
                    n = whole(four, blocks.vload([at], four.f32), factor)
                    four.store(blocks, T.Cast(four.f32, n) * four.broadcast(scale), [at])

    def multiply(self, blocks: Any, w: Sequence[Any], lead: list[Any], p: Any, base: Any, rows: Any, tile: Any) -> None:
        layout, format = self.layout, self.format
        words, scales, zeros = layout.views(list(w))
        v, vectors = Vector(layout.lanes), range(layout.vectors)

        def micro(size: int, first: Any) -> None:
            start = T.bind((base + first) * self.elements)
            sums = [[v.register(v.const(0.0)) for _ in vectors] for _ in range(size)]
            with loop(0, -(-self.depth // RUN)) as run:
                group = T.floordiv(run * RUN, T.int64(format.group)) if format.group else T.int64(0)
                codes, scale, zero = [], [], []
                for j in vectors:
                    where = [*lead, p, group, j, 0]
                    codes.append(layout.step(words, lead, p, run, 0, j, aligned=False))
                    scale.append(layout.scale(scales, where, v))
                    zero.append(None if zeros is None else T.bind(T.Cast(v.i32, zeros.vload(where, v.dtype("uint8")))))
                for e in range(RUN):
                    weights = []
                    for j in vectors:
                        code = T.bitwise_and(T.shift_right(codes[j], v.iconst(8 * e)), v.iconst(255))
                        weights.append(T.bind(quantized_numbers.number(v, format, T.bind(code), zero[j]) * scale[j]))
                    for r, row in enumerate(sums):
                        a = T.bind(v.broadcast(blocks[start + (run * size + r) * RUN + e]))
                        for j in vectors:
                            row[j].set(v.fma(weights[j], a, row[j].get()))
            for r in range(size):
                for j in vectors:
                    v.store(tile, sums[r][j].get(), [first + r, T.int64(j * v.lanes)])

        self.by_block(rows, micro)
