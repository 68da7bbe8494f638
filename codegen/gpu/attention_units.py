"""Matrix units as attention uses them: sixteen query vectors of a warp against sixteen tokens, or sixteen columns.

Scores come out of the unit where the next product takes them in, so that weights never leave their registers:

    mma (CUDA)             S = Q K^T, lane l holds rows l/4 and l/4 + 8;    O = P V
    mfma, wmma (AMD)       S^T = K Q^T, lane l holds query l % 16;          O^T = V^T P^T

A unit says which queries a lane has (`query`), which tokens or columns its sums stand for (`place`), across which lanes
a query's numbers lie (`masks`), and multiplies. Operands are words of two 16-bit numbers. Layouts: PTX ISA 9.0, "Matrix
Fragments for mma.m16n8k16"; AMD matrix instruction calculator, v_mfma_f32_16x16x16_f16; RDNA 3 and RDNA 4 instruction
set architecture, "WMMA".
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from .machine import Machine, Registers

__all__ = ["Unit", "unit_of"]

SIDE = 16  # queries, tokens, depths or columns of one product


class Unit:
    """What a lane holds of a product of sixteen by sixteen.

    queries: how many a lane has. sums: registers of a product; words: of the operand that holds queries.
    run: neighbouring sums that stand for neighbouring columns. masks: lanes that share a query, for shuffles.
    """

    queries: int
    sums: int
    words: int
    run: int
    masks: tuple[int, ...]

    def __init__(self, m: Machine, dtype: str):
        self.m, self.dtype = m, dtype

    def query(self, i: int) -> Any:
        """The number of this lane's i-th query."""
        raise NotImplementedError

    def query_of(self, e: int) -> int:
        """Which of the lane's queries a sum belongs to."""
        return 0

    def place(self, e: int) -> Any:
        """The token or the column that a sum stands for."""
        raise NotImplementedError

    def query_word(self, w: int) -> tuple[int, Any]:
        """Of which of the lane's queries, and from which depth on, word w of the operand holds two numbers."""
        raise NotImplementedError

    def load_queries(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        """The operand of sixteen queries (or their weights) from rows of shared memory, `at` their first element."""
        raise NotImplementedError

    def load_keys(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        """The operand of sixteen tokens from rows of shared memory, `at` their first element, so many apart."""
        raise NotImplementedError

    def load_values(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        """The operand of sixteen columns of sixteen tokens, each a row of shared memory."""
        raise NotImplementedError

    def weights(self, scores: Registers, at: int, to: Registers) -> None:
        """The operand of weights, from the sums scores[at], … of a product of keys."""
        raise NotImplementedError

    def multiply(self, tokens: Registers, queries: Registers, at: int, sums: Registers, to: int) -> None:
        """sums[to …] += the product of an operand of tokens with the operand of queries (or weights) at words `at`."""
        raise NotImplementedError

    def pair(self, low: Any, high: Any) -> Any:
        """Two weights, 0 … 1, as a word: ties away from zero in bfloat16, which is three instructions less."""
        if self.dtype == "float16":
            low, high = (T.Cast("uint32", T.reinterpret("uint16", T.Cast("float16", x))) for x in (low, high))
            return T.bitwise_or(low, T.shift_left(high, T.uint32(16)))
        low, high = (T.reinterpret("uint32", x) + T.uint32(0x8000) for x in (low, high))
        return T.bitwise_or(T.bitwise_and(high, T.uint32(0xFFFF0000)), T.shift_right(low, T.uint32(16)))


class Mma(Unit):
    """mma.sync.m16n8k16, twice."""

    queries, sums, words, run, masks = 2, 8, 4, 2, (1, 2)

    def __init__(self, m: Machine, dtype: str):
        super().__init__(m, dtype)
        element = {"float16": "f16", "bfloat16": "bf16"}[dtype]
        self.instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32"

    def query(self, i: int) -> Any:
        return T.floordiv(self.m.lane, T.int32(4)) + 8 * i

    def query_of(self, e: int) -> int:
        return e % 4 // 2

    def place(self, e: int) -> Any:
        return T.floormod(self.m.lane, T.int32(4)) * 2 + (e // 4 * 8 + e % 2)

    def query_word(self, w: int) -> tuple[int, Any]:
        return w % 2, T.floormod(self.m.lane, T.int32(4)) * 2 + w // 2 * 8

    def _load(self, shared: Any, row: Any, column: Any, at: Any, stride: int, to: Registers, turned: str) -> None:
        name = f"ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16"
        T.evaluate(T.ptx[name](to[0], to[1], to[2], to[3], shared.ptr_to([at + row * stride + column])))

    def load_queries(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        lane = self.m.lane
        self._load(shared, T.floormod(lane, T.int32(16)), T.floordiv(lane, T.int32(16)) * 8, at, stride, to, "")

    def load_keys(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        lane = self.m.lane
        row = T.floordiv(lane, T.int32(16)) * 8 + T.floormod(lane, T.int32(8))
        self._load(shared, row, T.floormod(T.floordiv(lane, T.int32(8)), T.int32(2)) * 8, at, stride, to, "")

    def load_values(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        lane = self.m.lane
        self._load(shared, T.floormod(lane, T.int32(16)), T.floordiv(lane, T.int32(16)) * 8, at, stride, to, ".trans")

    def weights(self, scores: Registers, at: int, to: Registers) -> None:
        for w in range(4):
            to[w] = self.pair(scores[at + 2 * w], scores[at + 2 * w + 1])

    def multiply(self, tokens: Registers, queries: Registers, at: int, sums: Registers, to: int) -> None:
        for half in range(2):
            d = [sums[to + 4 * half + i] for i in range(4)]
            a = [queries[at + i] for i in range(4)]
            T.evaluate(T.ptx[self.instruction](*d, *a, tokens[2 * half], tokens[2 * half + 1], *d))


class Amd(Unit):
    """A 16x16x16 product whose second operand is the queries: a lane has one of them, and some depths of it."""

    queries = 1

    def __init__(self, m: Machine, dtype: str, kind: str):
        super().__init__(m, dtype)
        # Depths of a lane in an operand; sums of a lane.
        self.depths, self.sums = {"mfma": (4, 4), "wmma": (16, 8), "wmma12": (8, 8)}[kind]
        self.kind, self.words = kind, self.depths // 2
        self.run = 1 if kind == "wmma" else self.sums
        self.masks = (16, 32) if kind == "mfma" else (16,)
        self.part = T.bind(T.floordiv(m.lane, T.int32(16)))
        self.own = T.bind(T.floormod(m.lane, T.int32(16)))

    def query(self, i: int) -> Any:
        return self.own

    def place(self, e: int) -> Any:
        return self.part + 2 * e if self.kind == "wmma" else self.part * self.sums + e

    def depth(self, i: int) -> Any:
        """The i-th depth of this lane in an operand."""
        return T.int32(i) if self.kind == "wmma" else self.part * self.depths + i

    def query_word(self, w: int) -> tuple[int, Any]:
        return 0, self.depth(2 * w)

    def load_queries(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        self.load_keys(shared, at, stride, to)  # both operands lie alike

    def load_keys(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        width = min(self.words, 4)
        for w in range(0, self.words, width):
            # Halves, as they lie: TVM takes a view of AMD's shared memory in another dtype for global memory.
            first = at + self.own * stride + self.depth(2 * w)
            halves = shared.vload([T.ramp(first, 1, 2 * width)])
            T.buffer_store(to.buffer, T.reinterpret(f"uint32x{width}", halves), [T.ramp(w, 1, width)])

    def load_values(self, shared: Any, at: Any, stride: int, to: Registers) -> None:
        def one(i: int) -> Any:
            return T.Cast("uint32", shared[at + self.depth(i) * stride + self.own])

        for w in range(self.words):
            to[w] = T.bitwise_or(one(2 * w), T.shift_left(one(2 * w + 1), T.uint32(16)))

    def weights(self, scores: Registers, at: int, to: Registers) -> None:
        if self.kind != "wmma":
            for w in range(self.words):
                to[w] = self.pair(scores[at + 2 * w], scores[at + 2 * w + 1])
            return
        for w in range(self.words):  # a lane has every second token, its neighbour half a warp away the others
            other = self.m.shuffle_xor(scores[at + w], 16)
            low = T.Select(self.part == 0, scores[at + w], other)
            high = T.Select(self.part == 0, other, scores[at + w])
            to[w] = self.pair(low, high)

    def operand(self, words: Registers, at: int) -> Any:
        element = "float16" if self.dtype == "float16" else "int16"
        return T.reinterpret(f"{element}x{self.depths}", words.buffer.vload([at], f"uint32x{self.words}"))

    def multiply(self, tokens: Registers, queries: Registers, at: int, sums: Registers, to: int) -> None:
        vector = f"float32x{self.sums}"
        if self.kind == "mfma":
            name = "llvm.amdgcn.mfma.f32.16x16x16" + ("f16" if self.dtype == "float16" else "bf16.1k")
        else:
            name = "llvm.amdgcn.wmma.f32.16x16x16." + ("f16" if self.dtype == "float16" else "bf16")
        modifiers = [T.int32(0)] * 3 if self.kind == "mfma" else []
        before = sums.buffer.vload([to], vector)
        after = T.call_llvm_pure_intrin(
            vector, name, self.operand(tokens, 0), self.operand(queries, at), before, *modifiers
        )
        T.buffer_store(sums.buffer, after, [T.ramp(to, 1, self.sums)])


def unit_of(m: Machine, dtype: str) -> Unit | None:
    """The target's unit for products of this dtype, or None."""
    target = m.target
    if target.matrix_unit is None or dtype not in target.dtypes:
        return None
    if target.matrix_unit == "mma":
        return Mma(m, dtype)
    if target.matrix_unit in ("mfma", "wmma", "wmma12"):
        return Amd(m, dtype, target.matrix_unit)
    return None
