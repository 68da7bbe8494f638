"""llmc on a card, against what the card can do and against transformers with torch.compile and a static cache.

    python -m llmc.bench.gpu llama-3.1-8b.llmc llama-3.1-8b-int4.llmc

An artifact is one that was compiled with weights="random" for the card; its shape is found by its name in
`llmc.bench.shapes` (what follows it, as a scheme of quantization, is no part of it), or given with --config. Artifacts
of one shape are compared with the first of them: what int4 is beside bfloat16. It needs the runtime, numpy, PyTorch and
transformers, and neither TVM's compiler nor a checkpoint: `make gpu-bundle` packs all but the last three. Each artifact
is a row in gpu-CARD-DATE.jsonl and a table in gpu-CARD-DATE.md. Exit code 2: there is no card, or the artifact does not
fit it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from llmc.bench import roof
from llmc.bench.gpu_engines import Baseline, LlmcOnCard
from llmc.bench.shapes import SHAPES
from llmc.runtime import artifact
from llmc.runtime.errors import ArtifactError

RESULTS = Path(__file__).parent / "results"
CONTEXT = 512
TASKS: dict[str, dict[str, int]] = {
    **{f"decode-{batch}": {"context": CONTEXT, "batch": batch, "steps": 32} for batch in (1, 8, 16, 32, 64, 128)},
    **{f"prefill-{tokens}": {"tokens": tokens} for tokens in (512, 4096)},
}
CHECKED = 64  # tokens whose logits are compared
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
# Relative error of one rounding, root mean square: of at most half a unit in the last place, evenly spread.
ROUNDING = {"float32": 2.0**-25, "bfloat16": 2.0**-9, "float16": 2.0**-12}

Found = dict[str, Any]

_engine: Any = None  # of a worker process


def _open(make: Callable, arguments: tuple) -> None:
    global _engine
    _engine = make(*arguments)


def _ask(name: str, arguments: dict) -> Any:
    return getattr(_engine, name)(**arguments)


@contextmanager
def worker(make: Callable, *arguments: Any) -> Iterator[Callable[..., Any]]:
    """An engine in a process of its own; what is yielded calls one of its functions there: ask(name, **arguments)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_open, make, arguments).result()
        yield lambda name, **given: pool.submit(_ask, name, given).result()


def run(ask: Callable[..., Any], tasks: Mapping[str, dict[str, int]], rounds: int) -> dict[str, Found]:
    """Each task's median over the rounds: {"seconds", "context"}, or {"error"} where the card has no room for it."""
    found: dict[str, Found] = {}
    for name, task in tasks.items():
        try:
            if "tokens" in task:
                times = [(ask("prefill", **task), 0.0) for _ in range(rounds)]
            else:
                times = [ask("steps", **task) for _ in range(rounds)]
        except BrokenProcessPool:
            raise
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        else:
            seconds, context = (float(statistics.median(values)) for values in zip(*times, strict=True))
            found[name] = {"seconds": seconds, "context": context}
        print(f"  {name:14} {found[name]}", file=sys.stderr, flush=True)
    return found


def tolerance(dtype: str, config: Mapping[str, Any]) -> float:
    """How far logits may be from exact ones, root mean square over theirs.

    A layer rounds its values about ten times (two norms, four products, rotation, attention, gate, two sums), and
    errors of roundings add up as their squares do; sums of `depth` products in float32 err by sqrt(depth) roundings
    more. Four times that is allowed.
    """
    depth = max(config["hidden_size"], config["intermediate_size"])
    each = ROUNDING[dtype] + ROUNDING["float32"] * math.sqrt(depth)
    return 4 * each * math.sqrt(10 * config["num_hidden_layers"])


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference, over the spread of the exact logits."""
    return float(np.sqrt(np.mean((found - exact) ** 2)) / exact.std())


def bench(
    path: Path,
    config: Mapping[str, Any],
    card: roof.Card,
    *,
    device: str,
    tasks: Mapping[str, dict[str, int]] = TASKS,
    compiled: bool = True,
    rounds: int = 3,
) -> Found:
    """Measure an artifact and the baseline on a card -> a row of results. Raises ArtifactError."""
    manifest = artifact.read(path)
    entry, dtype = artifact.choose_target(manifest, card.kind), manifest.model["dtype"]
    tokens = np.random.default_rng(0).integers(3, config["vocab_size"], CHECKED).tolist()
    print(f"{manifest.name} for {entry.target} on {card.name}: llmc", file=sys.stderr)
    with worker(LlmcOnCard, str(path), entry.target) as ask:
        mine, logits = run(ask, tasks, rounds), ask("logits", tokens=tokens)
    print(f"{manifest.name}: transformers", file=sys.stderr)
    with worker(Baseline, str(path), entry.target, dict(config), device, compiled) as ask:
        theirs, other = run(ask, tasks, rounds), ask("logits", tokens=tokens)
        exact, reference = other, f"transformers in {dtype}"
        try:
            exact, reference = ask("exact_logits", tokens=tokens), "transformers in float32"
        except RuntimeError as error:  # PyTorch's out of memory: float32 takes twice as much
            print(f"  no logits in float32: {error}"[:300], file=sys.stderr)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "artifact": manifest.name,
        "target": entry.target,
        "dtype": dtype,
        "weight_width": weight_width(path, manifest, entry, config),
        "card": asdict(card),
        "config": dict(config),
        "llmc": mine,
        "transformers": theirs,
        "logits": {
            "llmc": distance(logits, exact),
            "transformers": distance(other, exact),
            "allowed": tolerance(dtype, config),
            "reference": reference,
            "same_best_token": float(np.mean(logits.argmax(-1) == exact.argmax(-1))),
        },
    }


def weight_width(path: Path, manifest: artifact.Manifest, entry: Any, config: Mapping[str, Any]) -> float:
    """Bytes of an element of what a step's products read, scales and the few norms shared among them."""
    specs, costs = artifact.check(path, manifest, entry).specs, roof.LlamaCosts(config, 1)
    stored = sum(specs[name].bytes for name in entry.functions["step"].weights)
    return stored / (config["num_hidden_layers"] * costs.layer + costs.head)


def beside(rows: list[Found], tasks: Mapping[str, dict[str, int]]) -> str:
    """Artifacts of a shape against the first one of it: tokens a second, as ratios. Nothing where each has its own."""
    lines: list[str] = []
    for row in rows:
        first = next(other for other in rows if other["config"] == row["config"])
        if first is row:
            continue
        mine, theirs = shares(row, tasks), shares(first, tasks)
        lines += [f"{row['artifact']} beside {first['artifact']}, tokens a second:", ""]
        for name in tasks:
            one, other = mine[name]["llmc"], theirs[name]["llmc"]
            if one and other:
                lines.append(f"- {name}: {one['rate'] / other['rate']:.2f} ({one['share']:.0%} of its own roof)")
        lines.append("")
    return "\n".join(lines)


def shares(row: Found, tasks: Mapping[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Tokens a second and share of the roof of both engines, and their ratio, for each task."""
    costs = roof.LlamaCosts(row["config"], WIDTH[row["dtype"]], row.get("weight_width"))
    card = roof.Card(**row["card"])
    found: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        found[name] = {}
        for engine in ("llmc", "transformers"):
            measured = row[engine].get(name, {"error": "not measured"})
            if "error" in measured:
                found[name][engine] = None
                continue
            batch = task.get("batch", 1)
            tokens = task.get("tokens")
            cost = costs.prefill(tokens) if tokens else costs.decode(batch, measured["context"])
            rate = (tokens or batch) / measured["seconds"]
            found[name][engine] = {"rate": rate, "share": cost.seconds(card) / measured["seconds"]}
        ours, theirs = found[name]["llmc"], found[name]["transformers"]
        found[name]["ratio"] = ours["rate"] / theirs["rate"] if ours and theirs else None
    return found


def table(row: Found, tasks: Mapping[str, dict[str, int]] = TASKS) -> str:
    """A row for people."""
    card, logits = row["card"], row["logits"]
    good = "agree" if logits["llmc"] <= logits["allowed"] else "DO NOT AGREE"
    lines = [
        f"## {row['artifact']}, {row['target']}, {row['dtype']}, {row['date']}",
        "",
        f"{card['name']}: copies at {card['bandwidth'] / 1e9:.0f} GB/s (read and written), multiplies {card['dtype']} "
        f"matrices at {card['matmul'] / 1e12:.1f} TFLOP/s.",
        "",
        f"Logits {good} with {logits['reference']}: {logits['llmc']:.2g} of their spread off (transformers "
        f"{logits['transformers']:.2g}, allowed {logits['allowed']:.2g}); the same best token at "
        f"{logits['same_best_token']:.0%} of places.",
        "",
        "| task | llmc tokens/s | of the roof | transformers tokens/s | of the roof | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in shares(row, tasks).items():
        cells = [name]
        for engine in ("llmc", "transformers"):
            one = found[engine]
            cells += [f"{one['rate']:.1f}", f"{one['share']:.0%}"] if one else ["failed", ""]
        cells.append(f"{found['ratio']:.2f}" if found["ratio"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    for engine in ("llmc", "transformers"):
        lines += [f"\n{engine}, {t}: {f['error']}" for t, f in row[engine].items() if "error" in f]
    return "\n".join(lines)


def write(row: Found, folder: Path, tasks: Mapping[str, dict[str, int]] = TASKS) -> Path:
    """Append a row to gpu-CARD-DATE.jsonl and its table to gpu-CARD-DATE.md -> the latter."""
    card = re.sub(r"[^a-z0-9]+", "-", row["card"]["name"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{card}-{row['date']}"
    with open(f"{file}.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    with open(f"{file}.md", "a") as text:
        text.write(table(row, tasks) + "\n\n")
    return Path(f"{file}.md")


def config_of(path: Path, given: Path | None) -> Mapping[str, Any]:
    """The config of an artifact's model: a file, or that of the shape whose name the artifact has."""
    if given is not None:
        return json.loads(given.read_text())
    named = [shape for shape in SHAPES if path.stem == shape or path.stem.startswith(f"{shape}-")]
    if not named:
        raise ArtifactError(
            f"{path}: expected a name out of {', '.join(SHAPES)}; or give its config.json with --config"
        )
    return SHAPES[max(named, key=len)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, help="config.json of the model")
    parser.add_argument("--device", default="cuda", help="cuda (AMD's cards too), or cpu to try this out")
    parser.add_argument("--only", help="tasks, joined by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile the baseline")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args(arguments)
    tasks = {name: TASKS[name] for name in given.only.split(",")} if given.only else TASKS
    try:
        roof.kind(given.device)
        configs = [config_of(path, given.config) for path in given.artifact]
        dtype = artifact.read(given.artifact[0]).model["dtype"]
        small = {"copied": 1 << 26, "size": 512} if given.device == "cpu" else {}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # which gives the card's memory back
            card = pool.submit(roof.measure, given.device, dtype, **small).result()
        rows: list[Found] = []
        for path, config in zip(given.artifact, configs, strict=True):
            row = bench(
                path, config, card, device=given.device, tasks=tasks, compiled=not given.eager, rounds=given.rounds
            )
            rows.append(row)
            print(table(row, tasks), flush=True)
            file = write(row, given.out, tasks)
            print(file, file=sys.stderr)
        if compared := beside(rows, tasks):
            print(compared)
            with open(file, "a") as text:
                text.write(f"{compared}\n")
    except (roof.NoCard, ArtifactError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
