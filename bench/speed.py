"""Speed side by side: llmc, llama.cpp, transformers and others on one shape, one machine, one run.

    python -m llmc.bench.speed --work DIR                 # makes the models and artifacts in DIR, then measures
    python -m llmc.bench.speed --work DIR --rounds 5 --only decode-128,prefill-512
    python -m llmc.bench.speed --work DIR --quantized     # schemes of 4 and 8 bits, and the same of others
    python -m llmc.bench.speed --work DIR --quantized --cpu-time     # on a machine that is not quiet

Every engine loads once in a process of its own; then rounds go through all tasks and engines in turn, so that what else
the machine does hits all of them alike. Medians over the rounds, ratios of medians, and the machine's read bandwidth
in the same rounds. Rows are appended to bench/results/speed.jsonl, and the table is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
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
DTYPE = "float32"  # what llmc computes in over quantized weights, the products apart
# Engines over quantized weights. llmc-SCHEME: an artifact of that scheme; an engine that is not installed is left out.
_ALL = tuple(TASKS)
_SHORT = ("decode-128", "batch8-128", "prefill-512")
QUANTIZED = {
    "llmc-int4": _ALL,
    "llmc-int4:head=int4": _SHORT,
    "llmc-int4-g32-a8": _SHORT,
    "llmc-int8": _ALL,
    "llmc-w8a8": _SHORT,
    "llama.cpp-Q4_0": _ALL,
    "llama.cpp-Q4_0:pure": _SHORT,
    "llama.cpp-Q8_0": _ALL,
    "ctranslate2-int8": _SHORT,
    "onnxruntime-genai-int4": _SHORT,
}
_MODULES = {"ctranslate2": "ctranslate2", "onnxruntime-genai": "onnxruntime_genai", "llama.cpp": "llama_cpp"}


def tasks_of(engine: str) -> tuple[str, ...]:
    """The tasks that an engine is measured in."""
    return ENGINES.get(engine) or QUANTIZED.get(engine, _SHORT)


def installed(engine: str) -> bool:
    """Whether the package that an engine needs is there."""
    return all(importlib.util.find_spec(m) for name, m in _MODULES.items() if engine.startswith(name))


@dataclass
class Worker:
    """An engine in its process."""

    process: subprocess.Popen[str]
    load_seconds: float

    @classmethod
    def start(cls, engine: str, path: Path, cpu_time: bool = False) -> Worker:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmc.bench.engines", engine, str(path), *(["--cpu-time"] if cpu_time else [])],
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
        kind = engine.partition("-")[2]
        if engine.startswith("llmc-"):
            dtype, scheme = (kind, None) if engine in ENGINES else (DTYPE, kind)
            paths[engine] = work / f"{shape}-{kind.replace(':', '-')}.llmc"
            if not paths[engine].exists():
                made = {"dtype": dtype, "quantize": scheme, "max_context": 4096}
                llmc.compile(folder, output=paths[engine], progress=True, **made)
        elif engine.startswith("llama.cpp"):
            whole = work / f"{shape}-F16.gguf"
            if not whole.exists():
                gguf_writer.write(folder, whole)
            paths[engine] = work / f"{shape}-{kind.replace(':', '-')}.gguf" if kind else whole
            if not paths[engine].exists():
                gguf_writer.quantize(whole, kind, paths[engine], cores())
        elif engine.startswith("ctranslate2"):
            paths[engine] = work / f"{shape}-{engine}"
            if not paths[engine].exists():
                _run("ctranslate2.converters.transformers", "--model", folder, "--output_dir", paths[engine],
                     "--quantization", kind, "--low_cpu_mem_usage")  # fmt: skip
        elif engine.startswith("onnxruntime-genai"):
            paths[engine] = work / f"{shape}-{engine}"
            if not paths[engine].exists():
                _run("onnxruntime_genai.models.builder", "-m", folder, "-o", paths[engine], "-p", "int4", "-e", "cpu",
                     "-c", work / "onnxruntime-genai-cache")  # fmt: skip
        else:
            paths[engine] = folder
    return paths


def _run(module: str, *arguments: Any) -> None:
    """A Python module as a command, in a process of its own."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def weight_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk."""
    if path.is_file():
        return path.stat().st_size
    files = [f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".onnx", ".data")]
    return sum(f.stat().st_size for f in files)


def measure(paths: dict[str, Path], tasks: list[str], rounds: int, cpu_time: bool = False) -> dict:
    """-> {"bandwidth": bytes a second, "seconds": {task: {engine: [a round's seconds, …]}}, "load": …, "peak": …}"""
    workers = {engine: Worker.start(engine, path, cpu_time) for engine, path in paths.items()}
    seconds: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}
    peak: dict[str, int] = {}
    probe, bandwidth = ReadProbe(), []
    try:
        for _ in range(rounds + 1):  # the first one warms up
            bandwidth.append(probe.median(1))
            for task in tasks:
                for engine, worker in workers.items():
                    if task in tasks_of(engine):
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
        "weight_bytes": {engine: weight_bytes(path) for engine, path in paths.items()},
    }


def tokens(task: str) -> int:
    """Tokens that one measurement of a task makes."""
    return TASKS[task].get("tokens") or TASKS[task]["batch"]


def table(found: dict) -> str:
    """Tokens a second (median, and range over rounds), and how many times those of each other engine every engine of
    llmc makes. Engines that name the dtype they compute in are compared with the same.
    """
    own = list(dict.fromkeys(e for by in found["seconds"].values() for e in by if e.startswith("llmc-")))
    columns = " | ".join(e.removeprefix("llmc-") + " / engine" for e in own)
    lines = [f"| task | engine | tokens/s | range | {columns} |", "|---|---|---|---|" + "---|" * len(own)]
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
    if "weight_bytes" in found:
        sizes = ", ".join(f"{engine} {size / 1e6:.0f}" for engine, size in found["weight_bytes"].items())
        lines.append(f"weights on disk, MB: {sizes}")
    lines.append(f"read bandwidth {found['bandwidth'] / 1e9:.1f} GB/s on {cores()} cores")
    if found.get("cpu_time_of_one_core"):
        lines.append(f"tokens a second of one core's computing time, at a load average of {found['load_average']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and artifacts")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="tasks, joined by commas")
    parser.add_argument("--engines", help="engines, joined by commas")
    parser.add_argument("--quantized", action="store_true", help="engines over quantized weights")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of one core, for a machine that is not quiet")
    arguments = parser.parse_args()
    tasks = arguments.only.split(",") if arguments.only else list(TASKS)
    engines = arguments.engines.split(",") if arguments.engines else list(QUANTIZED if arguments.quantized else ENGINES)
    engines = [engine for engine in engines if installed(engine)]
    arguments.work.mkdir(parents=True, exist_ok=True)
    paths = prepare(arguments.work, arguments.shape, engines)
    found = measure(paths, tasks, arguments.rounds, arguments.cpu_time)
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "shape": arguments.shape,
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "cpu_time_of_one_core": arguments.cpu_time,
        **found,
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "speed.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(table(row))


if __name__ == "__main__":
    main()
