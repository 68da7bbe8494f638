"""Vectors, registers, shared-out work: what every CPU kernel template is made of.

Templates are Python that runs while `tvm.script.ir_builder` records: Python loops unroll, `T.*` emits. Nothing here is
fast-math: sums are explicit chains of fused multiply-adds, so that the same chain gives the same bits wherever it is.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

_DRAW = """
define linkonce_odr i32 @llmc_draw(ptr %counter) alwaysinline {
  %ticket = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %ticket
}
"""
# TVM's legalisation rewrites bfloat16 vectors before code generation, so an intrinsic that takes <32 x bfloat> can't be
# called directly: an inlined LLVM function takes the bits as i32.
_DOT_BF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @llmc_dot_bf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""

# Stretches of shared-out work, and int32 from one counter to the next: a line of the cache has one (and the buffer is
# small enough for the stack, see `variable`).
_STRETCHES, _LINE = 16, 16

Symbols = dict[str, Any]
Params = Sequence[tuple[str, Sequence[int | str], str]]  # of a kernel: name, shape, dtype


def i64(value: Any) -> Any:
    """An index: 64 bits wide, for buffers of more than 2**31 elements."""
    return T.int64(value) if isinstance(value, int) else T.Cast("int64", value)


def kernel(
    name: str,
    params: Params,
    body: Callable[..., None],
    target: CpuTarget,
    llvm_text: str = "",
) -> tvm.tirx.PrimFunc:
    """A PrimFunc named `name` with buffers `params` (name, shape, dtype); a str in a shape is a symbolic dimension.

    `body(symbols, *buffers)` emits it. Buffers don't overlap. The function is scheduled: no pass touches its loops.
    """
    text = _DRAW + (_DOT_BF16 if target.has_bf16_dot else "") + llvm_text
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        symbols: Symbols = {}
        for _, shape, _ in params:
            for size in shape:
                if isinstance(size, str) and size not in symbols:
                    symbols[size] = T.int64()
        buffers = [
            T.arg(p, T.buffer(tuple(symbols[s] if isinstance(s, str) else T.int64(s) for s in shape), dtype))
            for p, shape, dtype in params
        ]
        with T.attr(tvm.tirx.const(0, "int32"), "pragma_import_llvm", text):
            body(symbols, *buffers)
    return builder.get()


@contextmanager
def when(condition: Any):
    """Emit the block where the condition holds."""
    with T.If(condition), T.Then():
        yield


def choose(cases: Sequence[tuple[Any, Callable[[], None]]], otherwise: Callable[[], None]) -> None:
    """Emit if, else if, …, else."""
    if not cases:
        return otherwise()
    condition, then = cases[0]
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            choose(cases[1:], otherwise)
    return None


def variable(dtype: str, value: Any) -> Any:
    """A scalar that can be assigned: v[0]."""
    v = T.alloc_buffer((1,), dtype)  # on the stack, as are all up to 1024 bytes; of scope "local", none would be
    T.buffer_store(v, value, [0])
    return v


def opaque(value: Any, dtype: str = "int64") -> Any:
    """A bound scalar that TVM's simplifier can't see through, but LLVM can.

    What the simplifier sees through, it expands at every use: nested minima and maxima then cost seconds.
    """
    return T.bind(variable(dtype, value)[0])


@contextmanager
def loop(start: Any, stop: Any):
    """for i in [start, stop), i64."""
    if isinstance(start, int) and isinstance(stop, int):
        with T.serial(T.int64(start), T.int64(stop)) as i:
            yield i
    elif isinstance(start, int) and start == 0:
        with T.serial(T.int64(0), opaque(i64(stop))) as i:
            yield i
    else:
        first = opaque(i64(start))
        with T.serial(T.int64(0), opaque(i64(stop) - first)) as i:
            yield T.bind(first + i)


def share_out(items: Any, work: Callable[[Any, Any], None], setup: Callable[[], Any] = lambda: None) -> None:
    """Call work(item, state) for items 0 … items-1 on the threads of the pool.

    Every thread has a stretch of items and draws from its counter, the next item each time: what lies together is read
    in one stream, which prefetchers follow, and whose end they overrun only once. Then it draws from the others'
    counters: a core that something else slows down does not set the pace. `setup` runs once a thread and gives the
    state: its scratch buffers.
    """
    counters = T.alloc_buffer((_STRETCHES * _LINE,), "int32")
    with loop(0, _STRETCHES) as s:
        T.buffer_store(counters, T.int32(0), [s * _LINE])
    count = T.bind(i64(items))
    threads = opaque(T.min(T.Cast("int64", T.call_packed("runtime.NumThreads")), count))
    stretches = opaque(T.max(T.min(threads, T.int64(_STRETCHES)), T.int64(1)))
    with T.parallel(T.int64(0), T.max(threads, T.int64(0))) as thread:
        state = setup()
        with loop(0, stretches) as turn:
            s = opaque(T.floormod(thread + turn, stretches))
            first = opaque(T.floordiv(count * s, stretches))
            end = opaque(T.floordiv(count * (s + 1), stretches))

            def draw(s: Any = s, first: Any = first) -> Any:
                drawn = T.call_extern("int32", "llmc_draw", T.address_of(counters[s * _LINE]))
                return first + T.Cast("int64", drawn)

            item = variable("int64", draw())
            with T.While(item[0] < end):
                work(T.bind(item[0]), state)
                T.buffer_store(item, draw(), [0])


def prefetch(buffer: Any, indices: Sequence[Any]) -> None:
    """Ask for the cache line of an element, to be read soon."""
    at = T.address_of(buffer[tuple(indices)])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", at, T.int32(0), T.int32(3), T.int32(1)))


def scratch(shape: Sequence[Any], dtype: str = "float32") -> Any:
    """A buffer of the thread that runs this; sizes may be symbolic, in the kernel's own symbols only."""
    return T.alloc_buffer(tuple(i64(s) for s in shape), dtype)


class Vector:
    """float32 vectors of so many lanes (1: scalars), and int32 vectors beside them."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.f32, self.i32, self.u32 = (self.dtype(d) for d in ("float32", "int32", "uint32"))

    def dtype(self, element: str) -> str:
        return element if self.lanes == 1 else f"{element}x{self.lanes}"

    def broadcast(self, scalar: Any) -> Any:
        return scalar if self.lanes == 1 else T.broadcast(scalar, self.lanes)

    def const(self, value: float) -> Any:
        return self.broadcast(T.float32(value))

    def iconst(self, value: int) -> Any:
        return self.broadcast(T.int32(value))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once.

        Not marked pure: TVM's simplifier expands pure bound values where they are used, exponentially in a polynomial.
        """
        return T.bind(T.call_llvm_intrin(self.f32, "llvm.fma", a, b, c))

    def rint(self, x: Any) -> Any:
        """The nearest whole number, ties to even."""
        return T.call_llvm_pure_intrin(self.f32, "llvm.rint", x)

    def sqrt(self, x: Any) -> Any:
        return T.call_llvm_pure_intrin(self.f32, "llvm.sqrt", x)

    def dot_bf16(self, a: Any, b: Any, c: Any) -> Any:
        """c + a.lo * b.lo + a.hi * b.hi: a and b are int32 lanes, each two bfloat16."""
        return T.bind(T.call_extern(self.f32, "llmc_dot_bf16", c, a, b))

    def bits_to_f32(self, bits: Any) -> Any:
        """float32 of bfloat16 bits in the low halves of int32 lanes."""
        return T.reinterpret(self.f32, T.shift_left(bits, self.iconst(16)))

    def low_bf16(self, pairs: Any) -> Any:
        return self.bits_to_f32(pairs)

    def high_bf16(self, pairs: Any) -> Any:
        return T.reinterpret(self.f32, T.bitwise_and(pairs, self.iconst(-65536)))

    def load(self, buffer: Any, indices: Sequence[Any]) -> Any:
        """A float32 vector from consecutive elements of float32, float16, or uint16 (the bits of bfloat16)."""
        if buffer.dtype == "uint16":
            return T.bind(self.bits_to_f32(T.Cast(self.i32, buffer.vload(indices, self.dtype("uint16")))))
        if buffer.dtype == "float16":
            return T.bind(T.Cast(self.f32, buffer.vload(indices, self.dtype("float16"))))
        return T.bind(buffer.vload(indices, self.f32))

    def store(self, buffer: Any, value: Any, indices: Sequence[Any]) -> None:
        """Write a float32 vector to float32 or, rounded to nearest even, to uint16 (the bits of bfloat16)."""
        if buffer.dtype == "uint16":
            value = T.Cast(self.dtype("uint16"), self.round_bf16(value))
        self.write(buffer, value, indices)

    def write(self, buffer: Any, value: Any, indices: Sequence[Any]) -> None:
        """Write lanes of a buffer's own dtype."""
        *outer, last = indices
        T.buffer_store(buffer, value, [*outer, last if self.lanes == 1 else T.ramp(last, 1, self.lanes)])

    def round_bf16(self, value: Any) -> Any:
        """The bits of the nearest bfloat16 (ties to even; a NaN stays one) in uint32 lanes."""
        bits = T.bind(T.reinterpret(self.u32, value))
        u = lambda c: self.broadcast(T.uint32(c))  # noqa: E731
        even = T.bitwise_and(T.shift_right(bits, u(16)), u(1))
        rounded = T.shift_right(bits + even + u(0x7FFF), u(16))
        return T.Select(value == value, rounded, u(0x7FC0))

    def register(self, value: Any = None, dtype: str = "float32") -> "Register":
        return Register(self, value, dtype)

    def keep(self, value: Any) -> Any:
        """A bound vector that TVM's simplifier can't see through (see `opaque`)."""
        return T.bind(self.register(value).get())

    def ramp(self, start: Any) -> Any:
        """start, start + 1, … in int32 lanes."""
        start = T.Cast("int32", start)
        return start if self.lanes == 1 else T.ramp(start, 1, self.lanes)

    def maximum_of_lanes(self, value: Any) -> Any:
        return value if self.lanes == 1 else T.bind(T.call_llvm_intrin("float32", "llvm.vector.reduce.fmax", value))

    def largest_lane(self, value: Any) -> Any:
        """Of int32 lanes."""
        return value if self.lanes == 1 else T.bind(T.call_llvm_intrin("int32", "llvm.vector.reduce.smax", value))

    def sum_of_lanes(self, value: Any) -> Any:
        """In the order of the lanes."""
        if self.lanes == 1:
            return value
        return T.bind(T.call_llvm_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), value))

    def exp(self, x: Any) -> Any:
        """e**x within 2 ulp for x <= 88 and 0 below -87.3; reduction and polynomial after Cephes' expf."""
        c = self.const
        x = self.keep(x)
        clamped = T.bind(T.min(T.max(x, c(-87.3)), c(88.0)))
        i = T.bind(T.call_llvm_intrin(self.f32, "llvm.rint", clamped * c(1.44269504088896341)))
        r = self.fma(i, c(-0.693359375), clamped)
        r = self.fma(i, c(2.12194440e-4), r)
        p = c(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, c(coefficient))
        p = self.fma(p, r * r, r)
        scale = T.reinterpret(self.f32, T.shift_left(T.Cast(self.i32, i) + self.iconst(127), self.iconst(23)))
        return T.bind(T.Select(x < c(-87.3), c(0.0), self.fma(p, scale, scale)))

    def tanh(self, x: Any) -> Any:
        """tanh(x) within a few ulp, after Cephes' tanhf."""
        c = self.const
        x = self.keep(x)
        big = T.bind(c(1.0) - c(2.0) / (self.exp(T.abs(x) * c(2.0)) + c(1.0)))
        big = T.bind(T.Select(x < c(0.0), c(0.0) - big, big))
        z = T.bind(x * x)
        p = c(-5.70498872745e-3)
        for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            p = self.fma(p, z, c(coefficient))
        return T.bind(T.Select(T.abs(x) < c(0.625), self.fma(p * z, x, x), big))

    def silu(self, x: Any) -> Any:
        return T.bind(x / (self.const(1.0) + self.exp(self.const(0.0) - x)))

    def gelu_tanh(self, x: Any) -> Any:
        c = self.const
        inner = T.bind(x * self.fma(x * x, c(0.7978845608 * 0.044715), c(0.7978845608)))
        return T.bind(x * c(0.5) * (c(1.0) + self.tanh(inner)))


class Register:
    """A vector that can be assigned: a small local buffer, which LLVM keeps in a vector register."""

    def __init__(self, vector: Vector, value: Any = None, dtype: str = "float32"):
        self.vector, self.dtype = vector, vector.dtype(dtype)
        self.buffer = T.alloc_buffer((vector.lanes,), dtype)
        if value is not None:
            self.set(value)

    def get(self) -> Any:
        return self.buffer.vload([0], self.dtype)

    def set(self, value: Any) -> None:
        self.vector.write(self.buffer, value, [0])


def bits(buffer: Any) -> Any:
    """The buffer itself, or its bits as uint16 where it holds bfloat16."""
    if buffer.dtype != "bfloat16":
        return buffer
    return T.decl_buffer(tuple(buffer.shape), "uint16", data=buffer.data)


def chunks(size: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, width) that cover `size` elements with vectors of `lanes`, then of ever smaller powers of two."""
    found, offset, width = [], 0, lanes
    while offset < size:
        while width > size - offset:
            width //= 2
        found.append((offset, width))
        offset += width
    return found


def transpose_text(lanes: int) -> str:
    """LLVM text of llmc_transpose_{lanes}(source, destination, stride): a square of floats, its rows made columns.

    The source's rows lie together, the destination's `stride` bytes apart. A row is interleaved with the row half the
    square below it, log2(lanes) times over: perfect shuffles, each one or two instructions.
    """
    if lanes == 1:
        return ""
    vector = f"<{lanes} x float>"
    lines = [f"define linkonce_odr void @llmc_transpose_{lanes}(ptr %s, ptr %d, i64 %stride) alwaysinline {{"]
    names = []
    for i in range(lanes):
        lines.append(f"  %p{i} = getelementptr i8, ptr %s, i64 {i * lanes * 4}")
        lines.append(f"  %r{i} = load {vector}, ptr %p{i}, align 4")
        names.append(f"%r{i}")
    low = [i // 2 + lanes * (i % 2) for i in range(lanes)]
    for stage in range(lanes.bit_length() - 1):
        new: list[str] = []
        for i in range(lanes // 2):
            for half in (0, lanes // 2):
                mask = ", ".join(f"i32 {j + half}" for j in low)
                name = f"%t{stage}_{len(new)}"
                a, b = names[i], names[i + lanes // 2]
                lines.append(f"  {name} = shufflevector {vector} {a}, {vector} {b}, <{lanes} x i32> <{mask}>")
                new.append(name)
        names = new
    for i in range(lanes):
        lines.append(f"  %o{i} = mul i64 %stride, {i}")
        lines.append(f"  %q{i} = getelementptr i8, ptr %d, i64 %o{i}")
        lines.append(f"  store {vector} {names[i]}, ptr %q{i}, align 4")
    return "\n".join([*lines, "  ret void", "}", ""])
