"""Sampling on the device: logits in, tokens out, so that a step brings back one number a row and not a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import GpuTarget

from ..cpu.vector import Params
from .machine import LOG2E, Machine, flat, i64, kernel, loop, when

__all__ = ["sample"]

THREADS = 256  # of a block; a block has a row
DIGIT = 4  # bits of a key that one pass over the row decides
DIGITS = 1 << DIGIT
NAN = -0x7FFFFFFF  # the key of a NaN: below all others (and an int in every language, which -(1 << 31) is not)
MINUS_INFINITY = -0x7F800001  # its key


def sample(target: GpuTarget, vocab: int, *, name: str = "sample") -> tvm.tirx.PrimFunc:
    """The tokens of rows of logits, as `llmc.runtime.sampler` chooses them without penalties.

    Arguments of the PrimFunc, in this order:
      logits [m, vocab] f32; temperature [m] f32: 0 takes the best token, of equal ones the lowest id; top_k [m] i32:
      keeps the k best and those equal to the k-th, 0 all; top_p [m] f32: keeps the fewest best whose probability
      reaches it and those equal to the last of them, 1 all; min_p [m] f32: keeps those with at least min_p times the
      best one's probability; uniforms [m] f32 in [0, 1): the share of the kept probability at which the token stands;
      tokens [m] i32: -1 where a logit is NaN or none is above -inf.
    A row's token depends on that row alone. Thresholds are found digit by digit of the logits' order, by sums over the
    row (a radix selection): nothing is sorted.
    """
    params: Params = [
        ("logits", ("m", vocab), "float32"), ("temperature", ("m",), "float32"), ("top_k", ("m",), "int32"),
        ("top_p", ("m",), "float32"), ("min_p", ("m",), "float32"), ("uniforms", ("m",), "float32"),
        ("tokens", ("m",), "int32")]  # fmt: skip

    def body(symbols: dict, logits: Any, *rest: Any) -> None:
        m = Machine(target)
        with when(symbols["m"] > 0), m.launch([symbols["m"]], THREADS) as [row]:
            _Row(m, flat(logits), vocab, row, *rest).emit()

    return kernel(name, params, body)


class _Row:
    def __init__(self, m, logits, vocab, row, temperature, top_k, top_p, min_p, uniforms, tokens):
        self.m, self.logits, self.vocab, self.row, self.tokens = m, logits, vocab, i64(row), tokens
        self.base = T.bind(self.row * vocab)
        self.top_k, self.top_p, self.min_p = (m.keep(b[self.row], str(b.dtype)) for b in (top_k, top_p, min_p))
        self.temperature, self.uniform = (m.keep(b[self.row], "float32") for b in (temperature, uniforms))
        warps = THREADS // m.warp
        self.words, self.numbers = m.shared(warps, "int32"), m.shared(warps)
        self.digits = m.shared(warps * DIGITS)
        self.sums = m.shared(THREADS)

    def emit(self) -> None:
        m = self.m
        self.find_best()
        with T.If(T.Or(self.best < 0, self.temperature == T.float32(0))):
            with T.Then(), when(m.thread == 0):
                T.buffer_store(self.tokens, self.best, [self.row])
            with T.Else():
                self.draw()

    # The row

    def over(self, each: Callable[[Any, Any], None]) -> None:
        """each(id, key) for this thread's share of the row: every THREADS-th logit."""
        with loop(self.vocab - self.m.thread, step=THREADS) as offset:
            at = T.bind(self.m.thread + offset)
            each(at, self.key(at))

    def key(self, at: Any) -> Any:
        """A logit's place in the order of floats, as a signed number; NaN where it is none."""
        word = self.m.keep(T.reinterpret("int32", self.logits[self.base + i64(at)]))
        nan = T.bitwise_and(word, T.int32(0x7FFFFFFF)) > T.int32(0x7F800000)
        return self.m.keep(T.Select(nan, T.int32(NAN), turned(word)))

    def logit(self, key: Any) -> Any:
        """The logit that a key stands for."""
        return self.m.keep(T.reinterpret("float32", turned(key)), "float32")

    def weight(self, key: Any) -> Any:
        """exp((logit - best) / temperature) of a key."""
        # -inf less a number is no number under fast math: the smallest finite logit has weight 0 as well.
        logit = T.max(self.logit(key), T.float32(-3e38))
        return self.m.exp2(T.max((logit - self.best_logit) * self.scale, T.float32(-1e30)))

    # The best token

    def find_best(self) -> None:
        """best_key: the highest key; best: the lowest id that has it, -1 where a logit is NaN or all are -inf."""
        m = self.m
        highest, lowest = m.registers(1, "int32"), m.registers(1, "int32")
        highest[0], lowest[0] = T.int32(NAN), T.int32(0x7FFFFFFF)

        def look(at: Any, key: Any) -> None:
            highest[0] = T.max(highest[0], key)
            lowest[0] = T.min(lowest[0], key)

        self.over(look)
        self.best_key = m.block_reduce(T.max, T.bind(highest[0]), self.words)
        m.barrier()
        bottom = m.block_reduce(T.min, T.bind(lowest[0]), self.words)
        m.barrier()
        first = m.registers(1, "int32")
        first[0] = T.int32(self.vocab)

        def equal(at: Any, key: Any) -> None:
            with when(key == self.best_key):
                first[0] = T.min(first[0], at)

        self.over(equal)
        found = m.block_reduce(T.min, T.bind(first[0]), self.words)
        m.barrier()
        fine = T.And(bottom > T.int32(NAN), self.best_key > T.int32(MINUS_INFINITY))
        self.best = m.keep(T.Select(fine, found, T.int32(-1)))

    # A draw

    def draw(self) -> None:
        m = self.m
        self.best_logit = self.logit(self.best_key)
        self.scale = m.keep(T.float32(LOG2E) / T.max(self.temperature, T.float32(1e-6)), "float32")
        least = m.registers(1, "int32")  # keys below it are not drawn
        least[0] = T.int32(MINUS_INFINITY)
        with when(T.And(self.top_k > 0, self.top_k < self.vocab)):
            wanted = m.keep(T.Cast("float32", self.top_k), "float32")  # exact up to 2**24 tokens
            least[0] = self.threshold(lambda key: T.float32(1), wanted, T.bind(least[0]))
        with when(self.top_p < T.float32(1)):
            floor = T.bind(least[0])
            wanted = m.keep(self.top_p * self.total(floor), "float32")
            least[0] = self.threshold(self.weight, wanted, floor)
        self.least = T.bind(least[0])
        self.choose()

    def kept(self, key: Any) -> Any:
        """A key's weight, 0 where it is not drawn."""
        weight = T.bind(self.weight(key))
        drawn = T.And(key >= self.least, weight >= self.min_p)
        return self.m.keep(T.Select(drawn, weight, T.float32(0)), "float32")

    def total(self, floor: Any) -> Any:
        """The weights of all keys from `floor` on, summed."""
        mine = self.m.registers(1)
        mine[0] = T.float32(0)

        def add(at: Any, key: Any) -> None:
            with when(key >= floor):
                mine[0] = mine[0] + self.weight(key)

        self.over(add)
        found = self.m.block_reduce(lambda a, b: a + b, T.bind(mine[0]), self.numbers)
        self.m.barrier()
        return found

    def threshold(self, measure: Callable[[Any], Any], wanted: Any, floor: Any) -> Any:
        """The highest key such that the keys from it on (and from `floor` on) measure `wanted` together, or `floor`.

        The highest digit of the keys is decided first: sums for each of its values, from the highest value down until
        they reach what is wanted; then the next digit, of the keys that begin so.
        """
        m = self.m
        prefix, above = m.registers(1, "int32"), m.registers(1)
        prefix[0], above[0] = T.int32(0), T.float32(0)
        sums = m.registers(DIGITS)
        with T.serial(0, 32 // DIGIT) as turn:
            shift = m.keep(32 - DIGIT - turn * DIGIT)
            sums.fill(0)
            begun = T.bind(prefix[0])
            # The first digit has the sign: turned, it is ordered as the others are.
            sign = m.keep(T.Select(turn == 0, T.int32(DIGITS // 2), T.int32(0)))

            def add(at: Any, key: Any) -> None:
                differs = m.keep(T.shift_right(T.shift_right(T.bitwise_xor(key, begun), shift), T.int32(DIGIT)))
                with when(T.And(key >= floor, T.Or(turn == 0, differs == 0))):
                    value = m.keep(measure(key), "float32")
                    digit = T.bitwise_and(T.shift_right(key, shift), T.int32(DIGITS - 1))
                    digit = m.keep(T.bitwise_xor(digit, sign))
                    for d in range(DIGITS):
                        sums[d] = sums[d] + T.Select(digit == d, value, T.float32(0))

            self.over(add)
            for d in range(DIGITS):
                warp_sum = m.warp_reduce(lambda a, b: a + b, T.bind(sums[d]))
                with when(m.lane == 0):
                    T.buffer_store(self.digits, warp_sum, [m.warp_number * DIGITS + d])
            m.barrier()
            chosen, decided, reached = m.registers(1, "int32"), m.registers(1, "int32"), m.registers(1)
            chosen[0], decided[0], reached[0] = T.int32(0), T.int32(0), T.bind(above[0])
            for d in reversed(range(DIGITS)):
                found = T.float32(0)
                for w in range(THREADS // m.warp):
                    found = found + self.digits[w * DIGITS + d]
                found = m.keep(found, "float32")
                with when(T.And(decided[0] == 0, found > T.float32(0))):
                    chosen[0] = T.int32(d)
                    above[0] = reached[0]
                    reached[0] = reached[0] + found
                    # Rounding may leave the sums below what is wanted: then the lowest digit there is stands.
                    with when(reached[0] >= wanted):
                        decided[0] = T.int32(1)
            prefix[0] = T.bitwise_or(prefix[0], T.shift_left(T.bitwise_xor(chosen[0], sign), shift))
            m.barrier()
        return T.bind(T.max(prefix[0], floor))

    def choose(self) -> None:
        """The token at the share `uniform` of the kept weights, which stand in the order of threads, then of ids."""
        m = self.m
        mine = m.registers(1)
        mine[0] = T.float32(0)

        def add(at: Any, key: Any) -> None:
            mine[0] = mine[0] + self.kept(key)

        self.over(add)
        T.buffer_store(self.sums, mine[0], [m.thread])
        m.barrier()
        before, own_start, last = m.registers(1), m.registers(1), m.registers(1, "int32")
        before[0], own_start[0], last[0] = T.float32(0), T.float32(0), T.int32(0)
        with T.serial(0, THREADS) as j:
            with when(j == m.thread):
                own_start[0] = before[0]
            found = m.keep(self.sums[j], "float32")
            with when(found > T.float32(0)):
                last[0] = j
            before[0] = before[0] + found
        aim = m.keep(self.uniform * before[0], "float32")
        inside = T.And(own_start[0] <= aim, aim < own_start[0] + mine[0])
        # A share that rounds up to all of the sum belongs to the last thread that has any.
        beyond = T.And(m.thread == last[0], aim >= before[0])
        with when(T.And(mine[0] > T.float32(0), T.Or(inside, beyond))):
            passed, token, done = m.registers(1), m.registers(1, "int32"), m.registers(1, "int32")
            passed[0], token[0], done[0] = own_start[0], T.int32(-1), T.int32(0)

            def walk(at: Any, key: Any) -> None:
                weight = T.bind(self.kept(key))
                with when(T.And(done[0] == 0, weight > T.float32(0))):
                    token[0] = at
                    passed[0] = passed[0] + weight
                    with when(passed[0] > aim):
                        done[0] = T.int32(1)

            self.over(walk)
            T.buffer_store(self.tokens, token[0], [self.row])


def turned(word: Any) -> Any:
    """A float's bits, int32, as a number of the same order, and back: of negative ones all bits but the sign flip."""
    return T.Select(word < 0, T.bitwise_xor(word, T.int32(0x7FFFFFFF)), word)
