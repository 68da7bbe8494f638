"""Matrix units: how a warp's lanes hold the operands and the sums of the instructions that multiply small matrices.

A block keeps pieces of x and of W in shared memory, rows of the tile by depth. A unit multiplies a *fragment*: so many
rows of x by so many rows of W (output columns), over one *stride* of the depth. Here stands how a lane reads its part
of both from shared memory, what multiplies them, and which outputs the lane's sums are.

Sources: PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16" and "ldmatrix"; AMD CDNA 3 ISA, 7.1 (MFMA); AMD RDNA 3 and
RDNA 4 ISA, 7.9 (WMMA); Metal Shading Language Specification, 2.4 and 6.7 (simdgroup matrices, whose lanes are opaque).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tvm.tirx.script import builder as T

from llmc.ir.quantized import Format

from .machine import Machine, Registers
from .memory import Memory, load_run
from .product import Product

CHUNK = 8  # elements of a row that are copied at once

# The place of a lane's run of sums in a fragment: row, first column, and the runs of every fragment asked for.
Place = tuple[Any, Any, list[list[Any]]]


class MatrixUnit(Protocol):
    """A matrix unit, for operands of one dtype.

    rows, columns, stride: of a fragment. chunk: elements of a row that are copied at once. spacing: of chunks in a
    piece, in its elements.
    """

    rows: int
    columns: int
    stride: int
    chunk: int
    spacing: int

    def piece(self, rows: int, depth: int) -> Any:
        """Shared memory for a piece of so many rows."""

    def at(self, row: Any, chunk: Any, chunks: int) -> Any:
        """Where a chunk of a row stands in a piece, whose rows have so many chunks: a multiple of `spacing`."""

    def hold(self) -> Registers:
        """Registers for a chunk on its way to shared memory."""

    def fetch(self, held: Registers, source: Memory, element: Any) -> None:
        """held = the chunk of `source` that begins at `element`."""

    def put(self, held: Registers, piece: Any, at: Any) -> None:
        """The chunk at `at` of a piece = held."""

    def put_values(self, values: Sequence[Any], piece: Any, at: Any) -> None:
        """The chunk at `at` of a piece = float32 values, rounded to its dtype."""

    def addresses(self, first: Any, chunks: int, step: Any, of_x: bool) -> list[Any]:
        """What a lane reads of a fragment whose first row is `first` (a multiple of 8), at a stride of the depth.

        The same rows further on in the piece stand `chunks * spacing` elements a row behind.
        """

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Any:
        """A lane's part of a fragment's operand: rows of x, or of W."""

    def sums(self, fragments: int, dtype: str = "float32") -> Any:
        """Sums of so many fragments, all 0; asked for once in every kernel."""

    def multiply(self, sums: Any, fragment: int, x: Any, w: Any) -> None:
        """Add the products of two operands to a fragment's sums."""

    def results(self, sums: Any, fragments: Sequence[int]) -> Iterator[Place]:
        """Where a lane's sums of fragments with the same rows stand; all threads of a block ask at once."""


def matrix_unit(machine: Machine, product: Product) -> MatrixUnit | None:
    """The unit that multiplies this product's operands as exactly as float32 does, or None.

    Rows of x and W are whole chunks where there is one.
    """
    target, dtype = product.target, product.activation
    if product.depth % CHUNK or target.matrix_unit is None:
        return None
    if target.matrix_unit == "simdgroup":
        half = dtype == "float16" and (product.weight == dtype or isinstance(product.weight, Format))
        if isinstance(product.weight, Format) and product.weight.table and product.weight.bits == 4:
            half = False  # TVM gives a table's floats and halves the same memory, and fails over its two dtypes
        return Simdgroup(machine, "float16" if half else "float32")
    if dtype not in target.dtypes or (product.weight != dtype and not isinstance(product.weight, Format)):
        return None
    units: dict[str, type[Words]] = {"mma": Mma, "mfma": Mfma, "wmma": Wmma, "wmma12": Wmma12}
    return units[target.matrix_unit](machine, dtype)


class Words:
    """Units whose operands are words of two numbers: chunks of 4, swizzled: those of 8 rows lie on different banks."""

    rows = columns = stride = 16
    chunk, spacing = CHUNK, 4
    run: int  # adjacent columns that a lane has
    lane_sums: int  # of a fragment

    def __init__(self, machine: Machine, dtype: str):
        self.machine, self.dtype = machine, dtype

    def piece(self, rows: int, depth: int) -> Any:
        return self.machine.shared(rows * depth // self.chunk * 4, "uint32")

    def at(self, row: Any, chunk: Any, chunks: int) -> Any:
        """In words. A row of 4 chunks is half of the banks, one of 8 all of them."""
        turn = T.floormod(T.floordiv(row, 8 // chunks), chunks) if chunks < 8 else T.floormod(row, 8)
        return row * (chunks * 4) + T.bitwise_xor(chunk, turn) * 4

    def hold(self) -> Registers:
        return self.machine.registers(4, "uint32")

    def fetch(self, held: Registers, source: Memory, element: Any) -> None:
        self.machine.fetch(source.words, element, source.dtype, held, 0, self.chunk)

    def put(self, held: Registers, piece: Any, at: Any) -> None:
        T.buffer_store(piece, held.buffer.vload([0], "uint32x4"), [T.ramp(at, 1, 4)])

    def put_values(self, values: Sequence[Any], piece: Any, at: Any) -> None:
        held = self.hold()
        self.machine.pack_pairs(values, self.dtype, held, 0)
        self.put(held, piece, at)

    def addresses(self, first: Any, chunks: int, step: Any, of_x: bool) -> list[Any]:
        return [T.bind(first * (chunks * 4) + self.at(row, chunk, chunks)) for row, chunk in self.reads(step, of_x)]

    def reads(self, step: Any, of_x: bool) -> list[tuple[Any, Any]]:
        """Row and chunk of what the lane reads."""
        raise NotImplementedError

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Registers:
        words = self.machine.registers(4 * len(addresses), "uint32")
        for i, at in enumerate(addresses):
            T.buffer_store(words.buffer, piece.vload([at], "uint32x4"), [T.ramp(4 * i, 1, 4)])
        return words

    def sums(self, fragments: int, dtype: str = "float32") -> Registers:
        registers = self.machine.registers(fragments * self.lane_sums, dtype)
        registers.fill(0)
        return registers

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        raise NotImplementedError

    def results(self, sums: Registers, fragments: Sequence[int]) -> Iterator[Place]:
        rows, columns = self.lane_rows(), self.lane_columns()
        for row, column, first, step in self.places():
            runs = [[sums[f * self.lane_sums + first + step * i] for i in range(self.run)] for f in fragments]
            yield rows[row], columns[column], runs

    def lane_rows(self) -> list[Any]:
        """The rows of a fragment of which a lane has sums."""
        raise NotImplementedError

    def lane_columns(self) -> list[Any]:
        """The first columns of its runs."""
        raise NotImplementedError

    def places(self) -> list[tuple[int, int, int, int]]:
        """Of every run of a lane: which of its rows and columns, number of the first sum, distance to the next."""
        raise NotImplementedError


class Mma(Words):
    """NVIDIA's mma.sync.m16n8k16, twice a fragment; operands by ldmatrix."""

    run, lane_sums = 2, 8

    def __init__(self, machine: Machine, dtype: str):
        super().__init__(machine, dtype)
        element = {"float16": "f16", "bfloat16": "bf16"}[dtype]
        self.instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32"

    def reads(self, step: Any, of_x: bool) -> list[tuple[Any, Any]]:
        """The row that this lane names: of the 8x8 matrices, x has those below each other first, W those beside."""
        lane = self.machine.lane
        eighth, low = T.floordiv(lane, 8), T.floormod(lane, 8)
        across, down = (T.floordiv(eighth, 2), T.floormod(eighth, 2)) if of_x else (
            T.floormod(eighth, 2), T.floordiv(eighth, 2))  # fmt: skip
        return [(down * 8 + low, 2 * step + across)]

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Registers:
        words = self.machine.registers(4, "uint32")
        ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *[words[i] for i in range(4)], piece.ptr_to([addresses[0]]))
        return words

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        for half in range(2):
            d = [sums[fragment * 8 + half * 4 + i] for i in range(4)]
            ptx(self.instruction, *d, *[x[i] for i in range(4)], w[half * 2], w[half * 2 + 1], *d)

    def lane_rows(self) -> list[Any]:
        return [T.floordiv(self.machine.lane, 4) + 8 * down for down in range(2)]

    def lane_columns(self) -> list[Any]:
        return [T.floormod(self.machine.lane, 4) * 2 + 8 * half for half in range(2)]

    def places(self) -> list[tuple[int, int, int, int]]:
        return [(down, half, half * 4 + down * 2, 1) for half in range(2) for down in range(2)]


class Amd(Words):
    """AMD's units. W is the first operand, so that what a lane has below each other are columns of one row of y."""

    intrinsic: str
    operand: str  # of an instruction, as a vector

    def lane_rows(self) -> list[Any]:
        return [T.floormod(self.machine.lane, 16)]

    def call(self, sums: Registers, fragment: int, w: Any, x: Any, *rest: Any) -> None:
        n = self.lane_sums
        c = sums.buffer.vload([fragment * n], f"{sums.dtype}x{n}")
        d = T.call_llvm_pure_intrin(f"{sums.dtype}x{n}", self.intrinsic, w, x, c, *rest)
        T.buffer_store(sums.buffer, d, [T.ramp(fragment * n, 1, n)])

    def words_of(self, words: Registers, first: int, count: int) -> Any:
        """Words of a lane as the instruction's operand."""
        word = words[first] if count == 1 else words.buffer.vload([first], f"uint32x{count}")
        return T.reinterpret(self.operand, word)


class Mfma(Amd):
    """v_mfma_f32_16x16x16 of CDNA, 64 lanes, twice a fragment: lane l has depths 8·(l/16) … of row l % 16.

    The instruction takes four depths of a lane, whichever they are, as long as both operands have the same ones: the
    first instruction takes the first half of every lane's chunk, the second the rest.
    """

    stride = 32
    run = lane_sums = 4

    def __init__(self, machine: Machine, dtype: str):
        super().__init__(machine, dtype)
        self.intrinsic = "llvm.amdgcn.mfma.f32." + ("16x16x16f16" if dtype == "float16" else "16x16x16bf16.1k")
        self.operand = "float16x4" if dtype == "float16" else "int16x4"

    def reads(self, step: Any, of_x: bool) -> list[tuple[Any, Any]]:
        lane = self.machine.lane
        return [(T.floormod(lane, 16), 4 * step + T.floordiv(lane, 16))]

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        for half in (0, 2):
            flags = [T.int32(0)] * 3  # cbsz, abid, blgp: nothing is broadcast
            self.call(sums, fragment, self.words_of(w, half, 2), self.words_of(x, half, 2), *flags)

    def lane_columns(self) -> list[Any]:
        return [T.floordiv(self.machine.lane, 16) * 4]

    def places(self) -> list[tuple[int, int, int, int]]:
        return [(0, 0, 0, 1)]


class Wmma(Amd):
    """v_wmma_f32_16x16x16 of RDNA 3, 32 lanes: lanes l and l + 16 both have row l whole; sums of columns 2·i + l/16."""

    run, lane_sums = 1, 8

    def __init__(self, machine: Machine, dtype: str):
        super().__init__(machine, dtype)
        self.intrinsic = "llvm.amdgcn.wmma.f32.16x16x16." + ("f16" if dtype == "float16" else "bf16")
        self.operand = "float16x16" if dtype == "float16" else "int16x16"

    def reads(self, step: Any, of_x: bool) -> list[tuple[Any, Any]]:
        row = T.floormod(self.machine.lane, 16)
        return [(row, 2 * step), (row, 2 * step + 1)]

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        self.call(sums, fragment, self.words_of(w, 0, 8), self.words_of(x, 0, 8))

    def lane_columns(self) -> list[Any]:
        return [T.floordiv(self.machine.lane, 16) + 2 * i for i in range(8)]

    def places(self) -> list[tuple[int, int, int, int]]:
        return [(0, i, i, 1) for i in range(8)]


class Wmma12(Wmma):
    """v_wmma_f32_16x16x16 of RDNA 4, 32 lanes: lane l has depths 8·(l/16) … of row l % 16, and sums of 8 columns so."""

    run = 8

    def __init__(self, machine: Machine, dtype: str):
        super().__init__(machine, dtype)
        self.operand = "float16x8" if dtype == "float16" else "int16x8"

    def reads(self, step: Any, of_x: bool) -> list[tuple[Any, Any]]:
        lane = self.machine.lane
        return [(T.floormod(lane, 16), 2 * step + T.floordiv(lane, 16))]

    def multiply(self, sums: Registers, fragment: int, x: Registers, w: Registers) -> None:
        self.call(sums, fragment, self.words_of(w, 0, 4), self.words_of(x, 0, 4))

    def lane_columns(self) -> list[Any]:
        return [T.floordiv(self.machine.lane, 16) * 8]

    def places(self) -> list[tuple[int, int, int, int]]:
        return [(0, 0, 0, 1)]


class Simdgroup:
    """Apple's 8x8 matrices with float32 sums; operands float16, or float32 for all else, which holds them exactly.

    Which lane has what is not told: sums pass through shared memory. A piece is squares of 8 rows by a chunk.
    """

    rows = columns = stride = spacing = chunk = CHUNK

    def __init__(self, machine: Machine, dtype: str):
        self.machine, self.dtype = machine, dtype
        self.staging: Any = None

    def piece(self, rows: int, depth: int) -> Any:
        return self.machine.shared(rows * depth, self.dtype)

    def at(self, row: Any, chunk: Any, chunks: int) -> Any:
        return (T.floordiv(row, 8) * chunks + chunk) * 64 + T.floormod(row, 8) * 8

    def hold(self) -> Registers:
        return self.machine.registers(CHUNK, self.dtype)

    def fetch(self, held: Registers, source: Memory, element: Any) -> None:
        if self.dtype == "float16":
            for i in range(0, CHUNK, 4):
                T.buffer_store(held.buffer, source.elements.vload([element + i], "float16x4"), [T.ramp(i, 1, 4)])
            return
        for i, value in enumerate(load_run(self.machine, source, element, CHUNK)):
            held[i] = value

    def put(self, held: Registers, piece: Any, at: Any) -> None:
        for i in range(0, CHUNK, 4):
            T.buffer_store(piece, held.buffer.vload([i], f"{self.dtype}x4"), [T.ramp(at + i, 1, 4)])

    def put_values(self, values: Sequence[Any], piece: Any, at: Any) -> None:
        held = self.hold()
        for i, value in enumerate(values):
            held[i] = value if self.dtype == "float32" else T.Cast(self.dtype, value)
        self.put(held, piece, at)

    def addresses(self, first: Any, chunks: int, step: Any, of_x: bool) -> list[Any]:
        return [T.bind(first * (chunks * 8) + step * 64)]

    def read(self, piece: Any, addresses: Sequence[Any], of_x: bool) -> Any:
        matrix = T.alloc_buffer((64,), self.dtype, scope="metal.simdgroup")
        square = piece.access_ptr("r", offset=addresses[0])
        # W's rows are the product's columns: its squares are read transposed.
        T.evaluate(T.metal.simdgroup_load(matrix.data, 0, square, 8, 8, 8, not of_x))
        return matrix

    def sums(self, fragments: int, dtype: str = "float32") -> Any:
        self.staging = None
        matrices = T.alloc_buffer((64 * fragments,), dtype, scope="metal.simdgroup")
        for i in range(fragments):
            T.evaluate(T.metal.make_filled_simdgroup_matrix(matrices.data, i, T.float32(0), 8, 8))
        return matrices

    def multiply(self, sums: Any, fragment: int, x: Any, w: Any) -> None:
        T.evaluate(
            T.metal.simdgroup_multiply_accumulate(sums.data, fragment, x.data, 0, w.data, 0, sums.data, fragment)
        )

    def results(self, sums: Any, fragments: Sequence[int]) -> Iterator[Place]:
        m, size = self.machine, 64 * len(fragments)
        if self.staging is None:
            self.staging = m.shared(m.threads // m.warp * size)
        base = T.bind(m.warp_number * size)
        for i, fragment in enumerate(fragments):
            square = self.staging.access_ptr("w", offset=base + i * 64)
            T.evaluate(T.metal.simdgroup_store(sums.data, fragment, square, 8, 8, 8, False))
        m.barrier()  # the warp's own would do, but TVM's check of shared memory knows the block's only
        row, column = T.bind(T.floordiv(m.lane, 4)), T.bind(T.floormod(m.lane, 4) * 2)
        at = T.bind(base + row * 8 + column)
        runs = [[T.bind(self.staging[at + i * 64 + e]) for e in range(2)] for i in range(len(fragments))]
        m.barrier()
        yield row, column, runs


def ptx(instruction: str, *operands: Any) -> None:
    """Emit an instruction of PTX: destinations, then sources."""
    T.evaluate(T.ptx[instruction](*operands))
