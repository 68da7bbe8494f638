"""What a cache in 8 bits costs and gives: quality of a model, and the time of decoding attention on this CPU.

python -m llmc.bench.kv_cache tests/data/tiny-python tests/data/tiny-python/heldout.txt --output bench/results/….md
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import llmc

CACHES = (None, "int8", "fp8")
LENGTH = 512  # tokens of a piece of text


def quality(source: str, text: str, tokens: int) -> list[str]:
    """A table: bytes of cache a token, perplexity over so many tokens, and how far the loss of a token moves."""
    rows, plain = [], np.zeros(0)
    with tempfile.TemporaryDirectory() as folder:
        for cache in CACHES:
            artifact = llmc.compile(source, output=Path(folder) / f"{cache}.llmc", kv_cache=cache)
            with llmc.load(artifact) as model:
                ids = model.tokenizer.encode(text)[:tokens]
                pieces = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
                loss = -np.concatenate(model.score(pieces))
                size = model.info.memory["cache_bytes_per_token"]
            plain = loss if cache is None else plain
            change = np.exp(loss.mean() - plain.mean()) - 1
            rows.append(
                f"| {cache or 'float32'} | {size} | {np.exp(loss.mean()):.4f} | {change:+.4%} | "
                f"{np.abs(loss - plain).mean():.4f} |"
            )
    return [
        f"Perplexity over {len(plain)} tokens, in pieces of {LENGTH}; change of a token's loss in nats.",
        "",
        "| cache | bytes a token | perplexity | against float32 | mean change of a token's loss |",
        "|---|---|---|---|---|",
        *rows,
    ]


def attention(context: int, heads: int, kv_heads: int, width: int, layers: int = 16, rounds: int = 15) -> list[str]:
    """A table: medians of attention of one token over the caches of so many layers, measured in turn."""
    calls = dict(kernels(context, heads, kv_heads, width, layers))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(found) for name, found in times.items()}
    first = next(iter(median.values()))
    return [
        f"Decoding attention at context {context}: {heads} heads over {kv_heads} of {width}, {layers} layers.",
        "",
        "| activations, cache | milliseconds | times float32's speed |",
        "|---|---|---|",
        *(f"| {name} | {seconds * 1e3:.2f} | {first / seconds:.2f} |" for name, seconds in median.items()),
    ]


def kernels(
    context: int, heads: int, kv_heads: int, width: int, layers: int
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(activations and cache, a call over random pages) for every kernel that is compared."""
    import ml_dtypes
    import tvm

    from llmc import targets
    from llmc.codegen.cpu.attention import paged_attention
    from llmc.ir.paging import page_tensors

    target, rng, page = targets.detect(), np.random.default_rng(0), 16
    pages = -(-context // page)
    table = ([0, 1], [0, pages], rng.permutation(pages) + 1, [(context - 1) % page + 1])
    arrays = [tvm.runtime.tensor(np.asarray(a, "int32")) for a in table]

    def noise(shape: list[int], dtype: str) -> tvm.runtime.Tensor:
        number = np.dtype(getattr(ml_dtypes, dtype, dtype))
        if number.kind in "iu":
            return tvm.runtime.tensor(rng.integers(0, 120, (pages + 1, *shape)).astype(number))
        return tvm.runtime.tensor(rng.random((pages + 1, *shape), "float32").astype(number))

    for dtype, cache in (("float32", ""), ("bfloat16", ""), ("float32", "int8"), ("float32", "fp8")):
        made = paged_attention(
            target, heads, kv_heads, width, width, dtype, page, True, width**-0.5, cache=cache, name="attend"
        )
        kernel = tvm.compile(tvm.IRModule({"attend": made}), tvm.target.Target(target.llvm()))["attend"]
        pools = [
            [
                noise(t["shape"], t["dtype"])
                for name in "kv"
                for t in page_tensors(name, kv_heads, width, page, name == "k", dtype, cache)
            ]
            for _ in range(layers)
        ]
        number = np.dtype(getattr(ml_dtypes, dtype, dtype))
        q, out = (tvm.runtime.tensor(np.ones((1, heads, width), number)) for _ in range(2))

        def call(kernel=kernel, pools=pools, q=q, out=out) -> None:
            for tensors in pools:
                kernel(q, *tensors, *arrays, out)

        call()
        yield f"{dtype}, {cache or dtype}", call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a model that llmc compiles")
    parser.add_argument("text", type=Path, help="what its perplexity is taken over")
    parser.add_argument("--tokens", type=int, default=30720)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 64), help="heads, key heads, columns of a head")
    parser.add_argument("--output", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    lines = ["# A cache in 8 bits", "", *quality(arguments.source, arguments.text.read_text(), arguments.tokens), ""]
    lines += attention(arguments.context, *arguments.heads)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
