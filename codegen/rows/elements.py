"""Elements of values as expressions: what kernels for rows share, whatever machine loops over them.

What a token's numbers are never depends on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tvm
from tvm.tirx.script import builder as T

from . import values as V
from .program import Program
from .values import Affine, Apply, Memory, Scalar, Slot, Value

__all__ = ["Arithmetic", "Elements", "collapsed", "combine", "dtype_of", "factors", "gathers", "is_product", "wide"]


class Arithmetic(Protocol):
    """float32 numbers side by side, `lanes` of them, on some machine; f32, i32, u32: their dtypes."""

    lanes: int
    f32: str
    i32: str
    u32: str

    def dtype(self, element: str) -> str: ...
    def broadcast(self, scalar: Any) -> Any: ...
    def const(self, value: float) -> Any: ...
    def iconst(self, value: int) -> Any: ...
    def fma(self, a: Any, b: Any, c: Any) -> Any: ...
    def rint(self, x: Any) -> Any: ...
    def sqrt(self, x: Any) -> Any: ...
    def bits_to_f32(self, bits: Any) -> Any: ...
    def round_bf16(self, value: Any) -> Any: ...


_COMPARE = {
    "equal": lambda a, b: a == b,
    "not_equal": lambda a, b: a != b,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
}


class Elements:
    """Values of one token's program, `lanes` elements of their last axis at a time.

    A machine's emitter fills in: `buffers` (kind and number of a slot -> a flat buffer), `bases` (slot -> where the
    token's row begins; none: 0), `functions` (ops of float32 over an arithmetic), `calls` (ops that the machine calls
    for, a number at a time), arithmetic(lanes).
    """

    functions: dict[str, Callable[[Any, Any], Any]]
    calls: dict[str, Callable[..., Any]]

    def __init__(self, program: Program):
        self.program = program
        self.buffers: dict[tuple[str, int], Any] = {}
        self.bases: dict[Slot, Any] = {}

    def arithmetic(self, lanes: int) -> Arithmetic:
        raise NotImplementedError

    def constant(self, value: Any, dtype: str) -> Any:
        return tvm.tirx.const(value, dtype)

    # Addresses

    def at(self, v: Memory | Affine, indices: Sequence[Any]) -> Any:
        where = self.bases.get(v.slot, T.int64(0)) if isinstance(v, Memory) else T.int64(0)
        for i, s in zip(indices, v.strides, strict=True):
            if s:
                where = where + i * s
        return where + v.offset if v.offset else where

    def buffer(self, slot: Slot) -> Any:
        return self.buffers[slot.kind, slot.number]

    # Elements

    def read(self, v: Memory, indices: Sequence[Any], lanes: int) -> Any:
        """`lanes` elements along the last axis, widened to what is computed with."""
        vector, buffer = self.arithmetic(lanes), self.buffer(v.slot)
        at = self.at(v, indices)
        stride = v.strides[-1] if lanes > 1 else 0
        if stride == 0:
            vector = self.arithmetic(1)
            found = buffer[at]
        elif stride == 1:
            found = buffer.vload([at], vector.dtype(buffer.dtype))
        else:
            found = buffer[T.ramp(at, stride, lanes)]
        if buffer.dtype == "uint16" and v.slot.dtype == "bfloat16":
            found = vector.bits_to_f32(T.Cast(vector.i32, found))
        elif buffer.dtype == "float16":
            found = T.Cast(vector.f32, found)
        elif buffer.dtype == "bool":
            found = T.Cast(vector.i32, found)
        found = T.bind(found)
        return T.broadcast(found, lanes) if stride == 0 and lanes > 1 else found

    def value(self, v: Value, indices: Sequence[Any], lanes: int, memo: dict) -> Any:
        """`lanes` elements of a value along its last axis."""
        if v not in memo:
            memo[v] = self.fresh(v, indices, lanes, memo)
        return memo[v]

    def fresh(self, v: Value, indices: Sequence[Any], lanes: int, memo: dict) -> Any:
        vector = self.arithmetic(lanes)
        if isinstance(v, Memory):
            return self.read(v, indices, lanes)
        if isinstance(v, Scalar):
            return vector.broadcast(self.constant(int(v.value) if v.dtype == "bool" else v.value, wide(v.dtype)))
        if isinstance(v, Affine):
            at = self.at(v, indices)
            stride = v.strides[-1] if v.strides else 0
            found = at if lanes == 1 else T.ramp(at, stride, lanes) if stride else T.broadcast(at, lanes)
            return T.bind(T.Cast(vector.dtype(v.dtype), found))
        assert isinstance(v, Apply)
        if v.op in ("add", "subtract") and wide(v.dtype) == "float32" and any(map(is_product, v.args)):
            return self.product_and_term(v, indices, lanes, memo)
        args = [self.value(a, indices, lanes, memo) for a in v.args]
        return T.bind(self.apply(v, args, vector))

    def product_and_term(self, v: Apply, indices: Sequence[Any], lanes: int, memo: dict) -> Any:
        """x·y + z, x·y - z or z - x·y, rounded once.

        LLVM would round once too; but where z is a product itself it may round either of the two first, and takes
        another one in another copy of the code: a token's bits would depend on how many tokens there are.
        """
        first = is_product(v.args[0])
        product, term = v.args if first else reversed(v.args)
        x, y, z = (self.value(part, indices, lanes, memo) for part in (*factors(product), term))
        if v.op == "subtract":
            minus = self.arithmetic(lanes).broadcast(T.float32(-1))
            x, z = (x, T.bind(z * minus)) if first else (T.bind(x * minus), z)
        return self.arithmetic(lanes).fma(x, y, z)

    def write(self, to: Memory, indices: Sequence[Any], value: Any, lanes: int) -> None:
        vector, buffer = self.arithmetic(lanes), self.buffer(to.slot)
        if buffer.dtype == "uint16" and to.slot.dtype == "bfloat16":
            value = T.Cast(vector.dtype("uint16"), vector.round_bf16(value))
        elif buffer.dtype == "bool":
            value = value != 0
        elif dtype_of(value) != vector.dtype(buffer.dtype):
            value = T.Cast(vector.dtype(buffer.dtype), value)
        at = self.at(to, indices)
        if lanes == 1:
            T.buffer_store(buffer, value, [at])
        else:
            T.buffer_store(buffer, value, [T.ramp(at, to.strides[-1], lanes)])

    def apply(self, v: Apply, args: list, vector: Arithmetic) -> Any:
        """One elementwise op on vectors."""
        dtype, op = wide(v.dtype), v.op
        own = vector.dtype(dtype)

        def const(value: float, like: str = dtype) -> Any:
            return vector.broadcast(tvm.tirx.const(value, like))

        if op in self.functions and dtype == "float32":
            return self.functions[op](vector, args[0])
        if op in self.calls:
            return T.Cast(own, self.calls[op](*args))
        if op == "cast":
            if v.dtype == "bool" and v.args[0].dtype != "bool":
                return T.Select(args[0] != const(0, wide(v.args[0].dtype)), const(1), const(0))
            return args[0] if dtype_of(args[0]) == own else T.Cast(own, args[0])
        if op in _COMPARE:
            return T.Select(_COMPARE[op](*args), const(1), const(0))  # a cast of a vector of bool fails to simplify
        is_float = dtype.startswith("float")
        x = args[0]
        y = args[1] if len(args) > 1 else None
        if op in ("floor_divide", "mod", "floor_mod") and is_float:
            quotient = x / y
            floored = T.floor(quotient) if op != "mod" else T.trunc(quotient)
            return floored if op == "floor_divide" else x - floored * y
        simple = {
            "add": lambda: x + y,
            "subtract": lambda: x - y,
            "multiply": lambda: x * y,
            "divide": lambda: x / y if is_float else T.Cast(own, x) / T.Cast(own, y),
            "floor_divide": lambda: T.floordiv(x, y),
            "mod": lambda: T.truncmod(x, y),
            "floor_mod": lambda: T.floormod(x, y),
            "maximum": lambda: T.max(x, y),
            "minimum": lambda: T.min(x, y),
            "where": lambda: T.Select(x != const(0, "int32"), y, args[2]),
            "negative": lambda: const(0) - x if not is_float else x * const(-1),
            "abs": lambda: T.abs(x),
            "ceil": lambda: T.ceil(x),
            "floor": lambda: T.floor(x),
            "square": lambda: x * x,
            "sign": lambda: T.Select(x > const(0), const(1), T.Select(x < const(0), const(-1), const(0))),
            "nn.relu": lambda: T.max(x, const(0)),
            "logical_and": lambda: T.bitwise_and(x, y),
            "logical_or": lambda: T.bitwise_or(x, y),
            "logical_xor": lambda: T.bitwise_xor(x, y),
            "logical_not": lambda: T.bitwise_xor(x, const(1)),
            "bitwise_and": lambda: T.bitwise_and(x, y),
            "bitwise_or": lambda: T.bitwise_or(x, y),
            "bitwise_xor": lambda: T.bitwise_xor(x, y),
            "bitwise_not": lambda: T.bitwise_xor(x, const(1 if v.dtype == "bool" else -1)),
        }
        return simple[op]()


def dtype_of(x: Any) -> str:
    return str(x.ty.dtype)


def operands(statement: Any) -> Iterator[Value]:
    """The values that a statement reads."""
    for name in ("value", "index", "update"):
        v = getattr(statement, name, None)
        if v is not None:
            yield v


def gathers(statement: Any) -> Iterator[tuple[Slot, Memory]]:
    """Slots that the statement reads at another token's row, and where the number of that row stands."""
    for v in operands(statement):
        for leaf in V.leaves(v):
            if isinstance(leaf, Memory) and leaf.slot.index is not None:
                yield leaf.slot, leaf.slot.index


def is_product(v: Value) -> bool:
    return isinstance(v, Apply) and v.op in ("multiply", "square") and wide(v.dtype) == "float32"


def factors(product: Value) -> list[Value]:
    """The two that a product (see is_product) multiplies."""
    assert isinstance(product, Apply)
    return product.args if product.op == "multiply" else [product.args[0], product.args[0]]


def combine(op: str, a: Any, b: Any) -> Any:
    return {"sum": lambda: a + b, "prod": lambda: a * b, "max": lambda: T.max(a, b), "min": lambda: T.min(a, b)}[op]()


def wide(dtype: str) -> str:
    """What a value of this dtype is computed in; truth is 0 or 1."""
    return {"float16": "float32", "bfloat16": "float32", "bool": "int32"}.get(dtype, dtype)


def flat(program: Program, buffers: Sequence[Any]) -> dict[tuple[str, int], Any]:
    """Inputs and outputs as flat buffers, of the bits where they hold bfloat16; by a slot's kind and number."""
    found, count = {}, len(program.inputs)
    for i, buffer in enumerate(buffers):
        total = T.int64(1)
        for d in buffer.shape:
            total = total * d
        dtype = "uint16" if buffer.dtype == "bfloat16" else buffer.dtype
        slot = ("input", i) if i < count else ("output", i - count)
        found[slot] = T.decl_buffer((total,), dtype, data=buffer.data)
    return found


def collapsed(to: Memory, value: Value) -> tuple[Memory, Value]:
    """The same store with as few axes as it takes: axes of length 1 go, axes that lie together join."""
    shape = [d for d in to.shape if d != 1] or [1]
    to, value = V.reshape(to, shape), V.reshape(value, shape)
    strided = [to, *(leaf for leaf in V.leaves(value) if isinstance(leaf, (Memory, Affine)))]
    joined = [shape[-1]]
    for i in reversed(range(len(shape) - 1)):
        if all(s.strides[i] == s.strides[i + 1] * shape[i + 1] for s in strided):
            joined[0] *= shape[i]
        else:
            joined.insert(0, shape[i])
    return V.reshape(to, joined), V.reshape(value, joined)
