"""The vocabulary of GPU kernels, the same for the three languages that device code is emitted in.

Templates are Python that runs while `tvm.script.ir_builder` records, as those of the CPU: Python loops unroll, `T.*`
emits. A template says barrier, shuffle, load, exponential; this file knows how CUDA C++, AMDGPU's LLVM IR and MSL spell
them. Numbers are float32 in registers; float16 and bfloat16 exist in memory only. bfloat16 is never a type of device
code: its bits are uint16, widened by a shift and narrowed on the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.targets import GpuTarget

from ..cpu.vector import Params, Symbols, choose, i64, when
from ..invariance import ASKED, INVARIANCE

__all__ = [
    "INVARIANT",
    "LEAST",
    "NOTHING",
    "Machine",
    "bits",
    "choose",
    "flat",
    "i64",
    "kernel",
    "loop",
    "when",
    "whole",
]

BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "int32": 4,
    "int64": 8,
}
# Fast math (MSL) may take infinities for numbers that can't be: masks are finite.
LEAST = -3e38  # a masked score: exp2(LEAST - NOTHING) is 0
NOTHING = -1e30  # a peak before the first score: exp2(NOTHING - score) is 0
LOG2E = 1.4426950408889634
# The parameter, a number and no buffer, by which a call says whether sums may depend on what else is in the step.
INVARIANT = ("invariant", (), "int64")


def kernel(name: str, params: Params, body: Callable[..., None]) -> tvm.tirx.PrimFunc:
    """A PrimFunc named `name` with buffers `params` (name, shape, dtype); a str in a shape is a symbolic dimension.

    `body(symbols, *buffers)` emits it: host code with launches (`Machine.launch`) in it. Buffers don't overlap. The
    function is scheduled: no pass touches its loops. With a parameter INVARIANT it says that its caller chooses.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        if INVARIANT in params:
            T.func_attr({INVARIANCE: ASKED})
        symbols: Symbols = {}
        for _, shape, _ in params:
            for size in shape:
                if isinstance(size, str) and size not in symbols:
                    symbols[size] = T.int64()
        buffers = [
            T.arg(p, T.int64())
            if (p, shape, dtype) == INVARIANT
            else T.arg(p, T.buffer(tuple(symbols[s] if isinstance(s, str) else T.int64(s) for s in shape), dtype))
            for p, shape, dtype in params
        ]
        body(symbols, *buffers)
    return builder.get()


def size_of(buffer: Any) -> Any:
    """How many elements a buffer has, int64."""
    total = T.int64(1)
    for extent in buffer.shape:
        total = total * i64(extent)
    return total


def flat(buffer: Any, dtype: str | None = None) -> Any:
    """The same memory with one axis, of its own dtype (bfloat16: its bits, uint16) or as elements of `dtype`."""
    own = "uint16" if buffer.dtype == "bfloat16" else str(buffer.dtype)
    dtype = dtype or own
    total = size_of(buffer)
    if BYTES[dtype] != BYTES[own]:
        total = T.floordiv(total * BYTES[own], T.int64(BYTES[dtype]))
    view = T.decl_buffer((total,), dtype, data=buffer.data)
    IRBuilder.name(str(buffer.name), view)
    return view


def bits(buffer: Any) -> Any:
    """The buffer itself, or its bits as uint16 where it holds bfloat16."""
    if buffer.dtype != "bfloat16":
        return buffer
    return T.decl_buffer(tuple(buffer.shape), "uint16", data=buffer.data)


@contextmanager
def loop(stop: Any, start: Any = 0, step: int = 1) -> Iterator[Any]:
    """for i in range(start, stop, step), int32; what `stop` says is computed once, before."""
    count = T.floordiv(stop - start + (step - 1), T.int32(step)) if step > 1 else stop - start
    if isinstance(count, int):
        with T.serial(T.int32(0), T.int32(count)) as i:
            yield i if start == 0 and step == 1 else T.bind(i * step + start)
        return
    extent = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(extent, count, [0])
    with T.serial(T.int32(0), T.bind(T.max(extent[0], T.int32(0)))) as i:
        yield i if isinstance(start, int) and start == 0 and step == 1 else T.bind(i * step + start)


class Registers:
    """A few values of one thread that can be assigned: r[i] reads, r[i] = x writes. Indices are Python integers.

    The simplifier does not see through them: what is put here is computed once.
    """

    def __init__(self, count: int, dtype: str = "float32"):
        self.count, self.dtype = count, dtype
        self.buffer = T.alloc_buffer((count,), dtype, scope="local", align=16)

    def __getitem__(self, i: Any) -> Any:
        return self.buffer[i]

    def __setitem__(self, i: Any, value: Any) -> None:
        T.buffer_store(self.buffer, value, [i])

    def __len__(self) -> int:
        return self.count

    def fill(self, value: float) -> None:
        for i in range(self.count):
            self[i] = tvm.tirx.const(value, self.dtype)


class Machine:
    """One GPU, as a kernel template sees it.

    warp: threads that run together; thread: this thread's number in its block, int32, inside `launch`.
    """

    def __init__(self, target: GpuTarget):
        self.target, self.language, self.warp = target, target.language, target.warp
        self.thread: Any = None
        self.threads = 0

    # Launches

    @contextmanager
    def launch(self, grid: Sequence[Any], threads: int) -> Iterator[list[Any]]:
        """Emit a launch of grid[0] × grid[1] × … blocks (at most three axes) of so many threads; gives block numbers.

        They are int32. A grid without blocks is an error of most drivers: guard it.
        """
        with ExitStack() as stack:
            blocks = [
                stack.enter_context(T.launch_thread(f"blockIdx.{axis}", i32(extent)))
                for axis, extent in zip("xyz", grid, strict=False)
            ]
            self.thread = stack.enter_context(T.launch_thread("threadIdx.x", T.int32(threads)))
            self.threads = threads
            yield blocks
            self.thread = None

    @property
    def lane(self) -> Any:
        """This thread's number in its warp."""
        return T.floormod(self.thread, T.int32(self.warp))

    @property
    def warp_number(self) -> Any:
        """This thread's warp in its block."""
        return T.floordiv(self.thread, T.int32(self.warp))

    # Memory

    def registers(self, count: int, dtype: str = "float32") -> Registers:
        """Values of this thread."""
        return Registers(count, dtype)

    def shared(self, count: int, dtype: str = "float32", *, dynamic: bool = False) -> Any:
        """Memory of the block, one axis. dynamic: asked for at the launch, so that it may be more than shared_bytes."""
        return T.alloc_buffer((count,), dtype, scope="shared.dyn" if dynamic else "shared", align=16)

    def keep(self, value: Any, dtype: str = "int32") -> Any:
        """A scalar that is computed here, once, and not again where it is used."""
        register = Registers(1, dtype)
        register[0] = value
        return T.bind(register[0])

    @property
    def barrier_orders_tensors(self) -> bool:
        """A plain barrier is for tensors, too."""
        return self.language != "msl"

    def barrier(self, device: bool = False) -> None:
        """All threads of the block have come here, and see what each wrote to shared memory before.

        device: and to tensors. Other languages' barriers are for all memory; MSL's is for what its flags name, and TVM
        names threadgroup memory alone.
        """
        if device and self.language == "msl":
            mem_device = T.call_extern("int32", "mem_flags", T.int32(1))
            T.evaluate(T.call_extern("void", "threadgroup_barrier", mem_device))
        T.evaluate(T.tvm_storage_sync("shared"))

    def warp_barrier(self) -> None:
        """The same for the threads of one warp.

        AMD's run in step, so that no instruction is needed; but a bare wave.barrier orders no accesses of memory, which
        the fences do for LLVM ("Memory Model" of its AMDGPU guide: at the scope of a wavefront they cost nothing).
        """
        if self.language == "cuda":
            T.evaluate(T.call_extern("void", "__syncwarp"))  # TVM's own "warp" sync emits nothing on CUDA
        elif self.language == "amdgpu":
            T.evaluate(T.call_extern("void", "llmc_wave_release"))
            T.evaluate(T.call_llvm_intrin("void", "llvm.amdgcn.wave.barrier"))
            T.evaluate(T.call_extern("void", "llmc_wave_acquire"))
        else:
            T.evaluate(T.tvm_storage_sync("warp"))

    def in_turn(self) -> None:
        """What stands after this is not begun before it. LLVM's scheduler brings loads of straight code to its
        beginning, until registers don't suffice; the others weigh that.
        """
        if self.language == "amdgpu":
            T.evaluate(T.call_llvm_intrin("void", "llvm.amdgcn.sched.barrier", T.int32(0)))

    # Lanes

    def shuffle_xor(self, x: Any, mask: int) -> Any:
        """x of the lane whose number is this one's with the bits of `mask` flipped; float32 or 32-bit integers.

        All lanes of the warp must come here together.
        """
        if not 0 < mask < self.warp:
            raise ValueError(f"shuffle_xor: expected a mask of 1 … {self.warp - 1}, found {mask}")
        if self.language == "cuda":
            return T.bind(T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), x, T.int32(mask), 32, 32))
        if self.language == "msl":
            return T.bind(T.call_extern(dtype_of(x), "simd_shuffle_xor", x, T.uint16(mask)))
        return self._permute(x, T.bitwise_xor(self.lane, T.int32(mask)))

    def shuffle(self, x: Any, lane: Any) -> Any:
        """x of the lane of that number, 0 … warp-1; float32 or 32-bit integers. All lanes must come here together."""
        if self.language == "cuda":
            return T.bind(T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), x, lane, 32, 32))
        if self.language == "msl":
            return T.bind(T.call_extern(dtype_of(x), "simd_shuffle", x, T.Cast("uint16", lane)))
        return self._permute(x, lane)

    def _permute(self, x: Any, lane: Any) -> Any:
        """ds_bpermute: takes a lane's number in bytes of a register, and 32-bit integers."""
        word = x if dtype_of(x) == "int32" else T.reinterpret("int32", x)
        found = T.bind(T.call_llvm_intrin("int32", "llvm.amdgcn.ds.bpermute", lane * 4, word))
        return found if dtype_of(x) == "int32" else T.bind(T.reinterpret(dtype_of(x), found))

    def warp_reduce(self, op: Callable[[Any, Any], Any], x: Any, lanes: int = 0, stride: int = 1) -> Any:
        """op over the `lanes` lanes (a power of two, all of the warp if 0) that stand `stride` apart; all get it."""
        lanes = lanes or self.warp // stride
        register = Registers(1, dtype_of(x))
        register[0] = x
        mask = stride
        while mask < lanes * stride:
            other = self.shuffle_xor(register[0], mask)
            register[0] = op(register[0], other)
            mask *= 2
        return T.bind(register[0])

    def block_reduce(self, op: Callable[[Any, Any], Any], x: Any, shared: Any) -> Any:
        """op over all threads of the block, in an order that does not change; all get it.

        shared: as many elements of x's dtype as the block has warps; it may be used again after another barrier only.
        """
        x = self.warp_reduce(op, x)
        warps = self.threads // self.warp
        if warps == 1:
            return x
        with when(self.lane == 0):
            T.buffer_store(shared, x, [self.warp_number])
        self.barrier()
        register = Registers(1, dtype_of(x))
        register[0] = shared[0]
        for i in range(1, warps):
            register[0] = op(register[0], shared[i])
        return T.bind(register[0])

    # Numbers in memory

    def load_f32(self, buffer: Any, index: Sequence[Any]) -> Any:
        """An element of float32, float16 or uint16 (the bits of bfloat16) as float32."""
        return T.bind(widen(buffer[tuple(index)]))

    def store(self, buffer: Any, index: Sequence[Any], value: Any) -> None:
        """A float32 value to float32, float16 or uint16 (the bits of bfloat16), to nearest even; NaN is kept."""
        T.buffer_store(buffer, self.narrow(value, str(buffer.dtype)), list(index))

    def narrow(self, value: Any, dtype: str) -> Any:
        """A float32 value as float16, as the bits of bfloat16 ("uint16"), or as it is."""
        if dtype == "float32":
            return value
        if dtype != "uint16":
            return T.Cast(dtype, value)
        u = T.uint32
        word = self.keep(T.reinterpret("uint32", value), "uint32")
        even = T.bitwise_and(T.shift_right(word, u(16)), u(1))
        rounded = T.shift_right(word + (even + u(0x7FFF)), u(16))
        # Fast math takes x != x for false: a NaN is found by its bits, and stays one whatever its low bits are.
        nan = T.bitwise_and(word, u(0x7FFFFFFF)) > u(0x7F800000)
        return T.Cast("uint16", T.Select(nan, T.bitwise_or(T.shift_right(word, u(16)), u(0x40)), rounded))

    def fetch(
        self, words: Any, element: Any, dtype: str, to: Registers, at: int, count: int, once: bool = False
    ) -> None:
        """Load `count` elements of `dtype` into the words to[at], …, in one access of count * bytes ≥ 4.

        words: `flat(buffer, "uint32")`; element: number of the first, a multiple of `count`. At most 16 bytes.
        once: nobody writes them or reads them again: where it can be said, they stay out of the first cache.
        """
        lanes, index = self._words(element, dtype, count)
        if once and lanes == 4 and self.language == "cuda":
            load = T.ptx["ld.global.nc.L1::no_allocate.v4.b32"]
            T.evaluate(load(*(to[at + i] for i in range(4)), words.ptr_to([index])))
        elif lanes == 1:
            to[at] = words[index]
        else:
            T.buffer_store(to.buffer, words.vload([index], f"uint32x{lanes}"), [T.ramp(at, 1, lanes)])

    def unpack(self, words: Registers, at: int, dtype: str, count: int) -> list[Any]:
        """The `count` elements of `dtype` that words[at], … hold, as float32."""
        found = []
        for i in range(count):
            if dtype == "float32":
                value = T.reinterpret("float32", words[at + i])
            elif dtype == "float16":
                word = words[at + i // 2]
                half = T.Cast("uint16", T.shift_right(word, T.uint32(16)) if i % 2 else word)
                value = T.Cast("float32", T.reinterpret("float16", half))
            else:
                word = words[at + i // 2]
                word = T.bitwise_and(word, T.uint32(0xFFFF0000)) if i % 2 else T.shift_left(word, T.uint32(16))
                value = T.reinterpret("float32", word)
            found.append(T.bind(value))
        return found

    def masked(self, word: Any, mask: int, ones: int) -> Any:
        """word & mask | ones, of uint32: one instruction where the machine has one of three operands."""
        if self.language != "cuda":
            return T.bitwise_or(T.bitwise_and(word, T.uint32(mask)), T.uint32(ones))
        found = Registers(1, "uint32")  # nvcc makes two of it, each with one of the constants in it
        T.evaluate(T.ptx["lop3.b32"](found[0], word, T.uint32(mask), T.uint32(ones), 0xEA))
        return found[0]

    def pack_pairs(self, values: Sequence[Any], dtype: str, to: Registers, at: int) -> None:
        """`pack` for float16 and bfloat16, two at a time where the machine can; a NaN may become another one."""
        if self.language != "cuda":
            return self.pack(values, dtype, to, at)
        convert = T.ptx[f"cvt.rn.{'f16x2' if dtype == 'float16' else 'bf16x2'}.f32"]
        for i in range(0, len(values), 2):
            T.evaluate(convert(to[at + i // 2], values[i + 1], values[i]))
        return None

    def pack(self, values: Sequence[Any], dtype: str, to: Registers, at: int) -> None:
        """float32 values into words to[at], … as elements of `dtype`, rounded to nearest even."""
        if dtype == "float32":
            for i, value in enumerate(values):
                to[at + i] = T.reinterpret("uint32", value)
            return
        for i in range(0, len(values), 2):
            low, high = (T.Cast("uint32", self._half(value, dtype)) for value in values[i : i + 2])
            to[at + i // 2] = T.bitwise_or(low, T.shift_left(high, T.uint32(16)))

    def _half(self, value: Any, dtype: str) -> Any:
        """The bits, uint16, of a float32 value as float16 or bfloat16."""
        if dtype == "float16":
            return T.reinterpret("uint16", T.Cast("float16", value))
        return self.narrow(value, "uint16")

    def put(self, words: Any, element: Any, dtype: str, values: Registers, at: int, count: int) -> None:
        """Store `count` elements of `dtype` from the words values[at], … in one access; the sister of `fetch`."""
        lanes, index = self._words(element, dtype, count)
        if lanes == 1:
            T.buffer_store(words, values[at], [index])
        else:
            T.buffer_store(words, values.buffer.vload([at], f"uint32x{lanes}"), [T.ramp(index, 1, lanes)])

    def _words(self, element: Any, dtype: str, count: int) -> tuple[int, Any]:
        lanes = count * BYTES[dtype] // 4
        if lanes * 4 != count * BYTES[dtype] or lanes not in (1, 2, 4):
            raise ValueError(f"one access moves 4, 8 or 16 bytes, found {count} elements of {dtype}")
        return lanes, T.floordiv(i64(element), T.int64(count)) * lanes

    # Functions

    def number(self, value: float) -> Any:
        """A float32 constant, exactly. TVM prints seven digits of one in MSL, where nine are needed: its bits, then.

        Fast math knows no infinities: the largest number stands for one in MSL.
        """
        if self.language != "msl":
            return T.float32(value)
        largest = np.finfo(np.float32).max
        exact = np.clip(np.float32(value), -largest, largest)
        if np.float32(f"{exact:.6e}") == exact:
            return T.float32(float(exact))
        return T.reinterpret("float32", T.uint32(int(exact.view(np.uint32))))

    def exp2(self, x: Any) -> Any:
        """2**x; 0 far below, as for any difference with LEAST."""
        return self.keep(T.exp2(x), "float32")

    def exp(self, x: Any) -> Any:
        """e**x, within 2 ulp and the rounding of x · log2(e): 1e-7 · |x| relative."""
        return self.exp2(x * self.number(LOG2E))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        if self.language == "amdgpu":
            return T.bind(T.call_llvm_intrin("float32", "llvm.fma", a, b, c))
        return T.bind(T.call_extern("float32", "fmaf" if self.language == "cuda" else "fma", a, b, c))

    def tanh(self, x: Any) -> Any:
        """tanh(x) within 2e-7, after Cephes' tanhf; no library's, which overflow under fast math."""
        f, keep = self.number, lambda value: self.keep(value, "float32")
        x = keep(x)
        size = keep(T.min(T.max(x, -x), f(10)))  # tanh(10) is 1 in float32
        big = keep(f(1) - f(2) / (self.exp(size * f(2)) + f(1)))
        z = keep(x * x)
        p: Any = f(-5.70498872745e-3)
        for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            p = p * z + f(coefficient)
        small = keep(p * z * x + x)
        return keep(T.Select(size < f(0.625), small, T.Select(x < f(0), -big, big)))

    def sin(self, x: Any) -> Any:
        return self._sine(x, 0)

    def cos(self, x: Any) -> Any:
        return self._sine(x, 1)

    def _sine(self, x: Any, quarters: int) -> Any:
        """sin(x + quarters · π/2) for |x| up to 2**22, within 2e-7 absolute.

        No language's own: AMD's instruction and Metal's fast functions reduce nothing. Cody and Waite's reduction with
        π/2 = a + b + c in float32 and k = round(x · 2/π): k · a and x are multiples of the last bit of a, and
        fma(k, -a, x), below 1, is exact; the two steps after it each round once, at 3e-8. Polynomials on ±π/4: Cephes'
        sinf and cosf.
        """
        f, keep = self.number, lambda value: self.keep(value, "float32")
        x = keep(x)
        k = self.keep(T.Cast("int32", T.floor(x * f(0.6366197723675814) + f(0.5))))
        r = x
        for part in (1.57079637050628662109375, -4.371138828673793e-8, -1.7151245100058819e-15):
            r = self.fma(T.Cast("float32", k), f(-part), r)
        r = keep(r)
        z = keep(r * r)
        s = keep(((f(-1.9515295891e-4) * z + f(8.3321608736e-3)) * z + f(-1.6666654611e-1)) * z * r + r)
        c = ((f(2.443315711809948e-5) * z + f(-1.388731625493765e-3)) * z + f(4.166664568298827e-2)) * z * z
        c = keep(c + z * f(-0.5) + f(1))
        quarter = self.keep(T.bitwise_and(k + quarters, T.int32(3)))
        value = keep(T.Select(T.bitwise_and(quarter, T.int32(1)) == 1, c, s))
        return keep(T.Select(quarter >= 2, -value, value))


def whole(width: int, dtype: str) -> int:
    """How many elements one access moves where rows of `width` elements follow one another: 16 bytes, or fewer.

    1 where not even 4 bytes fit in whole.
    """
    for count in (16 // BYTES[dtype], 8 // BYTES[dtype], 4 // BYTES[dtype]):
        if count and width % count == 0:
            return count
    return 1


def i32(value: Any) -> Any:
    return T.int32(value) if isinstance(value, int) else T.Cast("int32", value)


def dtype_of(value: Any) -> str:
    return str(value.ty.dtype)


def widen(value: Any) -> Any:
    """A float32, float16 or uint16 (the bits of bfloat16) value as float32."""
    if dtype_of(value) == "uint16":
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", value), T.uint32(16)))
    return value if dtype_of(value) == "float32" else T.Cast("float32", value)
