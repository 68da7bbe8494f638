"""llmc.inspect: what is in an artifact, or a model's program after any pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc.ir.errors import CompileError
from llmc.runtime import artifact


@dataclass(frozen=True)
class ArtifactReport:
    """A printable report of an artifact; to_dict() is its manifest."""

    path: Path
    manifest: artifact.Manifest
    checked: bool

    @property
    def notes(self) -> list[str]:
        return list(self.manifest.model.get("notes", []))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.manifest), "checked": self.checked}

    def render(self, *, kernels: bool = False) -> str:
        manifest, model = self.manifest, self.manifest.model
        lines = [
            f"{manifest.name}  (llmc {manifest.llmc}, artifact format {manifest.format}, step ABI {manifest.abi})",
            f"model     {model.get('model_type')}: {model.get('layers')} layers, "
            f"hidden size {model.get('hidden_size')}, vocabulary {model.get('vocab_size')}, "
            f"up to {model.get('max_context')} tokens",
            f"dtype     {model.get('dtype')} activations over {model.get('checkpoint_dtype')} weights",
            *quantization_lines(model.get("quantization")),
            *calibration_lines(model.get("calibration")),
            *quality_lines(model.get("quality")),
            f"memory    weights {_size(manifest.memory['weights_bytes'])}, "
            f"cache {_size(manifest.memory['cache_bytes_per_token'])} a token{_cache_words(model)}",
        ]
        for entry in manifest.targets:
            size = (self.path / entry.library).stat().st_size
            lines.append(f"target    {entry.target} on {entry.host}: {entry.library}, {_size(size)}")
            if entry.sources:
                count = len(entry.sources.kernels)
                lines.append(f"  {entry.dtype} activations, {count} kernels; sources {entry.sources.file}")
            for group in entry.state:
                reach = (
                    f"window {group.window}" if group.window else f"chunk {group.chunk}" if group.chunk else "causal"
                )
                lines.append(
                    f"  state   {len(group.layers)} layers {reach}, pages of {group.page_size} tokens, "
                    f"{len(group.tensors)} tensors"
                )
            if kernels:
                lines += [f"  kernel  {kernel['name']}  ×{kernel['calls']}" for kernel in entry.kernels]
                lines += [f"  launch  {line}" for line in _resources(entry)]
        for stage in manifest.stages:
            lines.append(f"stage     {stage['name']}: {stage['seconds']:.2f} s")
        lines += [f"file      {name}" for name in manifest.files]
        lines += [f"note      {note}" for note in self.notes]
        if self.checked:
            count = len(manifest.weights.tensors)
            lines.append(
                "checked   every file agrees with its hash; random weights have none"
                if manifest.weights.random
                else f"checked   all {count} tensors and every file agree with their hashes"
            )
        return "\n".join(lines)

    __str__ = render


def _cache_words(model: dict[str, Any]) -> str:
    """How keys and values are cached, where not as they are."""
    kind = model.get("kv_cache")
    return f", in {kind} with a float32 scale for each token's head" if kind else ""


def quantization_lines(facts: dict[str, Any] | None) -> list[str]:
    """How weights are quantized, and which are not, and why."""
    if not facts:
        return []
    formats = ", ".join(f"{len(names)} in {format}" for format, names in facts["formats"].items())
    lines = [f"quantized {facts['scheme']}: {facts['bits_per_weight']:.3g} bits a weight; {formats}"]
    if facts["activations"]:
        lines.append(f"  activations are rounded to {' and '.join(facts['activations'])} for these products")
    for reason, names in facts["kept"].items():
        shown = ", ".join(names[:3]) + (", …" if names[3:] else "")
        lines.append(f"  kept    {len(names)} as they are ({reason}): {shown}")
    return lines


# How the rows of calibrated weights are rounded, see quality.gptq.WAYS.
_WAYS = {"plain": "by themselves", "weighted": "by how large inputs are", "second order": "to second order (GPTQ)"}


def calibration_lines(facts: dict[str, Any] | None) -> list[str]:
    """What calibration chose, see quality.calibrate.Calibration."""
    if not facts:
        return []
    count = max(sum(facts["rows"].values()), 1)
    ways = ", ".join(f"{rows / count:.0%} {_WAYS[way]}" for way, rows in facts["rows"].items())
    return [
        f"calibrated on {facts['text']}: rows rounded {ways}; "
        f"inputs scaled (AWQ) of {len(facts['scaled'])} of {facts['weights']} weights"
    ]


def quality_lines(facts: dict[str, Any] | None) -> list[str]:
    """What quantization cost, see quality.measure.Quality."""
    if not facts:
        return []
    ratio = facts["perplexity"] / facts["unquantized"]
    damage = ", ".join(f"{name} {value:.2g}" for name, value in facts["damage"].items())
    return [
        f"quality   perplexity {facts['perplexity']:.4g}, unquantized {facts['unquantized']:.4g} (×{ratio:.4f}); "
        f"divergence {facts['divergence']:.2g} nats; same likeliest token {facts['agreement']:.1%}",
        f"  on      {facts['tokens']} tokens of {facts['text']}, in windows of {facts['window']}",
        f"  damage  {damage} (divergence with that part alone quantized, {facts['sampled']} tokens)",
    ]


def _resources(entry: artifact.TargetEntry) -> list[str]:
    """What every launch of a GPU's kernels takes, one line each."""
    lines = []
    for name, facts in (entry.sources.resources if entry.sources else {}).items():
        words = [f"{facts['registers']} registers"] if facts["registers"] is not None else []
        words += [f"{facts['spilled']} bytes spilled"] if facts["spilled"] else []
        words += [f"{facts['shared']} bytes shared"] if facts["shared"] else []
        words += [f"{facts['matrix']} matrix instructions"] if facts["matrix"] else []
        words += [f"{facts['occupancy']:.0%} occupied"] if facts["occupancy"] is not None else []
        lines.append(f"{name}: {', '.join(words) or 'nothing of note'}")
    return lines


@dataclass(frozen=True)
class ProgramReport:
    """A model's program after a pass."""

    source: str
    after: str
    text: str

    @property
    def notes(self) -> list[str]:
        return []

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "after": self.after, "program": self.text}

    def render(self, *, kernels: bool = False) -> str:
        return self.text

    __str__ = render


def inspect(
    path_or_source: str | Path, after: str | None = None, check: bool = False
) -> ArtifactReport | ProgramReport:
    """A printable report of an artifact; with after="page_attention", the IR of a model after that pass.

    check=True reads and hashes every tensor of the artifact. Raises ArtifactError for a damaged artifact, CompileError
    for a source that can't be compiled or a pass that does not exist.
    """
    if after is not None:
        return ProgramReport(str(path_or_source), after, _program_after(path_or_source, after))
    path = Path(path_or_source)
    manifest = artifact.read(path)
    if check:
        artifact.check_all(path, manifest)
    return ArtifactReport(path, manifest, check)


def _program_after(source: str | Path, after: str) -> str:
    from llmc import targets
    from llmc.compiler import Request, open_door
    from llmc.ir.text import text
    from llmc.passes import manager
    from llmc.passes.goal import Goal
    from llmc.passes.pipeline import PIPELINE

    names = [each.name for stage in PIPELINE for each in stage.passes]
    if after not in ["import", *names]:
        raise CompileError(f"no pass is called {after!r}; there are: import, {', '.join(names)}")
    imported = open_door(Request(source, (), None, None, False, None))
    if after == "import":
        return text(imported.module)
    found = []

    def keep(index, current, before, module):
        if current.name == after:
            found.append(text(module))

    facts = imported.facts
    goal = Goal(target=targets.detect(), dtype=facts["dtype"], max_context=facts["max_context"])
    manager.run(imported.module, goal, on_pass=keep)
    return found[-1]


def _size(count: int) -> str:
    """Bytes for people: 1.2 GB, 34 KB."""
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
