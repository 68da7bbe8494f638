"""Matrix units over 8-bit codes: both operands as bytes, summed as 32-bit integers, exactly, or E4M3, as float32.

Fragments, pieces and sums lie as those of the 16-bit units (matrix_units.py) with twice the elements in as many bytes.
A weight's codes of 8 bits stand in pieces as they are stored, offset by 128, and become signed when they are read.

Exactness: a product of integers is at most 127 · 128 in size, so that sums over a depth of DEPTH don't overflow.
A product of E4M3 numbers has 8 bits, and float32 holds it; but units that multiply them line up what one instruction
adds, and keep fewer bits than float32 has: 14 on Hopper (DeepSeek-V3 Technical Report, 2024, 3.3.2). Their sums are
taken over PROMOTED of the depth at most, and added up in float32: what is lost is at most PROMOTED · 2**-13 of the
largest product within them, where sums over the whole depth would lose depth · 2**-13 of the largest sum.

Sources: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k32"; AMD CDNA 2 and CDNA 3 ISA, 7.1 (V_MFMA_I32_16X16X16_I8,
V_MFMA_I32_16X16X32_I8); AMD RDNA 3 ISA, 7.9, and RDNA 4 ISA, 7.12 (V_WMMA_I32_16X16X16_IU8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format

from .machine import Machine, Registers
from .matrix_units import Amd, Mfma, Mma, Wmma, Wmma12, Words
from .product import Product

__all__ = ["CodeUnit", "code_unit"]

STRIDE = 32  # codes of a fragment: groups of scales are multiples
PROMOTED = 128
DEPTH = 1 << 17  # 2**17 · 127 · 128 < 2**31


def code_unit(machine: Machine, product: Product) -> CodeUnit | None:
    """The unit that multiplies the codes of x, rounded to 8 bits, with those of the weight; None: there is none."""
    target, weight, rounded = product.target, product.weight, product.rounded
    if rounded is None or not isinstance(weight, Format) or rounded % STRIDE or weight.group % STRIDE:
        return None
    if weight.table == "e4m3" and target.fp8 and target.matrix_unit == "mma":
        return MmaE4M3(machine, offset=False)
    if weight.table or not target.int8_run or product.depth > DEPTH:
        return None
    if weight.bits != 4 and (weight.bits, weight.zeros, weight.offset) != (8, False, 128):
        return None  # numbers of more than 8 bits, or stored in several pieces
    units: dict[str, type[CodeUnit]] = {"mma": MmaCodes, "mfma": MfmaCodes, "wmma": WmmaCodes, "wmma12": Wmma12Codes}
    return units[str(target.matrix_unit)](machine, offset=weight.bits == 8)


class CodeUnit(Words):
    """See MatrixUnit. offset: W's bytes are offset by 128.

    sum_dtype: of its sums; longest: codes of a period; always: there are periods even where scales have no groups.
    """

    stride, chunk = STRIDE, 16
    sum_dtype = "int32"
    longest = 256  # 256 · 127 · 128 < 2**22
    always = False

    def __init__(self, machine: Machine, offset: bool):
        self.machine, self.dtype, self.offset = machine, "int8", offset

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Registers:
        return self.signed(super().read(piece, addresses, of_x), of_x)

    def signed(self, words: Registers, of_x: bool) -> Registers:
        if self.offset and not of_x:
            for i in range(len(words)):
                words[i] = T.bitwise_xor(words[i], T.uint32(0x80808080))
        return words

    def start(self, sums: Registers) -> None:
        """Let sums of a period begin: as the bits of a float32 whose last bit is one, which add up as the number."""
        for i in range(len(sums)):
            sums[i] = tvm.tirx.const(0x4B400000, sums.dtype)

    def part(self, sum: Any) -> Any:
        """A period's sum as float32, exactly."""
        return T.bind(T.reinterpret("float32", sum) - T.float32(1.5 * 2.0**23))

    def whole(self, sum: Any) -> Any:
        """A sum over the whole depth as float32, rounded once."""
        return T.bind(T.Cast("float32", T.reinterpret("int32", sum)))


class MmaCodes(CodeUnit, Mma):
    """mma.sync.m16n8k32, twice a fragment: rows of 8x8 matrices of 16-bit numbers are those of 16 bytes."""

    sum_dtype = "uint32"  # of all registers of s32, as TVM has it

    def __init__(self, machine: Machine, offset: bool):
        CodeUnit.__init__(self, machine, offset)
        self.instruction = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


class MmaE4M3(MmaCodes):
    """The same instruction over E4M3 numbers."""

    sum_dtype = "float32"
    longest, always = PROMOTED, True

    def __init__(self, machine: Machine, offset: bool):
        CodeUnit.__init__(self, machine, offset)
        self.instruction = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"

    def start(self, sums: Registers) -> None:
        sums.fill(0)

    def part(self, sum: Any) -> Any:
        return T.bind(sum)


class MfmaCodes(CodeUnit, Mfma):
    """v_mfma_i32_16x16x32_i8 of CDNA 3, 64 lanes: lane l has depths 8·(l/16) … of row l % 16; CDNA 2's takes 4 of them.

    Which depths those are does not matter, as long as both operands have the same ones.
    """

    def __init__(self, machine: Machine, offset: bool):
        CodeUnit.__init__(self, machine, offset)
        self.words = machine.target.int8_run // 4  # of an instruction's operand
        self.intrinsic = f"llvm.amdgcn.mfma.i32.16x16x{'32.i8' if self.words == 2 else '16i8'}"
        self.operand = "int64" if self.words == 2 else "int32"

    def addresses(self, first: Any, chunks: int, step: Any, of_x: bool) -> list[Any]:
        """Half a chunk."""
        eight = T.floordiv(self.machine.lane, 16)
        at = self.at(T.floormod(self.machine.lane, 16), 2 * step + T.floordiv(eight, 2), chunks)
        return [T.bind(first * (chunks * 4) + at + T.floormod(eight, 2) * 2)]

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Registers:
        words = self.machine.registers(2, "uint32")
        T.buffer_store(words.buffer, piece.vload([addresses[0]], "uint32x2"), [T.ramp(0, 1, 2)])
        return self.signed(words, of_x)

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        for first in range(0, 2, self.words):
            flags = [T.int32(0)] * 3  # cbsz, abid, blgp: nothing is broadcast
            self.call(sums, fragment, self.words_of(w, first, self.words), self.words_of(x, first, self.words), *flags)


class _WmmaCodes(CodeUnit, Amd):
    """RDNA's instructions take a lane's words and say of each operand whether it is signed, and whether to saturate."""

    intrinsic = "llvm.amdgcn.wmma.i32.16x16x16.iu8"
    longest = 32  # of 64, with the fragments of x that a warp holds, registers don't suffice
    words: int  # of an instruction's operand

    def __init__(self, machine: Machine, offset: bool):
        CodeUnit.__init__(self, machine, offset)
        self.operand = f"int32x{self.words}"

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        n, signed = self.lane_sums, T.bool(True)
        for first in range(0, len(x), self.words):
            c = sums.buffer.vload([fragment * n], f"int32x{n}")
            a, b = (self.words_of(of, first, self.words) for of in (w, x))
            d = T.call_llvm_pure_intrin(f"int32x{n}", self.intrinsic, signed, a, signed, b, c, T.bool(False))
            T.buffer_store(sums.buffer, d, [T.ramp(fragment * n, 1, n)])


class WmmaCodes(_WmmaCodes, Wmma):
    """v_wmma_i32_16x16x16_iu8 of RDNA 3, twice a fragment: lanes l and l + 16 both have row l whole."""

    words = 4


class Wmma12Codes(_WmmaCodes, Wmma12):
    """v_wmma_i32_16x16x16_iu8 of RDNA 4, twice a fragment: lane l has 16 depths of row l % 16, half at a time."""

    words = 2
