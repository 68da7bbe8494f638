"""How quantized weights lie: panels of output columns, a vector lane to a column, four consecutive k to a 32-bit lane.

Depth is walked in *steps* of 4 k: what one integer dot product takes. A step's codes are the four bytes of a lane, or
packed into fewer bits:

    8 bits  a word a step
    4 bits  a word for two steps: low nibbles are k … k+3, high nibbles k+4 … k+7
    3 bits  three words for eight steps: two words of low bits, four steps each at bits 0, 2, 4 and 6 of the bytes, and
            one of high bits, a bit a step

Stored: codes [panels][words][vectors][lanes][4] uint8; scales and zeros [panels][groups][vectors][lanes]. Columns and
depth are padded with zeros: a kernel multiplies what stands there by 0.
"""

from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.relax import op as R
from tvm.tirx.script import builder as T

from llmc.ir.errors import CompileError
from llmc.ir.quantized import Format
from llmc.targets import CpuTarget

from .product import Product
from .vector import Vector, bits

STEP = 4  # consecutive k in a 32-bit lane

# bits of a code: (steps that share words, words they take)
_PACKED = {8: (1, 1), 4: (2, 1), 3: (8, 3)}


@dataclass(frozen=True)
class QuantizedPanels:
    """The packed form of one quantized weight [columns, depth] on one target."""

    target: CpuTarget
    columns: int
    depth: int
    format: Format

    def __post_init__(self):
        if self.format.bits not in _PACKED:
            raise CompileError(
                f"{self.target.name} has no kernels for weights of {self.format.bits} bits: expected one of "
                f"{', '.join(map(str, sorted(_PACKED)))} bits, found {self.format}"
            )
        group = self.format.group
        if group % STEP or (group and self.depth % group):
            raise CompileError(
                f"{self.target.name} has no kernels for groups of {group} in rows of {self.depth}: expected whole "
                f"groups of a multiple of {STEP}, found {self.format}"
            )

    @property
    def lanes(self) -> int:
        return self.target.lanes

    @property
    def vectors(self) -> int:
        return {16: 2, 8: 2, 4: 4}[self.lanes]

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def count(self) -> int:
        """Panels."""
        return -(-self.columns // self.width)

    @property
    def together(self) -> int:
        """Steps that share words."""
        return _PACKED[self.format.bits][0]

    @property
    def steps(self) -> int:
        """Steps of a row, padded so that words are whole."""
        return -(-self.depth // (STEP * self.together)) * self.together

    @property
    def words(self) -> int:
        return self.steps // self.together * _PACKED[self.format.bits][1]

    @property
    def stored(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of the stored tensors, in the order of the format's parts."""
        (_, codes), *rest = self.format.parts((self.columns, self.depth)).items()
        panel = (self.vectors, self.lanes)
        groups = self.format.groups(self.depth)
        parts = [("codes", (self.count, self.words, *panel, STEP), codes[1])]
        return parts + [(name, (self.count, groups, *panel), dtype) for name, (_, dtype) in rest]

    @property
    def panel_bytes(self) -> int:
        return self.words * self.width * STEP

    def step(self, words: Any, lead: list[Any], p: Any, first: Any, offset: int, j: int, aligned: bool) -> Any:
        """The four codes of every lane of vector j of panel p at step first + offset, as bytes of int32 lanes.

        words: the codes as int32, see `views`. aligned: `first` is a multiple of the steps that share words.
        """
        if aligned:
            chunk = T.floordiv(first, T.int64(self.together)) + offset // self.together
            return self._step(Vector(self.lanes), words, [*lead, p], chunk, offset % self.together, [j, 0])
        return self._step(Vector(self.lanes), words, [*lead, p], *self._place(first + offset), [j, 0])

    def word(self, words: Any, lead: list[Any], p: Any, step: Any, lane: list[Any]) -> Any:
        """The four codes of one lane, [vector, lane of it], at a step, as bytes of an int32."""
        return self._step(Vector(1), words, [*lead, p], *self._place(step), lane)

    def _place(self, step: Any) -> tuple[Any, Any]:
        """The group of steps that share words, and the place among them."""
        together = T.int64(self.together)
        return T.floordiv(step, together), T.floormod(step, together)

    def _step(self, v: Vector, words: Any, panel: list[Any], chunk: Any, at: Any, end: list[Any]) -> Any:
        mask = lambda x, m: T.bind(T.bitwise_and(x, v.iconst(m)))  # noqa: E731
        load = lambda word: words.vload([*panel, word, *end], v.i32)  # noqa: E731

        def shifted(x: Any, by: Any) -> Any:
            if isinstance(by, int):
                return T.shift_right(x, v.iconst(by)) if by else x
            return T.shift_right(x, v.broadcast(T.Cast("int32", by)))

        if self.format.bits == 8:
            return T.bind(load(chunk))
        if self.format.bits == 4:
            return mask(shifted(load(chunk), at * 4), 0x0F0F0F0F)
        low = mask(shifted(load(chunk * 3 + at // 4), at % 4 * 2), 0x03030303)
        high = mask(shifted(load(chunk * 3 + 2), at), 0x01010101)
        return T.bind(T.bitwise_or(low, T.shift_left(high, v.iconst(2))))

    def views(self, buffers: list[Any]) -> tuple[Any, Any, Any]:
        """(codes as int32 words, scales, zeros or None) of the stored tensors, as buffers to load from."""
        codes, scales, *zeros = buffers
        words = T.decl_buffer(tuple(codes.shape)[:-1], "int32", data=codes.data)
        return words, bits(scales), zeros[0] if zeros else None

    def scale(self, scales: Any, where: list[Any], v: Vector) -> Any:
        """float32 scales at `where`."""
        if self.format.scale != "e8m0":
            return v.load(scales, where)
        byte = T.bind(T.Cast(v.i32, scales.vload(where, v.dtype("uint8"))))
        # 0 means 2**-127, which is half the least normal number, and 255 not a number.
        ends = T.bitwise_and(byte + v.iconst(1), v.iconst(0xFE))
        half = T.Select(ends == v.iconst(0), v.iconst(1 << 22), v.iconst(0))
        return T.bind(T.reinterpret(v.f32, T.bitwise_or(T.shift_left(byte, v.iconst(23)), half)))

    def pack(self, emit: Any, parts: list[relax.Expr]) -> list[relax.Expr]:
        """The stored tensors of parts [..., columns, depth] and [..., columns, groups], in Relax ops."""
        codes, *rest = parts
        return [self._panels(emit, self._bytes(emit, codes), STEP), *(self._panels(emit, x, 1) for x in rest)]

    def _bytes(self, emit: Any, codes: relax.Expr) -> relax.Expr:
        """Codes [..., depth] uint8 as the bytes of words [..., words * 4]."""
        lead = [int(d) for d in codes.ty.shape][:-1]
        along = self.steps * STEP - self.depth
        if along:
            codes = emit(R.nn.pad(codes, [0, 0] * len(lead) + [0, along], "constant", 0.0))
        if self.together == 1:
            return codes
        axis = len(lead) + 1
        apart = emit(R.reshape(codes, [*lead, self.steps // self.together, self.together, STEP]))

        def joined(steps: range, apart_by: int, mask: int | None = None, shift: int = 0) -> relax.Expr:
            found = None
            for at, i in enumerate(steps):
                x = emit(R.strided_slice(apart, [axis], [i], [i + 1]))
                if mask is not None:
                    x = emit(R.bitwise_and(emit(R.right_shift(x, _u8(shift))), _u8(mask)))
                if at:
                    x = emit(R.left_shift(x, _u8(at * apart_by)))
                found = x if found is None else emit(R.bitwise_or(found, x))
            return found

        if self.format.bits == 4:
            words = joined(range(2), 4)
        else:
            parts = [joined(range(4), 2, 3), joined(range(4, 8), 2, 3), joined(range(8), 1, 1, 2)]
            words = emit(R.concat(parts, axis))
        return emit(R.reshape(words, [*lead, self.words * STEP]))

    def _panels(self, emit: Any, x: relax.Expr, together: int) -> relax.Expr:
        """[..., columns, items * together] -> [..., panels, items, vectors, lanes(, together)]."""
        *lead, _, along = (int(d) for d in x.ty.shape)
        down = self.count * self.width - self.columns
        if down:
            x = emit(R.nn.pad(x, [0, 0] * len(lead) + [0, down, 0, 0], "constant", 0.0))
        k = len(lead)
        shape, axes = [*lead, self.count, self.vectors, self.lanes, along // together], [k, k + 3, k + 1, k + 2]
        if together > 1:
            shape, axes = [*shape, together], [*axes, k + 4]
        return emit(R.permute_dims(emit(R.reshape(x, shape)), [*range(k), *axes]))


def _u8(value: int) -> relax.Expr:
    return relax.const(value, "uint8")


@dataclass(frozen=True, kw_only=True)
class QuantizedProduct(Product):
    """A product whose weight lies in QuantizedPanels.

    rounded: the group of round_activation, 0 for a whole row; None: activations are not rounded to 8 bits.
    """

    format: Format
    rounded: int | None = None

    @property
    def layout(self) -> QuantizedPanels:
        return QuantizedPanels(self.target, self.columns, self.depth, self.format)

    @property
    def packed(self) -> list[tuple[str, tuple[int, ...], str]]:
        return self.layout.stored

    @property
    def panel_bytes(self) -> int:
        return self.layout.panel_bytes
