"""What every scheme costs in quality, on one model and one text.

    python -m llmc.bench.quality                        tests/data/tiny-python on its held-out text
    python -m llmc.bench.quality Qwen3-0.6B/ text.txt --schemes int8,int4,auto:4.5 --windows 8

    python -m llmc.bench.quality --calibrate other.txt  calibrated on another text
    python -m llmc.bench.quality --outliers             on the same model with outliers among its activations

The text is cut into windows; every fifth is for calibration and budgets, of the others `--windows` are measured. Rows
go to bench/results/quality-DATE.md. Of a Llama, llama.cpp's own files are measured beside (`--gguf ""`: none).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.quality.encoded import Array

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny-python"
SCHEMES = "int8,w8a8,fp8,fp8-a8,int4,int4:head=int4,int4-g128,int4-g32-a8,nf4-g64,mxfp4,int3-g32,auto:4.5"
GGUF = "Q4_0,Q4_0:pure,Q8_0,Q4_K_M"
CALIBRATED = "int4,int3-g32,int4:head=int4,auto:4.5"
# What gives an activation, and what reads it.
READERS = {
    "input_layernorm": [f"self_attn.{s}_proj" for s in "qkv"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "up_proj": ["down_proj"],
}


class Row(NamedTuple):
    """A scheme: bits a weight over all matrices that it quantizes, perplexity and divergence, seconds to encode, and
    how many weights have their inputs scaled."""

    scheme: str
    bits: float
    perplexity: float
    divergence: float
    agreement: float
    seconds: float
    scaled: int = 0


def table(
    source: Path,
    text: Path,
    schemes: list[str],
    calibrated: list[str],
    count: int,
    length: int = 512,
    gguf: Sequence[str] = (),
    *,
    other: Path | None = None,
    outliers: bool = False,
) -> tuple[list[Row], int]:
    """Rows, the first of which is the model as it is; and how many tokens they were measured on.

    gguf: formats of llama.cpp, see gguf_writer.quantize. other: the text for calibration and budgets, in place of every
    fifth window. outliers: see with_outliers.
    """
    from llmc import quantization
    from llmc.bench import gguf_writer
    from llmc.frontend import huggingface
    from llmc.quality import samples
    from llmc.quality.evaluator import Evaluator
    from llmc.quality.measure import Variant, Window, compare
    from llmc.refinement import textbook

    imported = huggingface.load(source)
    imported = replace(imported, weights=with_outliers(imported.weights)) if outliers else imported
    tokens = samples.read_text(imported.files, str(text), text.read_text(encoding="utf-8"))
    length = min(length, imported.facts["max_context"])
    blocks = samples.spread(tokens, length, len(tokens.ids))
    kept, measured = blocks[4::5], [block for i, block in enumerate(blocks) if i % 5 != 4]
    chosen = [measured[i] for i in np.unique(np.linspace(0, len(measured) - 1, count).astype(int))]
    if other is not None:
        kept = samples.calibration(samples.read_text(imported.files, str(other), other.read_text("utf-8")), length)
    first = max(1, len(tokens.prefix))
    evaluator = Evaluator(textbook(imported), imported.weights, length)
    variants: dict[str, Any] = {}
    facts: dict[str, tuple[float, float, int]] = {}
    spent: dict[tuple[float, bool], Any] = {}
    ways = ["GPTQ alone", "calibrated"] if outliers else ["calibrated"]
    for name in [*schemes, *(f"{name} {way}" for name in calibrated for way in ways)]:
        start = time.perf_counter()
        plan = quantization.plan_of(quantization.prepare(imported, name.split()[0]))
        encoded = quality_of(evaluator, imported, plan, name, [Window(block, first) for block in kept], spent)
        scaled = sum(bool(weight.scaled) for weight in encoded.values())
        factors = sum(w.inverse_scale.shape[0] for weight, w in encoded.items() if w.scaled == weight)
        facts[name] = bits_of(encoded, factors), time.perf_counter() - start, scaled
        variants[name] = Variant(encoded)
        print(f"{name}: encoded in {facts[name][1]:.1f} s", flush=True)
    plan = quantization.plan_of(quantization.prepare(imported, "int8"))
    for kind in gguf:
        start = time.perf_counter()
        for name, weights in gguf_writer.quantized(source, kind, list(plan.schemes)).items():
            facts[name] = bits_of(weights), time.perf_counter() - start, 0
            variants[name] = Variant(weights)
    scores = compare(evaluator, [Window(block, first) for block in chosen], variants)
    rows = [Row("as it is", 16.0, scores[""].perplexity, 0.0, 1.0, 0.0)]
    for name, (bits, seconds, scaled) in facts.items():
        score = scores[name]
        agreement = score.agreement / score.tokens
        rows.append(Row(name, bits, score.perplexity, score.mean_divergence, agreement, seconds, scaled))
    return rows, scores[""].tokens


def quality_of(
    evaluator: Any, imported: Any, plan: Any, name: str, kept: list[Any], spent: dict[tuple[float, bool], Any]
) -> dict[str, Any]:
    """The weights of a plan, encoded: with the kept windows if the name says so; a budget is spent on them, once."""
    from llmc import quantization
    from llmc.quality.budget import spend
    from llmc.quality.calibrate import calibrate
    from llmc.quality.encoded import Encoded
    from llmc.refinement import scalable

    schemes, budget = plan.schemes, quantization.parse(name.split()[0]).budget
    scaled = scalable(imported.module) if name.endswith("calibrated") else []
    if budget is not None:
        key = budget, bool(scaled)
        if key not in spent:
            few = kept[:: max(1, len(kept) // 4)][:4]
            spent[key] = spend(evaluator, few, list(schemes), budget, scalable=scaled)
        schemes = spent[key]
    if " " in name:
        return calibrate(evaluator, [window.tokens for window in kept], schemes, scalable=scaled).weights
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


def bits_of(encoded: dict[str, Any], factors: int = 0) -> float:
    """Bits a weight over all that is quantized, scales included, and float32 factors of inputs."""
    bits = sum(8 * w.nbytes for w in encoded.values()) + 32 * factors
    return bits / sum(math.prod(w.shape) for w in encoded.values())


def with_outliers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the same Llama, of whose activations one in 32 is 32 times as large, as large models have them.

    What gives an activation is multiplied (a norm's weight, a row of up_proj), what reads it divided, by powers of two:
    the model computes what it did, bit for bit.
    """
    found = {name: Array(np.asarray(tensor.read())) for name, tensor in weights.items()}
    rng = np.random.default_rng(0)
    for name in weights:
        at, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind not in READERS:
            continue
        factors = np.where(rng.permutation(weights[name].shape[0]) % 32 == 0, 32, 1).astype(np.float32)
        made = found[name].array
        found[name] = Array((made * factors.reshape(-1, *[1] * (made.ndim - 1))).astype(made.dtype))
        for reader in READERS[kind]:
            read = found[f"{at}.{reader}.weight"].array
            found[f"{at}.{reader}.weight"] = Array((read / factors).astype(read.dtype))
    return found


def markdown(
    rows: list[Row],
    source: Path,
    text: Path,
    tokens: int,
    date: str,
    *,
    other: Path | None = None,
    outliers: bool = False,
) -> str:
    plain = rows[0].perplexity
    learnt = f"windows of {other.name}" if other is not None else "other windows of the same text, every fifth"
    model = f"{source.name} with outliers (see with_outliers)" if outliers else source.name
    about = (
        f"{model}, {tokens} tokens of {text.name} in windows of 512 (`python -m llmc.bench.quality`). Bits a "
        "weight are over all weights that are quantized, embedding and head included, scales too; embedding and head "
        "are int8 where the scheme has fewer bits and head= does not say otherwise. The ratio is of perplexities, to "
        "the model with its own weights (float32 activations); KL is the mean divergence from that model, in nats; "
        "top is how often both find the same token likeliest. Calibrated weights are scaled by their inputs (AWQ: how "
        f"many) and rounded to second order (GPTQ) on {learnt}; budgets (auto) are spent on four of these. llama.cpp's "
        "rows are the weights of its own files (in brackets: matrices by type), multiplied as they are, and (a8) with "
        "activations rounded to 8 bits in groups of 32 (K types: 256) as its CPU products round them; pure: embedding "
        "and head are Q4_0 too. From so many tokens a ratio is known to about ± √(2 KL / tokens)."
    )
    lines = [
        f"# Quality of quantized weights, {date}",
        "",
        about,
        "",
        "| scheme | bits a weight | perplexity | ratio | KL | top | AWQ | encoded in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, seconds = row.perplexity / plain, f"{row.seconds:.1f} s" if row.seconds else ""
        lines.append(
            f"| {row.scheme} | {row.bits:.3f} | {row.perplexity:.3f} | {ratio:.4f} | {row.divergence:.5f} "
            f"| {row.agreement:.1%} | {row.scaled or ''} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=TINY, help="a Hugging Face folder")
    parser.add_argument("text", nargs="?", type=Path, default=TINY / "heldout.txt", help="a text file")
    parser.add_argument("--schemes", default=SCHEMES, help="joined by commas")
    parser.add_argument("--calibrated", default=CALIBRATED, help="schemes to calibrate too, joined by commas")
    parser.add_argument("--gguf", default=GGUF, help="formats of llama.cpp, joined by commas; :pure: of all matrices")
    parser.add_argument("--calibrate", type=Path, help="a text to calibrate with; default: windows of the measured one")
    parser.add_argument("--outliers", action="store_true", help="plant outliers among the activations of a Llama")
    parser.add_argument("--windows", type=int, default=12, help="windows that are measured")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder of the table")
    given = parser.parse_args()
    # llama.cpp's files are of the model as it is.
    asked = (given.schemes, given.calibrated, "" if given.outliers else given.gguf)
    schemes, calibrated, gguf = (list(filter(None, names.split(","))) for names in asked)
    missing = [name for name in ("gguf", "llama_cpp") if gguf and importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"--gguf: expected the packages of llmc[peers], found no {missing[0]}; --gguf '' does without")
    how = {"other": given.calibrate, "outliers": given.outliers}
    rows, tokens = table(given.source, given.text, schemes, calibrated, given.windows, gguf=gguf, **how)
    date = datetime.date.today().isoformat()
    page = markdown(rows, given.source, given.text, tokens, date, **how)
    kind = ("outliers-" if given.outliers else "") + (f"{given.calibrate.stem}-" if given.calibrate else "")
    (given.output / f"quality-{kind}{date}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
