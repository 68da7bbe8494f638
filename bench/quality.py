"""What every scheme costs in quality, on one model and one text.

    python -m llmc.bench.quality                        tests/data/tiny-python on its held-out text
    python -m llmc.bench.quality Qwen3-0.6B/ text.txt --schemes int8,int4,auto:4.5 --windows 8

The text is cut into windows; every fifth is for calibration and budgets, of the others `--windows` are measured. Rows
go to bench/results/quality-DATE.md. Of a Llama, llama.cpp's own files are measured beside (`--gguf ""`: none).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny-python"
SCHEMES = "int8,w8a8,fp8,int4,int4:head=int4,int4-g128,int4-g32-a8,nf4-g64,mxfp4,int3-g32,auto:4.5"
GGUF = "Q4_0,Q4_0:pure,Q8_0,Q4_K_M"
CALIBRATED = "int4,int4:head=int4,auto:4.5"


class Row(NamedTuple):
    """A scheme: bits a weight over all matrices that it quantizes, perplexity and divergence, seconds to encode."""

    scheme: str
    bits: float
    perplexity: float
    divergence: float
    agreement: float
    seconds: float


def table(
    source: Path,
    text: Path,
    schemes: list[str],
    calibrated: list[str],
    count: int,
    length: int = 512,
    gguf: Sequence[str] = (),
) -> tuple[list[Row], int]:
    """Rows, the first of which is the model as it is; and how many tokens they were measured on.

    gguf: formats of llama.cpp, see gguf_writer.quantize.
    """
    from llmc import quantization
    from llmc.bench import gguf_writer
    from llmc.frontend import huggingface
    from llmc.quality import samples
    from llmc.quality.evaluator import Evaluator
    from llmc.quality.measure import Variant, Window, compare
    from llmc.refinement import textbook

    imported = huggingface.load(source)
    tokens = samples.read_text(imported.files, str(text), text.read_text(encoding="utf-8"))
    length = min(length, imported.facts["max_context"])
    blocks = samples.spread(tokens, length, len(tokens.ids))
    kept, measured = blocks[4::5], [block for i, block in enumerate(blocks) if i % 5 != 4]
    chosen = [measured[i] for i in np.unique(np.linspace(0, len(measured) - 1, count).astype(int))]
    first = max(1, len(tokens.prefix))
    evaluator = Evaluator(textbook(imported), imported.weights, length)
    variants: dict[str, Any] = {}
    facts: dict[str, tuple[float, float]] = {}
    spent: dict[float, Any] = {}
    for name in [*schemes, *(f"{name} calibrated" for name in calibrated)]:
        start = time.perf_counter()
        plan = quantization.plan_of(quantization.prepare(imported, name.split()[0]))
        encoded = quality_of(evaluator, imported, plan, name, [Window(block, first) for block in kept], spent)
        facts[name] = bits_of(encoded), time.perf_counter() - start
        variants[name] = Variant(encoded)
        print(f"{name}: encoded in {facts[name][1]:.1f} s", flush=True)
    plan = quantization.plan_of(quantization.prepare(imported, "int8"))
    for kind in gguf:
        start = time.perf_counter()
        for name, weights in gguf_writer.quantized(source, kind, list(plan.schemes)).items():
            facts[name] = bits_of(weights), time.perf_counter() - start
            variants[name] = Variant(weights)
    scores = compare(evaluator, [Window(block, first) for block in chosen], variants)
    rows = [Row("as it is", 16.0, scores[""].perplexity, 0.0, 1.0, 0.0)]
    for name, (bits, seconds) in facts.items():
        score = scores[name]
        rows.append(Row(name, bits, score.perplexity, score.mean_divergence, score.agreement / score.tokens, seconds))
    return rows, scores[""].tokens


def quality_of(
    evaluator: Any, imported: Any, plan: Any, name: str, kept: list[Any], spent: dict[float, Any]
) -> dict[str, Any]:
    """The weights of a plan, encoded: with the kept windows if the name says so; a budget is spent on them, once."""
    from llmc import quantization
    from llmc.quality.budget import spend
    from llmc.quality.calibrate import calibrate
    from llmc.quality.encoded import Encoded

    schemes, budget = plan.schemes, quantization.parse(name.split()[0]).budget
    if budget is not None:
        if budget not in spent:
            spent[budget] = spend(evaluator, kept[:: max(1, len(kept) // 4)][:4], list(schemes), budget)
        schemes = spent[budget]
    if name.endswith(" calibrated"):
        return dict(calibrate(evaluator, [window.tokens for window in kept], schemes))
    found = {}
    for weight, scheme in schemes.items():
        rows = imported.weights[weight].read().astype(np.float32)
        rows = rows.swapaxes(-1, -2) if weight in plan.transposed else rows
        parts = scheme.encode(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]))
        parts = {part: array.reshape(*rows.shape[:-1], -1) for part, array in parts.items()}
        depth = rows.shape[-1]
        found[weight] = Encoded.of(
            scheme.format(depth), parts, activation=scheme.rounding(depth), turned=weight in plan.transposed
        )
    return found


def bits_of(encoded: dict[str, Any]) -> float:
    """Bits a weight over all that is quantized, scales included."""
    return sum(8 * w.nbytes for w in encoded.values()) / sum(math.prod(w.shape) for w in encoded.values())


def markdown(rows: list[Row], source: Path, text: Path, tokens: int, date: str) -> str:
    plain = rows[0].perplexity
    about = (
        f"{source.name}, {tokens} tokens of {text.name} in windows of 512 (`python -m llmc.bench.quality`). Bits a "
        "weight are over all weights that are quantized, embedding and head included, scales too; embedding and head "
        "are int8 where the scheme has fewer bits and head= does not say otherwise. The ratio is of perplexities, to "
        "the model with its own weights (float32 activations); KL is the mean divergence from that model, in nats; "
        "top is how often both find the same token likeliest. Calibrated weights are rounded to second order on other "
        "windows of the same text, every fifth; budgets (auto) are spent on four of these. llama.cpp's rows are the "
        "weights of its own files (in brackets: matrices by type), multiplied as they are, and (a8) with activations "
        "rounded to 8 bits in groups of 32 (K types: 256) as its CPU products round them; pure: embedding and head are "
        "Q4_0 too. From so many tokens a ratio is known to about ± √(2 KL / tokens)."
    )
    lines = [
        f"# Quality of quantized weights, {date}",
        "",
        about,
        "",
        "| scheme | bits a weight | perplexity | ratio | KL | top | encoded in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, seconds = row.perplexity / plain, f"{row.seconds:.1f} s" if row.seconds else ""
        lines.append(
            f"| {row.scheme} | {row.bits:.3f} | {row.perplexity:.3f} | {ratio:.4f} | {row.divergence:.5f} "
            f"| {row.agreement:.1%} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=TINY, help="a Hugging Face folder")
    parser.add_argument("text", nargs="?", type=Path, default=TINY / "heldout.txt", help="a text file")
    parser.add_argument("--schemes", default=SCHEMES, help="joined by commas")
    parser.add_argument("--calibrated", default=CALIBRATED, help="schemes to calibrate too, joined by commas")
    parser.add_argument("--gguf", default=GGUF, help="formats of llama.cpp, joined by commas; :pure: of all matrices")
    parser.add_argument("--windows", type=int, default=12, help="windows that are measured")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the table")
    given = parser.parse_args()
    asked = (given.schemes, given.calibrated, given.gguf)
    schemes, calibrated, gguf = (list(filter(None, names.split(","))) for names in asked)
    missing = [name for name in ("gguf", "llama_cpp") if gguf and importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"--gguf: expected the packages of llmc[peers], found no {missing[0]}; --gguf '' does without")
    rows, tokens = table(given.source, given.text, schemes, calibrated, given.windows, gguf=gguf)
    date = datetime.date.today().isoformat()
    page = markdown(rows, given.source, given.text, tokens, date)
    (given.output / f"quality-{date}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
