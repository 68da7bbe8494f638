"""How quantized weights lie on a GPU: rows of packed codes, rows of scales and zero points beside them.

Every GPU reads the same bytes. A row of codes is whole *units*, which begin on the boundary that the widest load of one
thread asks for; codes past the depth are zeros, and so are scales past the last group: what is read there meets zeros
of the activations.

  8 bits  a byte a code.
  4 bits  words of 8 codes. The word's nibbles, from the lowest, are codes 0 2 4 6 1 3 5 7: a mask of 0x000f000f finds
          the neighbours 0 and 1, shifted by 4, 8, 12 bits the other pairs, as a pair of 16-bit numbers wants them.
  3 bits  two planes of a row: the low two bits of codes, 16 a word, then their high bits, 32 a word; both in order.

Scales and zero points are [columns, groups], a dtype as the format has it; where a row has several, their number is a
multiple of 4, so that rows are whole words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import CompileError
from llmc.ir.quantized import TABLES, Format

__all__ = ["Layout", "pack"]

UNITS = {8: 16, 4: 32, 3: 64}  # codes of a unit, by their bits: 16, 16 and 24 bytes
RUNS = {8: 16, 4: 32, 3: 32}  # codes that one thread reads at once at most: 16, 16, and 8 + 4 bytes
SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "e8m0": 1}
STEP = 8  # codes that are decoded together; groups are multiples


@dataclass(frozen=True)
class Layout:
    """How a weight [..., columns, depth] of a format is stored. CompileError where no kernel reads the format."""

    format: Format
    depth: int
    target: str = "GPUs"

    def __post_init__(self) -> None:
        f = self.format

        def refuse(what: str) -> CompileError:
            return CompileError(f"{f} has no kernels for {self.target}: {what}", stage="quantized")

        if f.bits not in UNITS:
            raise refuse(f"expected codes of 3, 4 or 8 bits, found {f.bits}")
        if f.table and (f.table not in TABLES or len(TABLES[f.table]) != 1 << f.bits):
            raise refuse(f"expected one of {', '.join(TABLES)} with a value for each code, found {f.table!r}")
        if f.scale not in SCALE_BYTES:
            raise refuse(f"expected scales of {', '.join(SCALE_BYTES)}, found {f.scale!r}")
        if f.group % STEP or (f.group and self.depth % f.group):
            raise refuse(
                f"expected groups of a multiple of {STEP} that fill rows of {self.depth}, found groups of {f.group}"
            )

    @property
    def stored_depth(self) -> int:
        """Codes of a stored row."""
        unit = UNITS[self.format.bits]
        return -(-self.depth // unit) * unit

    @property
    def row_bytes(self) -> int:
        return self.stored_depth * self.format.bits // 8

    @property
    def groups(self) -> int:
        """Scales of a stored row."""
        if not self.format.group:
            return 1
        return -(-self.stored_depth // (4 * self.format.group)) * 4

    def run(self, most: int = 32) -> int:
        """Codes that a thread reads at once: at most so many; in whole groups, or in a part of one."""
        group = self.format.group
        run = RUNS[self.format.bits]
        while run > STEP and self.format.bits != 3 and (run > most or (group and group % run and run % group)):
            run //= 2
        if group and group % run and run % group:
            raise CompileError(
                f"{self.format} has no kernels for {self.target}: "
                f"expected groups that divide or are multiples of {run}, found groups of {group}",
                stage="quantized",
            )
        return run

    @property
    def scale_dtype(self) -> str:
        return "uint8" if self.format.scale == "e8m0" else self.format.scale

    def tensors(self, columns: int, lead: Sequence[int] = ()) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape, dtype of what is stored, in order."""
        found = [
            ("codes", (*lead, columns, self.row_bytes), "uint8"),
            ("scales", (*lead, columns, self.groups), self.scale_dtype),
        ]
        return found + ([("zeros", (*lead, columns, self.groups), "uint8")] if self.format.zeros else [])

    def byte_place(self, k: Any) -> Any:
        """Where code k stands among a row's codes where a word of them is taken apart into bytes: a mask then finds
        four codes at once. Of codes of 4 or 8 bits.
        """
        return k if self.format.bits == 8 else k // 8 * 8 + k % 4 * 2 + k % 8 // 4

    def code(self, k: Any, byte: Callable[[Any], Any]) -> Any:
        """Code k of a row whose bytes `byte` gives, in arithmetic that numbers and TVM's expressions both have."""
        if self.format.bits == 8:
            return byte(k)
        if self.format.bits == 4:
            return (byte(k // 8 * 4 + k % 2 * 2 + k % 8 // 4) >> (k % 4 // 2 * 4)) & 15
        low = byte(k // 4) >> (k % 4 * 2)
        high = byte(self.stored_depth // 4 + k // 8) >> (k % 8)
        return (low & 3) | ((high & 1) << 2)


def pack(
    emit: Callable[[relax.Expr], relax.Expr], parts: Sequence[relax.Expr], depth: int, format: Format, target: str
) -> list[relax.Expr]:
    """The parts of a weight as Layout.tensors has them, in Relax ops."""
    layout = Layout(format, depth, target)
    codes, *rest = parts
    return [
        _codes(emit, _padded(emit, codes, layout.stored_depth), format.bits),
        *(_padded(emit, x, layout.groups) for x in rest),
    ]


def _padded(emit: Callable, x: relax.Expr, width: int) -> relax.Expr:
    """Rows with zeros after them."""
    missing = width - int(x.ty.shape[-1])
    if not missing:
        return x
    return emit(R.nn.pad(x, [0, 0] * (len(x.ty.shape) - 1) + [0, missing], "constant", 0.0))


def _codes(emit: Callable, codes: relax.Expr, bits: int) -> relax.Expr:
    """Codes [..., stored depth] as stored rows of bytes."""
    if bits == 8:
        return codes
    *lead, depth = (int(extent) for extent in codes.ty.shape)
    axes = len(lead)

    def byte(x: relax.Expr, count: int, width: int) -> relax.Expr:
        """Bytes of `count` codes [..., count] each, the first in the lowest `width` bits."""
        total: Any = None
        for i in range(count):
            one = emit(R.strided_slice(x, axes=[axes + 1], begin=[i], end=[i + 1]))
            if i:
                one = emit(R.left_shift(one, relax.const(i * width, "uint8")))
            total = one if total is None else emit(R.bitwise_or(total, one))
        return emit(R.reshape(total, [*lead, depth // count]))

    if bits == 4:
        # Code 4a + 2b + c of a word is in byte 2c + a, whose nibble is b.
        x = emit(R.reshape(codes, [*lead, depth // 8, 2, 2, 2]))
        x = emit(R.permute_dims(x, [*range(axes), axes, axes + 3, axes + 1, axes + 2]))
        return byte(emit(R.reshape(x, [*lead, depth // 2, 2])), 2, 4)
    low = emit(R.bitwise_and(codes, relax.const(3, "uint8")))
    high = emit(R.right_shift(codes, relax.const(2, "uint8")))
    low = byte(emit(R.reshape(low, [*lead, depth // 4, 4])), 4, 2)
    high = byte(emit(R.reshape(high, [*lead, depth // 8, 8])), 8, 1)
    return emit(R.concat([low, high], axis=axes))
