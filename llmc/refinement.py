"""What a compilation does between its door and its passes where weights are quantized: calibrate them, and measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmc.ir.errors import CompileError
from llmc.progress import Progress

__all__ = ["NONE", "refined"]

NONE = "none"  # for quality=: not measured
# What measuring may cost by default, in floating-point operations: some 20 s on two cores. At least FEWEST tokens.
AFFORDED, FEWEST, LONGEST = 1e12, 64, 512


@contextmanager
def refined(
    doors: dict[str, Any], request: Any, folder: Path, report: Progress
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """-> (the doors with budgets spent and weights calibrated, facts for the manifest: "calibration"; "quality", or
    "notes" on why there is none).

    doors: compute dtype -> imported model with EncodedWeights. Each weight is encoded once, into `folder`/encoded (a
    byte a weight, and its scales), where what is done outlives an interruption; it is removed at the end. Of the
    request: calibrate, a file or None; quality, a file, None (the bundled text, if the tokenizer reads it) or "none";
    weights.
    CompileError: a text that cannot be read, too short, or not readable for the tokenizer.
    """
    from llmc import quantization
    from llmc.passes import schemes
    from llmc.spill import Spill

    imported = next(iter(doors.values()))
    plan, calibrate = quantization.plan_of(imported), request.calibrate
    budget = None if imported.quantized or not request.quantize else quantization.parse(request.quantize).budget
    # Random weights have no quality to lose.
    quality = NONE if request.quality is None and request.weights == "random" else request.quality
    measurable = bool(plan.schemes) and not imported.quantized and request.weights != "random"
    for name, given in (
        ("calibrate", calibrate),
        ("quality", None if quality == NONE else quality),
        ("quantize", budget and request.quantize),
    ):
        if given is not None and not measurable:
            found = "random weights" if request.weights == "random" else "no quantize"
            found = "a checkpoint that is quantized already" if imported.quantized else found
            raise CompileError(f"{name}={str(given)!r}: expected weights in floats and a scheme, found {found}")
    if not measurable or (budget is None and calibrate is None and quality == NONE):
        yield doors, {}
        return
    spill, program = Spill(folder / "encoded"), textbook(imported)
    if budget is not None:
        text = calibrate or (None if quality == NONE else quality)
        aside = scalable(program) if calibrate is not None else []
        chosen = spill.once("schemes", lambda: spent(program, imported, plan, budget, text, aside, report))
        plan = replace(plan, schemes={name: schemes.parse(scheme) for name, scheme in chosen.items()})
    encoded = quantization.EncodedWeights(imported.weights.weights, plan, spill=spill)
    own: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    if calibrate is not None:
        calibration = calibrated(program, imported, encoded, calibrate, spill, report)
        own, plan = calibration.weights, replace(plan, schemes=calibration.schemes(plan.schemes))
        encoded = quantization.EncodedWeights({**imported.weights.weights, **own}, plan, spill=spill)
        facts = {"calibration": {"text": str(calibrate)} | calibration.facts()}
    found = spill.once("quality", lambda: measured(program, imported, encoded, quality, report))
    kept = spill if own or "quality" in found else None  # what nobody has read is read once, into the artifact
    for dtype, door in doors.items():
        weights = quantization.EncodedWeights({**door.weights.weights, **own}, plan, spill=kept)
        doors = doors | {dtype: replace(door, weights=weights)}
    yield doors, facts | found
    spill.remove()


def textbook(imported: Any) -> Any:
    """The program in its textbook form."""
    from llmc.passes import manager
    from llmc.passes.goal import Goal
    from llmc.passes.pipeline import PIPELINE

    goal = Goal(dtype=imported.facts["dtype"], max_context=imported.facts["max_context"])
    return manager.run(imported.module, goal, stages=PIPELINE[:1]).module


def text_of(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompileError(f"{path}: expected a text file in UTF-8: {error}") from None


def tokens_of(imported: Any, file: str | Path | None) -> Any:
    """A text as the model reads it; without a file the bundled one."""
    from llmc.quality import samples

    name, text = (samples.BUNDLED, samples.bundled()) if file is None else (str(file), text_of(file))
    return samples.read_text(imported.files, name, text)


def scalable(program: Any) -> list[str]:
    """Weights whose inputs can be scaled by the kernel that computes them."""
    from llmc.passes.weight_uses import weight_uses

    return [name for name, use in weight_uses(program).items() if use.rowwise]


def spent(
    program: Any,
    imported: Any,
    plan: Any,
    budget: float,
    file: str | Path | None,
    scalable: list[str],
    report: Progress,
) -> dict[str, str]:
    """The name of the scheme of every weight of a plan, within a budget of bits a weight; see quality.budget.spend."""
    from llmc.quality import samples
    from llmc.quality.budget import spend
    from llmc.quality.evaluator import Evaluator
    from llmc.quality.measure import Window

    report("spending the budget", 0.0)
    tokens = tokens_of(imported, file)
    uses = Evaluator(program, imported.weights, 2).uses()
    each = samples.work(imported.weights, uses) * len(plan.schemes) / 4  # a token; half of the program for each group
    afforded = max(FEWEST, int(AFFORDED / each))
    length = min(imported.facts["max_context"], LONGEST, afforded, len(tokens.ids) + len(tokens.prefix))
    evaluator = Evaluator(program, imported.weights, length)
    first = max(1, len(tokens.prefix))
    chosen = [Window(ids, first) for ids in samples.spread(tokens, length, max(1, min(4, afforded // length)))]
    done = lambda share: report("spending the budget", share)  # noqa: E731
    found = spend(evaluator, chosen, list(plan.schemes), budget, scalable=scalable, report=done)
    return {name: scheme.name for name, scheme in found.items()}


def calibrated(program: Any, imported: Any, encoded: Any, file: str | Path, spill: Any, report: Progress) -> Any:
    """The weights of a plan, encoded by what their products read of a text."""
    from llmc.quality import samples
    from llmc.quality.calibrate import calibrate
    from llmc.quality.evaluator import Evaluator

    report("calibrating", 0.0)
    tokens = tokens_of(imported, file)
    sequences = samples.calibration(tokens, imported.facts["max_context"])
    evaluator = Evaluator(program, imported.weights, len(sequences[0]))

    def keep(name: str, parts: Any) -> Any:
        return spill.write(name, encoded.kinds(name), ((part, 0, rows) for part, rows in parts.items()))

    return calibrate(
        evaluator,
        sequences,
        encoded.plan.schemes,
        scalable=scalable(program),
        keep=keep,
        once=spill.once,
        find=lambda name: spill.find(name, encoded.kinds(name)),
        report=lambda done: report("calibrating", done),
    )


def measured(program: Any, imported: Any, encoded: Any, quality: str | Path | None, report: Progress) -> dict[str, Any]:
    """{"quality": …} for the manifest; or {"notes": […]} on why there is none, where none was asked for."""
    from llmc.quality import samples
    from llmc.quality.evaluator import Evaluator
    from llmc.quality.measure import measure, windows

    if quality == NONE:
        return {}
    try:
        tokens = tokens_of(imported, quality)
    except CompileError as error:
        if quality is not None:
            raise
        return {"notes": [f"quality was not measured: {error}"]}
    report("measuring quality", 0.0)
    uses = Evaluator(program, imported.weights, 2).uses()
    layers = max(use.layer for use in uses)
    cost = samples.work(imported.weights, uses)
    # Two runs of every window, and for the damage one of half the program for each part.
    afforded = max(FEWEST, int(AFFORDED / ((2 + layers / 2) * cost)))
    length = min(imported.facts["max_context"], LONGEST, afforded, len(tokens.ids) + len(tokens.prefix))
    evaluator = Evaluator(program, imported.weights, length)
    chosen = windows(tokens.ids, length, prefix=tokens.prefix)[: max(1, int(AFFORDED / (2 * cost * length)))]
    sample = max(1, min(len(chosen), int(AFFORDED / (layers / 2 * cost) / length)))
    others = {name: decoded(name, encoded, imported.weights[name]) for name in encoded.plan.schemes}
    found = measure(
        evaluator,
        chosen,
        others,
        text=tokens.name,
        sample=min(sample, 2),
        report=lambda done: report("measuring quality", done),
    )
    report("measuring quality", 1.0)
    return {"quality": found.to_dict()}


def decoded(name: str, encoded: Any, weight: Any) -> Any:
    """A quantized weight, as what its parts stand for."""
    from llmc.quality.encoded import Encoded

    turned = name in encoded.plan.transposed
    depth = weight.shape[-2 if turned else -1]
    scheme = encoded.plan.schemes[name]
    parts = {part: encoded[f"{name}:{part}"] for part in encoded.kinds(name)}
    inverse = encoded[f"{scheme.scaled}:inverse_scale"] if scheme.scaled else None
    return Encoded(
        scheme.format(depth),
        parts,
        activation=scheme.rounding(depth),
        turned=turned,
        scaled=scheme.scaled,
        inverse_scale=inverse,
    )
