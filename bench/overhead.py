"""What a decode step costs outside the compiled functions: `python -m llmc.bench.overhead`.

The engine runs with an executor that computes nothing: scheduling, the arrays of the step, the best of 128,256 logits,
its text, and handing it to the caller are what is left, and what is timed. The tensors that a compiled step would be
handed are made and let go of, so binding them counts as well.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmc.runtime.artifact import Manifest, StateGroup, StateTensor, WeightsEntry
from llmc.runtime.engine import Engine
from llmc.runtime.executor import HostLogits
from llmc.runtime.model import Model

VOCAB = 128_256


class Nothing(HostLogits):
    """An executor whose functions do nothing but take their arguments."""

    def __init__(self, pages: int = 4096, groups: int = 1):
        import tvm_ffi

        self.groups = [
            StateGroup("paged", 16, 0, 0, (g,), (StateTensor("k", (16,), "float32"),)) for g in range(groups)
        ]
        self.pages = [pages] * groups
        self._tensor = tvm_ffi.from_dlpack
        self._logits = np.random.default_rng(0).standard_normal((32, VOCAB), np.float32) * 3
        self._logits[np.arange(32), np.arange(1000, 1032)] = 20  # tokens that any tokenizer has
        self.times: list[float] = []

    def embed(self, tokens):
        return self._tensor(tokens)

    def step(self, hidden, positions, qo_indptr, logit_rows, tables):
        for array in (positions, qo_indptr, logit_rows, *(a for table in tables for a in table)):
            self._tensor(array)
        self.times.append(time.perf_counter())
        return self._logits[: len(logit_rows)]

    def copy_pages(self, group, source, target):
        pass

    def close(self):
        pass


def measure(
    batch: int = 1, context: int = 128, steps: int = 2000, groups: int = 1, tokenizer=None, **sampling
) -> float:
    """Median seconds from one step's call to the next."""
    executor = Nothing(4096 + batch * (context + steps) // 16, groups)
    facts = {"vocab_size": VOCAB, "max_context": 1 << 20}
    manifest = Manifest("nothing", facts, (), WeightsEntry("", "", {}))
    with Model(manifest, Engine(executor), tokenizer) as model:
        prompts = [[i, *range(1, context)] for i in range(batch)]
        model.generate(prompts, max_tokens=steps, **sampling)
    gaps = np.diff(executor.times[-steps // 2 :])
    return statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json: include making text")
    options = parser.parse_args()
    tokenizer = None
    if options.tokenizer:
        from llmc.runtime.text import Tokenizer

        tokenizer = Tokenizer(options.tokenizer, ["tokenizer.json"])
    cases: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {}),
        ("greedy, context 2048", {"context": 2048}),
        ("greedy, 3 state groups", {"groups": 3}),
        ("greedy, batch 8", {"batch": 8}),
        ("temperature 0.8, top_k 50, top_p 0.9", {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 1}),
        ("temperature 1", {"temperature": 1.0, "seed": 1}),
        ("5 logprobs", {"logprobs": 5}),
    ]
    for name, case in cases:
        print(f"{name:40} {1e6 * measure(tokenizer=tokenizer, **case):7.1f} µs a step")


if __name__ == "__main__":
    main()
