"""Products of quantized weights on any CPU: a code becomes its float32 number in a register and is multiplied there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from llmc.ir.errors import CompileError
from llmc.ir.quantized_cache import LARGEST

from . import quantized_numbers
from .matmul import RUN, FloatProduct
from .quantized_activation import e4m3, largest, whole
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
                factor, scale = largest(x, row, T.bind(g * size), size, self.target.lanes, LARGEST[self.format.rounds])
                with loop(0, -(-size // RUN)) as run:
                    four = Vector(RUN)
                    at = T.bind(start + ((g * (size // RUN) + run) * padded + r) * RUN)
                    value = blocks.vload([at], four.f32)
                    if self.format.rounds == "fp8":
                        near = e4m3(four, value, factor)
                    else:
                        near = T.Cast(four.f32, whole(four, value, factor))
                    four.store(blocks, near * four.broadcast(scale), [at])

    def multiply(self, blocks: Any, w: Sequence[Any], lead: list[Any], p: Any, base: Any, rows: Any, tile: Any) -> None:
        layout, format = self.layout, self.format
        words, scales, zeros = layout.views(list(w))
        v, vectors = Vector(layout.lanes), range(layout.vectors)
        e4m3 = format.table == "e4m3"
        whole_row = not format.group  # has one scale, which its sum is multiplied by
        nan = v.broadcast(T.reinterpret("float32", T.int32(0x7FC00000)))

        def number(codes: Any, zero: Any) -> Any:
            return quantized_numbers.e4m3(v, codes) if e4m3 else quantized_numbers.number(v, format, codes, zero)

        def micro(size: int, first: Any) -> None:
            start = T.bind((base + first) * self.elements)
            sums = [[v.register(v.const(0.0)) for _ in vectors] for _ in range(size)]
            none = [v.register(v.iconst(0), "int32") for _ in vectors if e4m3]  # not 0 where a code is no number
            with loop(0, -(-self.depth // RUN)) as run:
                group = T.floordiv(run * RUN, T.int64(format.group)) if format.group else T.int64(0)
                codes, scale, zero = [], [], []
                for j in vectors:
                    where = [*lead, p, group, j, 0]
                    codes.append(layout.step(words, lead, p, run, 0, j, aligned=False))
                    scale.append(None if whole_row else layout.scale(scales, where, v))
                    zero.append(None if zeros is None else T.bind(T.Cast(v.i32, zeros.vload(where, v.dtype("uint8")))))
                for j, found in enumerate(none):
                    found.set(T.bitwise_or(found.get(), quantized_numbers.not_e4m3(v, codes[j])))
                for e in range(RUN):
                    weights = []
                    for j in vectors:
                        code = T.bitwise_and(T.shift_right(codes[j], v.iconst(8 * e)), v.iconst(255))
                        value = number(T.bind(code), zero[j])
                        weights.append(value if whole_row else T.bind(value * scale[j]))
                    for r, row in enumerate(sums):
                        a = T.bind(v.broadcast(blocks[start + (run * size + r) * RUN + e]))
                        for j in vectors:
                            row[j].set(v.fma(weights[j], a, row[j].get()))
            for j in vectors:
                last = layout.scale(scales, [*lead, p, T.int64(0), j, 0], v) if whole_row else None
                for r in range(size):
                    total = sums[r][j].get()
                    if whole_row:
                        total = T.bind(total * last)
                    if e4m3:
                        total = T.bind(T.Select(none[j].get() == v.iconst(0), total, nan))
                    v.store(tile, total, [first + r, T.int64(j * v.lanes)])

        self.by_block(rows, micro)
