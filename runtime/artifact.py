"""The artifact: a folder with a manifest, weights, libraries and what belongs to the text side.

    name.llmc/manifest.json         what is in the folder and what it needs (this file is its schema)
    name.llmc/weights.safetensors   packed weights (`weights.py`)
    name.llmc/lib/….so              one library a target and host
    name.llmc/src/….zip             what a GPU's library was made from
    name.llmc/tokenizer.json, …     text, as it came with the model

Hashes detect damage, not malice: a library is native code. `read` and `check` look at everything but the tensors'
bytes, `check_all` at those too.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .random_weights import RandomWeights
from .weights import Weights, WeightsWriter, sha256

__all__ = [
    "ABI",
    "FORMAT",
    "Function",
    "Manifest",
    "RandomWeights",
    "Sources",
    "StateGroup",
    "StateTensor",
    "TargetEntry",
    "Weights",
    "WeightsEntry",
    "WeightsWriter",
    "check",
    "check_all",
    "choose_target",
    "machine_features",
    "machine_host",
    "read",
    "sha256",
    "write",
]

FORMAT = 1  # of the folder and its manifest
ABI = 1  # of the functions in the libraries: embed, step, copy_pages
MANIFEST = "manifest.json"
AGAIN = "copy the artifact again, or compile it again"


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the cache: `shape` is that of one page, without the page axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StateGroup:
    """Layers that share a page table. window, chunk: how far back a token sees; 0 is everything."""

    kind: str
    page_size: int
    window: int
    chunk: int
    layers: tuple[int, ...]
    tensors: tuple[StateTensor, ...]


@dataclass(frozen=True)
class Function:
    """A compiled function: the names of its weights, in the order it takes them."""

    weights: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """The zip that a GPU's library was made from, and SHA-256 of every kernel's machine code, as it is in the library
    (of its source, where the driver compiles it). resources: kernel -> what it takes (registers, shared memory, …)."""

    file: str
    sha256: str
    kernels: dict[str, str]
    resources: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetEntry:
    """The code for one architecture and one host. dtype: of its activations."""

    target: str
    kind: str
    host: str
    features: tuple[str, ...]
    library: str
    sha256: str
    state: tuple[StateGroup, ...]
    functions: dict[str, Function]
    kernels: tuple[dict[str, Any], ...] = ()
    arch: str = ""
    dtype: str = ""
    sources: Sources | None = None


@dataclass(frozen=True)
class WeightsEntry:
    """The weights file: hash of its header, and of every tensor.

    Random weights have no file and no hashes: `random` describes each tensor (see `random_weights.py`), `seed` says
    which numbers they are.
    """

    file: str
    header_sha256: str
    tensors: dict[str, str]
    random: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `model` holds the model's facts (vocab_size, max_context, eos_token_id, …), JSON all through."""

    name: str
    model: dict[str, Any]
    targets: tuple[TargetEntry, ...]
    weights: WeightsEntry
    llmc: str = ""
    files: dict[str, str] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    abi: int = ABI

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> "Manifest":
        """Raises ArtifactError: not JSON, another format or ABI version, a key that is missing or of the wrong type."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: expected JSON, found {error}: it is damaged; {AGAIN}") from error
        if not isinstance(data, dict):
            raise ArtifactError(
                f"{where}: expected a JSON object, found a {type(data).__name__}; this is not an llmc artifact"
            )
        for key, mine, what in (("format", FORMAT, "artifact format"), ("abi", ABI, "step ABI")):
            if key not in data:
                raise ArtifactError(f"{where}: expected the key {key!r}, found none; this is not an llmc artifact")
            if data[key] != mine:
                made_by = f" (made by llmc {data['llmc']})" if data.get("llmc") else ""
                raise ArtifactError(
                    f"{where}: expected {what} version {mine}, found {data[key]!r}{made_by}; "
                    "compile the model again with this llmc, or install the llmc that made it"
                )
        return _build(cls, data, where, "")


# key -> dataclass of its elements, for the keys that hold more than plain JSON
_NESTED = {
    (Manifest, "targets"): TargetEntry,
    (Manifest, "weights"): WeightsEntry,
    (TargetEntry, "state"): StateGroup,
    (TargetEntry, "functions"): Function,
    (TargetEntry, "sources"): Sources,
    (StateGroup, "tensors"): StateTensor,
}


def _build(cls: type, data: Any, where: str, path: str) -> Any:
    """A dataclass from parsed JSON; keys it doesn't know are left for later versions that add some."""

    def wrong(key: str, expected: str, found: Any) -> ArtifactError:
        return ArtifactError(f"{where}: {path}{key}: expected {expected}, found {found!r:.60}: it is damaged; {AGAIN}")

    if not isinstance(data, dict):
        raise wrong("", "an object", data)
    values = {}
    for f in fields(cls):
        if f.name not in data:
            if f.default is f.default_factory:  # both MISSING
                raise wrong(f.name, "a value", None)
            continue
        value: Any = data[f.name]
        if value is None and f.default is None:
            continue
        annotation = str(f.type)
        kind: Any
        kind, word = (
            (list, "a list") if "tuple[" in annotation else
            (dict, "an object") if "dict[" in annotation or (cls, f.name) in _NESTED else
            (int, "a number") if f.type is int else (str, "a string")
        )  # fmt: skip
        if not isinstance(value, kind) or isinstance(value, bool):
            raise wrong(f.name, word, value)
        inner = _NESTED.get((cls, f.name))
        if inner is not None and kind is list:
            value = tuple(_build(inner, v, where, f"{path}{f.name}[{i}].") for i, v in enumerate(value))
        elif inner is not None and "dict[" in annotation:
            value = {k: _build(inner, v, where, f"{path}{f.name}.{k}.") for k, v in value.items()}
        elif inner is not None:
            value = _build(inner, value, where, f"{path}{f.name}.")
        elif kind is list:
            element = int if "int" in annotation else dict if "dict" in annotation else str
            for i, v in enumerate(value):
                if not isinstance(v, element) or isinstance(v, bool):
                    raise wrong(f"{f.name}[{i}]", {int: "a number", str: "a string", dict: "an object"}[element], v)
            value = tuple(value)
        elif kind is dict and "str, str" in annotation:
            for k, v in value.items():
                if not isinstance(v, str):
                    raise wrong(f"{f.name}.{k}", "a string", v)
        values[f.name] = value
    return cls(**values)


def write(folder: Path | str, manifest: Manifest) -> None:
    """Write the manifest; last of all, since a folder is an artifact once it has one."""
    path = Path(folder) / MANIFEST
    partial = path.with_suffix(".partial")
    partial.write_text(manifest.to_json(), encoding="utf-8")
    os.replace(partial, path)


def read(folder: Path | str) -> Manifest:
    """The manifest of an artifact, its paths checked to stay in the folder. Raises ArtifactError."""
    folder = Path(folder)
    if not folder.exists():
        raise ArtifactError(f"{folder}: expected an artifact folder, found nothing there")
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: expected an artifact folder, found a file; give the NAME.llmc folder that `llmc compile` wrote"
        )
    path = folder / MANIFEST
    if not path.is_file():
        partial = folder.name.endswith(".partial")
        hint = "it is a compilation that did not end" if partial else "compile a model with `llmc compile` first"
        raise ArtifactError(f"{folder}: not an llmc artifact: it has no {MANIFEST}; {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: expected JSON in UTF-8, found {error}: it is damaged; {AGAIN}") from error
    manifest = Manifest.from_json(text, str(path))
    weights = () if manifest.weights.random else (manifest.weights.file,)
    sources = (t.sources.file for t in manifest.targets if t.sources)
    for relative in (*weights, *manifest.files, *(t.library for t in manifest.targets), *sources):
        inside(folder, relative)
    for entry in manifest.targets:
        _check_target(path, manifest, entry)
    return manifest


def inside(folder: Path, relative: str) -> Path:
    """The path of a file of the artifact. Raises ArtifactError if it would leave the folder, by .. or by a link."""
    path = folder / relative
    if not relative or os.path.isabs(relative) or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"{folder / MANIFEST}: the path {relative!r} leaves the artifact's folder; such an artifact is not loaded"
        )
    return path


def _check_target(path: Path, manifest: Manifest, entry: TargetEntry) -> None:
    where = f"{path}: target {entry.target}"
    for name in ("embed", "step"):
        if name not in entry.functions:
            raise ArtifactError(f"{where}: expected a function {name!r}, found {sorted(entry.functions)}; {AGAIN}")
        for weight in entry.functions[name].weights:
            if weight not in manifest.weights.tensors:
                raise ArtifactError(
                    f"{where}: {name} takes the weight {weight}, which the artifact does not have; {AGAIN}"
                )
    sizes = sorted({group.page_size for group in entry.state})
    if len(sizes) != 1:
        raise ArtifactError(f"{where}: expected state groups of one page size, found {sizes}; update llmc")
    for i, group in enumerate(entry.state):
        if group.kind != "paged":
            raise ArtifactError(f"{where}: state group {i} is {group.kind!r}; this llmc runs 'paged' only, update it")
        if group.page_size < 1 or group.window < 0 or group.chunk < 0 or not group.tensors:
            raise ArtifactError(f"{where}: state group {i} has impossible sizes: it is damaged; {AGAIN}")


def check(folder: Path | str, manifest: Manifest, entry: TargetEntry | None = None) -> Weights | RandomWeights:
    """Compare libraries (of `entry`, or all), text files and the weights' header with their hashes; no tensor is read.

    -> the weights, mapped or random. Raises ArtifactError naming the file.
    """
    folder = Path(folder)
    entries = [entry] if entry else manifest.targets
    expected = {t.library: t.sha256 for t in entries} | manifest.files
    if entry is None:  # kernel sources are for reading: what runs does not need them
        expected |= {t.sources.file: t.sources.sha256 for t in entries if t.sources}
    for relative, digest in expected.items():
        path = inside(folder, relative)
        if not path.is_file():
            raise ArtifactError(
                f"{path}: the manifest names this file, found none: the artifact is not complete; {AGAIN}"
            )
        _same(str(path), digest, sha256(path))
    if manifest.weights.random:
        return RandomWeights(manifest.weights.random, manifest.weights.seed)
    weights = Weights(inside(folder, manifest.weights.file))
    _same(f"{weights.path}: header", manifest.weights.header_sha256, weights.header_sha256)
    for name in manifest.weights.tensors:
        if name not in weights.specs:
            raise ArtifactError(
                f"{weights.path}: the manifest names the tensor {name}, the file does not have it; {AGAIN}"
            )
    return weights


def check_all(
    folder: Path | str, manifest: Manifest | None = None, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """`read` and `check`, and the hash of every tensor. progress(done, total) is told bytes. Raises ArtifactError."""
    manifest = manifest or read(folder)
    weights = check(folder, manifest)
    if isinstance(weights, RandomWeights):
        return manifest
    total, done = sum(weights.specs[name].bytes for name in manifest.weights.tensors), 0
    for name, digest in manifest.weights.tensors.items():
        _same(f"{weights.path}: tensor {name}", digest, weights.sha256(name))
        done += weights.specs[name].bytes
        if progress:
            progress(done, total)
    return manifest


def _same(what: str, expected: str, found: str) -> None:
    if expected != found:
        raise ArtifactError(f"{what}: damaged: expected sha256 {expected[:12]}…, found {found[:12]}…; {AGAIN}")


def machine_host() -> str:
    """This machine's host name in artifacts: linux-x86_64, linux-aarch64, macos-arm64."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = platform.machine().lower()
    return f"{system}-{'x86_64' if machine == 'amd64' else machine}"


# Linux's names of features that LLVM calls otherwise
_ALIASES = {
    "abm": "lzcnt",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "pclmulqdq": "pclmul",
    "pni": "sse3",
    "rdrand": "rdrnd",
    "sha_ni": "sha",
}


def _plain(feature: str) -> str:
    return feature.lower().lstrip("+").replace("_", "").replace(".", "").replace("-", "")


def machine_features() -> frozenset[str]:
    """This CPU's features, as the kernel reports them, in LLVM's names without punctuation ("avx512bf16")."""
    names: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.partition(":")[0].strip().lower() in ("flags", "features"):
                names = line.partition(":")[2].split()
                break
    return frozenset(_plain(n) for name in names for n in (name, _ALIASES.get(name, name)))


def choose_target(
    manifest: Manifest,
    target: str | None = None,
    *,
    host: str | None = None,
    features: Iterable[str] | None = None,
    obstacle: Callable[[TargetEntry], str | None] | None = None,
) -> TargetEntry:
    """The target to run: the one asked for ("cpu", "cuda:sm_90"), or the best that this machine can run.

    Best is a GPU's, of the latest architecture; of CPU targets, the one with most features that this machine has.
    obstacle(target): why no GPU here runs a target, None: one does. Raises ArtifactError: none for this machine, a
    driver too old, or features missing (needed, and which of them this machine lacks).
    """
    host = host or machine_host()
    have = machine_features() if features is None else frozenset(_plain(f) for f in features)
    there = ", ".join(f"{t.target} on {t.host}" for t in manifest.targets) or "none"
    named = [t for t in manifest.targets if target in (None, t.target, t.kind)]
    if not named:
        raise ArtifactError(f"{manifest.name}: no target {target!r} in this artifact; it has: {there}")
    here = [t for t in named if t.host == host]
    if not here:
        asked = f" {target!r}" if target else ""
        raise ArtifactError(
            f"{manifest.name}: no target{asked} for this machine ({host}); the artifact has: {there}; "
            "compile it for this machine"
        )
    judged = [(t, None if t.kind == "cpu" else (obstacle or _obstacle)(t)) for t in here]
    here = [t for t, why in judged if why is None]
    if not here:
        reasons = "; ".join(why for _, why in judged if why is not None)
        raise ArtifactError(f"{manifest.name}: no target for this machine: {reasons}; compile it for cpu as well")
    able = [t for t in here if not _missing(t, have)]
    if not able:
        lacks = "; ".join(
            f"{t.target} needs {', '.join(t.features)}; missing: {', '.join(_missing(t, have))}" for t in here
        )
        raise ArtifactError(
            f"{manifest.name}: this machine's CPU lacks features: {lacks}; compile it here, or for an older CPU"
        )
    return max(able, key=lambda t: (t.kind != "cpu", "" if t.kind == "cpu" else t.target, len(t.features)))


def _obstacle(target: TargetEntry) -> str | None:
    from .devices.drivers import obstacle

    return obstacle(target)


def _missing(entry: TargetEntry, have: frozenset[str]) -> list[str]:
    return [f for f in entry.features if _plain(f) not in have]
