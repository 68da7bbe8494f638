"""Speed side by side: llmc, llama.cpp and transformers on one shape, one machine, one run.

    python -m llmc.bench.speed --work DIR                 # makes the models and artifacts in DIR, then measures
    python -m llmc.bench.speed --work DIR --rounds 5 --only decode-128,prefill-512

Every engine loads once in a process of its own; then rounds go through all tasks and engines in turn, so that what else
the machine does hits all of them alike. Medians over the rounds, ratios of medians, and the machine's read bandwidth
in the same rounds. Rows are appended to bench/results/speed.jsonl, and the table is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmc.bench.bandwidth import ReadProbe, cores

RESULTS = Path(__file__).parent / "results"
TASKS: dict[str, dict[str, Any]] = {
    "decode-128": {"do": "decode", "context": 128, "batch": 1, "steps": 12},
    "decode-2048": {"do": "decode", "context": 2048, "batch": 1, "steps": 8},
    "batch8-128": {"do": "decode", "context": 128, "batch": 8, "steps": 8},
    "prefill-512": {"do": "prefill", "tokens": 512},
}
# engine: the tasks that a claim compares it in
ENGINES = {
    "llmc-float32": tuple(TASKS),
    "llmc-bfloat16": ("prefill-512", "decode-128"),
    "llama.cpp": ("decode-128", "decode-2048", "batch8-128", "prefill-512"),
    "transformers-bfloat16": ("decode-128", "prefill-512"),
    "transformers-float32": ("prefill-512",),
}


@dataclass
class Worker:
    """An engine in its process."""

    process: subprocess.Popen[str]
    load_seconds: float

    @classmethod
    def start(cls, engine: str, path: Path) -> Worker:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmc.bench.engines", engine, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return cls(process, answer(process, engine)["load_seconds"])

    def measure(self, task: dict) -> dict:
        stdin = piped(self.process.stdin)
        stdin.write(json.dumps(task) + "\n")
        stdin.flush()
        return answer(self.process, str(task))

    def stop(self) -> None:
        piped(self.process.stdin).close()
        self.process.wait(60)


def piped(stream: IO[str] | None) -> IO[str]:
    """A stream of a process that was started with pipes."""
    assert stream is not None
    return stream


def answer(process: subprocess.Popen[str], what: str) -> dict:
    line = piped(process.stdout).readline()
    if not line:
        raise RuntimeError(f"{what}: the engine's process ended with exit code {process.wait()}")
    return json.loads(line)


def prepare(work: Path, shape: str, engines: list[str]) -> dict[str, Path]:
    """The models and artifacts that the engines read, made where they are missing."""
    import llmc
    from llmc.bench import gguf_writer, shapes

    folder = work / shape
    if not (folder / "config.json").exists():
        shapes.write(shape, folder)
    paths = {}
    for engine in engines:
        if engine.startswith("llmc-"):
            dtype = engine.removeprefix("llmc-")
            paths[engine] = work / f"{shape}-{dtype}.llmc"
            if not paths[engine].exists():
                llmc.compile(folder, dtype=dtype, max_context=4096, output=paths[engine], progress=True)
        elif engine == "llama.cpp":
            paths[engine] = work / f"{shape}-F16.gguf"
            if not paths[engine].exists():
                gguf_writer.write(folder, paths[engine])
        else:
            paths[engine] = folder
    return paths


def measure(paths: dict[str, Path], tasks: list[str], rounds: int) -> dict:
    """-> {"bandwidth": bytes a second, "seconds": {task: {engine: [a round's seconds, …]}}, "load": …, "peak": …}"""
    workers = {engine: Worker.start(engine, path) for engine, path in paths.items()}
    seconds: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}
    peak: dict[str, int] = {}
    probe, bandwidth = ReadProbe(), []
    try:
        for _ in range(rounds + 1):  # the first one warms up
            bandwidth.append(probe.median(1))
            for task in tasks:
                for engine, worker in workers.items():
                    if task in ENGINES[engine]:
                        found = worker.measure(TASKS[task])
                        seconds[task].setdefault(engine, []).append(found["seconds"])
                        peak[engine] = found["peak_bytes"]
                        print(f"{task:12} {engine:22} {found['seconds'] * 1e3:9.1f} ms", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "bandwidth": statistics.median(bandwidth[1:]),
        "seconds": {t: {e: s[1:] for e, s in by.items()} for t, by in seconds.items()},
        "load_seconds": {engine: worker.load_seconds for engine, worker in workers.items()},
        "peak_bytes": peak,
    }


def tokens(task: str) -> int:
    """Tokens that one measurement of a task makes."""
    return TASKS[task].get("tokens") or TASKS[task]["batch"]


def table(found: dict) -> str:
    """Tokens a second (median, and range over rounds), and the ratios to each engine of llmc computing in float32 and
    in bfloat16. An engine that names its dtype is compared with the same."""
    own = ("llmc-float32", "llmc-bfloat16")
    lines = ["| task | engine | tokens/s | range | float32 / engine | bfloat16 / engine |", "|---|---|---|---|---|---|"]
    for task, engines in found["seconds"].items():
        rate = {e: [tokens(task) / s for s in seconds] for e, seconds in engines.items()}
        for engine, rates in rate.items():
            median = statistics.median(rates)
            cells = []
            for mine in own:
                other_dtype = engine.startswith("transformers") and mine.split("-")[1] != engine.split("-")[1]
                shown = mine in rate and engine not in own and not other_dtype
                cells.append(f"{statistics.median(rate[mine]) / median:.2f}" if shown else "")
            ranged = f"{min(rates):.1f} to {max(rates):.1f}"
            lines.append(f"| {task} | {engine} | {median:.1f} | {ranged} | {' | '.join(cells)} |")
    lines.append("")
    lines.append(f"read bandwidth {found['bandwidth'] / 1e9:.1f} GB/s on {cores()} cores")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and artifacts")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="tasks, joined by commas")
    parser.add_argument("--engines", help="engines, joined by commas")
    arguments = parser.parse_args()
    tasks = arguments.only.split(",") if arguments.only else list(TASKS)
    engines = arguments.engines.split(",") if arguments.engines else list(ENGINES)
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = prepare(arguments.work, arguments.shape, engines)
    found = measure(paths, tasks, arguments.rounds)
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "shape": arguments.shape,
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        **found,
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "speed.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
