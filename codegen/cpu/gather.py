"""Rows of a weight by number: the embedding of tokens."""

from collections.abc import Callable
from typing import Any

import tvm
from tvm.tirx.script import builder as T

from llmc.targets import CpuTarget

from .pack import panels
from .vector import Params, Vector, bits, choose, chunks, i64, kernel, loop

FEW = 4  # rows that one thread copies sooner than others wake


def take(
    target: CpuTarget,
    rows: int,
    depth: int,
    *,
    weight: str = "float32",
    out: str = "float32",
    packed: bool = False,
    ids: str = "int32",
    name: str = "take",
) -> tvm.tirx.PrimFunc:
    """y[i] = W[ids[i]] for a weight W [rows, depth], so that an embedding tied to the head is stored once.

    Arguments of the PrimFunc, in this order:
      w: [rows, depth] weight, or, if `packed`, as `pack.panels(target, rows, depth, weight)` has it;
      ids [n] of dtype `ids`, each in 0 … rows-1; y [n, depth] out. n may be 0.
    weight: "float32", "float16" or "bfloat16"; out: "float32" or "bfloat16" (rounded to nearest even).
    """
    layout = panels(target, rows, depth, weight)
    shape = layout.shape if packed else (rows, depth)
    params: Params = [("w", shape, weight), ("ids", ("n",), ids), ("y", ("n", depth), out)]
    one = Vector(1)

    def body(symbols: dict, w: Any, ids: Any, y: Any) -> None:
        w, y = bits(w), bits(y)

        def from_panels(i: Any) -> None:
            row = T.bind(i64(ids[i]))
            panel, at = T.bind(row // layout.width), T.bind(row % layout.width)
            where = [panel, None, at // layout.lanes, at % layout.lanes]

            def put(step: Any, half: int) -> None:
                indices = [step if a is None else a for a in where] + ([T.int64(half)] if layout.pair == 2 else [])
                one.store(y, one.load(w, indices), [i, step * layout.pair + half])

            with loop(0, depth // layout.pair) as step:
                for half in range(layout.pair):
                    put(step, half)
            if depth % layout.pair:
                put(T.int64(depth // layout.pair), 0)

        def from_rows(i: Any) -> None:
            row = T.bind(i64(ids[i]))
            with loop(0, depth // target.lanes) as c:
                v = Vector(target.lanes)
                v.store(y, v.load(w, [row, c * target.lanes]), [i, c * target.lanes])
            for offset, width in chunks(depth, target.lanes):
                if width < target.lanes:
                    v = Vector(width)
                    v.store(y, v.load(w, [row, T.int64(offset)]), [i, T.int64(offset)])

        each_row(symbols["n"], from_panels if packed else from_rows)

    return kernel(name, params, body, target)


def each_row(n: Any, copy: Callable[[Any], None]) -> None:
    """Emit copy(i) for i in 0 … n-1, on all threads where there are many."""

    def serial() -> None:
        with loop(0, n) as i:
            copy(i)

    def parallel() -> None:
        with T.parallel(T.int64(0), n) as i:
            copy(i)

    choose([(n <= FEW, serial)], parallel)
