"""llmc.compile: a model on disk in, an artifact out. The whole way on one screen: `_build`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import llmc
from llmc.ir.errors import CompileError, SourceError
from llmc.libraries import Program, build_libraries, dtype_notes, share_recipes
from llmc.progress import Progress, reporting

DTYPES = ("float32", "bfloat16", "float16")
CACHES = ("int8", "fp8")


def compile(
    source: str | Path,
    target: str | list[str] = "cpu",
    *,
    quantize: str | None = None,
    kv_cache: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    max_context: int | None = None,
    dtype: str | None = None,
    host: str | None = None,
    weights: str = "load",
    calibrate: str | Path | None = None,
    quality: str | Path | None = None,
    verify: bool = False,
    dump: str | Path | None = None,
    progress: Progress | bool | None = None,
) -> Path:
    """Compile a model into an artifact and return the artifact's folder.

    source      a Hugging Face folder, a .safetensors file in one (or its index), or a hub id such as "Qwen/Qwen3-0.6B";
                with weights="random" config.json alone will do
    target      "cpu" is this machine's own; "cpu:x86-64-v3" by name; "cuda", "rocm" (each its usual architectures),
                "metal", "cuda:sm_90", "cuda:native" (this machine's card); several joined by commas or as a list
    host        the system that will load the code for a GPU: linux-x86_64, linux-aarch64 or macos-arm64; default: this
                machine; metal implies macos-arm64
    quantize    a scheme that llmc.schemes() lists, such as "int4" or "int4-g64:head=int8": what follows head= is for
                embedding and output head (none: as they are; default: int8 where the scheme has fewer than 8 bits).
                "auto:4.5" spends 4.5 bits a weight in all, more where measured damage is.
                None: the checkpoint's own numbers; one that is quantized already stays so
    output      folder to write; default: NAME.llmc in the working directory. Work in progress stands beside it in
                NAME.llmc.partial, is resumed if its inputs agree, and becomes the artifact by one rename at the end
    overwrite   replace an existing artifact; without it an existing one is refused
    kv_cache    what keys and values are cached in: "int8" or "fp8", 8 bits a number with a scale for each token's head;
                default: the activations' dtype
    max_context longest sequence to serve, in tokens; default: the model's own limit
    dtype       compute dtype of activations: float32, bfloat16, float16. Default: float32 on a CPU; on a GPU the
                checkpoint's own where the target multiplies it, else float16
    weights     "load", or "random": seeded, made at load, never stored (benchmarks without a checkpoint)
    calibrate   a text file: weights are scaled (AWQ) and rounded (GPTQ) by what their products read when the model
                reads it, each only where that is better on a part of the text that was kept to check with
    quality     a text file on which the quantized program is compared with the unquantized one; default: a bundled page
                if the tokenizer reads it; "none": not measured
    verify      evaluate the program after every pass against the imported one
    dump        write a diff of every pass into this folder
    progress    progress(stage, done), done from 0 to 1; or True for a bar on stderr

    Raises CompileError (stage, pass_name and op say where) for everything that is refused or goes wrong.
    """
    if weights not in ("load", "random"):
        raise CompileError(f"weights={weights!r}: expected 'load' or 'random'")
    if quantize is not None:
        from llmc import quantization

        quantization.parse(quantize)
    if dtype is not None and dtype not in DTYPES:
        raise CompileError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    if kv_cache is not None and kv_cache not in CACHES:
        expected = " or ".join(map(repr, CACHES))
        raise CompileError(f"kv_cache={kv_cache!r}: expected {expected}, or None for the activations' dtype")
    if max_context is not None and max_context < 1:
        raise CompileError(f"max_context={max_context}: expected at least 1 token")
    output = Path(output) if output is not None else Path(f"{model_name(source)}.llmc")
    if output.exists() and not overwrite:
        raise CompileError(f"{output} exists already: give overwrite=True (--overwrite) or another output (-o)")
    request = Request(
        source,
        _targets(target, host),
        max_context,
        dtype,
        verify,
        dump,
        weights,
        kv_cache,
        quantize,
        calibrate,
        quality,
    )
    with reporting(progress) as report, _disk_errors(output):
        return _build(request, output, report)


@dataclass(frozen=True)
class Request:
    """What was asked for, checked."""

    source: str | Path
    targets: tuple[Any, ...]
    max_context: int | None
    dtype: str | None
    verify: bool
    dump: str | Path | None
    weights: str = "load"
    kv_cache: str | None = None
    quantize: str | None = None
    calibrate: str | Path | None = None
    quality: str | Path | None = None


def _build(request: Request, output: Path, report: Progress) -> Path:
    """Door, then all that follows it."""
    from llmc.refinement import refined

    report("reading the model", 0.0)
    dtypes = compute_dtypes(request)
    doors = {dtype: open_door(replace(request, dtype=dtype)) for dtype in dict.fromkeys(dtypes)}
    report("reading the model", 1.0)
    work = Work.open(output, request, doors[dtypes[0]])
    with refined(doors, request, work.folder, report) as (doors, quality):
        _fill(work, request, dtypes, doors, quality, report)
    return work.finish(output)


def _fill(
    work: Work, request: Request, dtypes: list[str], doors: dict[str, Any], quality: dict[str, Any], report: Progress
) -> None:
    """Passes, kernels, library, weights, manifest."""
    from llmc.runtime import artifact

    imported = doors[dtypes[0]]
    programs = [lower(doors[d], target, request, report) for d, target in zip(dtypes, request.targets, strict=True)]
    recipes = _recipes(share_recipes(programs), doors)
    entries = build_libraries(work, programs, report)
    weights = (_random_weights if request.weights == "random" else _weights)(work, recipes, report)
    manifest = artifact.Manifest(
        name=model_name(request.source),
        model=imported.facts
        | quality
        | {"notes": [*imported.facts["notes"], *dtype_notes(programs, imported.facts), *quality.get("notes", [])]}
        | {"kv_cache": request.kv_cache}
        | quantization_facts(imported, recipes),
        targets=tuple(entries),
        weights=artifact.WeightsEntry(**weights),
        llmc=llmc.__version__,
        files=_files(work, imported.files),
        stages=tuple(stage for program in programs for stage in program.stages),
        memory=memory_facts(programs, recipes) | work.memory,
    )
    work.write(manifest)
    for program in programs:
        _verify_library(work, program, report)


def model_name(source: str | Path) -> str:
    """What an artifact is called by default: the folder's name, or the last part of a hub id."""
    path = Path(source)
    if path.suffix in (".safetensors", ".json"):
        path = path.absolute().parent
    elif path.exists():
        path = path.absolute()
    return path.name or "model"


def _targets(target: str | list[str], host: str | None) -> tuple[Any, ...]:
    from llmc import targets
    from llmc.targets import toolchains

    try:
        found = tuple(targets.parse(target, host))
    except ValueError as error:
        raise CompileError(str(error)) from None
    for kind in dict.fromkeys(each.kind for each in found):
        for toolchain in toolchains.missing(kind):
            raise CompileError(
                f"compiling for {kind} needs {toolchain.name}; not found: {', '.join(toolchain.missing())}: "
                f"{toolchain.advice}"
            )
    return found


def compute_dtypes(request: Request) -> list[str]:
    """The dtype of activations for every target."""
    from llmc.frontend import huggingface
    from llmc.libraries import compute_dtype

    gpus = any(target.kind != "cpu" for target in request.targets) and request.dtype is None
    stored = huggingface.stored_dtype(request.source, weights=request.weights) if gpus else "float32"
    return [compute_dtype(target, request.dtype, stored) for target in request.targets]


def open_door(request: Request):
    """The imported form of the source, with its weights (encoded, where they are to be quantized), facts and files."""
    suffix = Path(request.source).suffix
    if suffix in (".pt2", ".onnx"):
        raise SourceError(f"{request.source}: {suffix} files are not read yet; give a Hugging Face folder")
    from llmc import quantization
    from llmc.frontend import huggingface

    imported = huggingface.load(
        request.source, dtype=request.dtype, max_context=request.max_context, weights=request.weights
    )
    return quantization.prepare(imported, request.quantize)


def lower(imported, target, request: Request, report: Progress) -> Program:
    """The imported form to kernels for one target."""
    from llmc import codegen, quantization
    from llmc.ir.debug import debug_level, log
    from llmc.ir.text import text
    from llmc.passes import manager
    from llmc.passes.goal import Goal
    from llmc.passes.pipeline import PIPELINE

    facts = imported.facts
    goal = Goal(
        target,
        dtype=facts["dtype"],
        max_context=facts["max_context"],
        schemes=quantization.plan_of(imported).schemes,
        kv_cache=request.kv_cache,
    )
    stages: tuple[Any, ...] = (*PIPELINE, codegen.KERNELS)
    count = sum(len(stage.passes) for stage in stages)
    hooks: list[Any] = [lambda index, current, before, after: report("passes", index / count)]
    ragged: list[Any] = []  # the program as the last stage gets it

    def keep(index: int, current: Any, before: Any, after: Any) -> None:
        if current is codegen.KERNELS.passes[0]:
            ragged.append(before)

    hooks.append(keep)
    verifier = None
    if request.dump is not None:
        from llmc.passes.dump import Dump

        folder = Path(request.dump)
        hooks.append(Dump(folder if len(request.targets) == 1 else folder / target.name.replace(":", "-")))
    if request.verify:
        from llmc.passes.verify import Verifier

        verifier = Verifier(imported.module, imported.weights, goal)
        hooks.append(_until(codegen.KERNELS, verifier.on_pass))
    result = manager.run(imported.module, goal, stages=stages, on_pass=hooks)
    state = json.loads(str(result.module["step"].attrs["llmc.state"]))
    lowered = codegen.lowered(result.module, codegen.reference(ragged[0], goal))
    if debug_level() >= 4:
        log(text(lowered.module))
    return Program(target, goal.dtype, lowered, state, list(result.stages), verifier)


def _until(stage, hook):
    """The hook, for the passes before a stage: kernels are verified in the artifact, as they will run."""
    return lambda index, current, before, after: current in stage.passes or hook(index, current, before, after)


def _verify_library(work: Work, program: Program, report: Progress) -> None:
    """Where verification was asked for: what the library computes, all sequences in one call, is what the imported
    program computes. Code for another machine is left to `llmc verify`."""
    from llmc.runtime import artifact

    if program.verifier is None or program.target.kind != "cpu":
        return
    verifier, entry = program.verifier, program.target.name
    try:
        artifact.choose_target(artifact.read(work.folder), entry)
    except llmc.ArtifactError:
        return  # a CPU of another kind
    report("verifying the library", 0.0)
    with llmc.load(work.folder, target=entry) as model:
        found = dict(zip(verifier.tokens, model.logits([t.tolist() for t in verifier.tokens.values()]), strict=True))
    verifier.judge(found, "the kernels", stage="kernels")
    report("verifying the library", 1.0)


def _recipes(shared: dict[str, tuple[Any, Program]], doors: dict[str, Any]) -> dict[str, Any]:
    """The recipes over the checkpoint's weights, by name."""
    from llmc.codegen.weights import Recipe

    return {name: Recipe(function, doors[of.dtype].weights) for name, (function, of) in shared.items()}


def _weights(work: Work, recipes: dict[str, Any], report: Progress) -> dict:
    """Evaluate recipes into weights.safetensors, a slice at a time; -> its entry in the manifest."""
    from llmc.runtime import artifact

    total = sum(recipe.nbytes for recipe in recipes.values())
    written = 0
    shapes = {name: (recipe.shape, recipe.dtype) for name, recipe in recipes.items()}
    with artifact.WeightsWriter(work.folder / "weights.safetensors", shapes, finished=work.tensors) as writer:
        for name, recipe in recipes.items():
            if name not in work.tensors:
                into, at = writer[name].reshape(recipe.shape or (1,)), 0  # a number is written as one row
                for rows in recipe.slices():
                    into[at : at + len(rows)] = rows.view(into.dtype)
                    at += len(rows)
                    written += rows.nbytes
                    report("packing weights", written / max(total, 1))
                work.tensors[name] = writer.done(name)
                work.save()
        report("packing weights", 1.0)
        return writer.entry


def _random_weights(work: Work, recipes: dict[str, Any], report: Progress) -> dict:
    """Describe what the recipes make of random weights, by a few rows; -> the manifest's entry."""
    described = {}
    for done, (name, recipe) in enumerate(recipes.items(), 1):
        rows = next(recipe.slices(size=1 << 18))
        described[name] = {"shape": list(recipe.shape), "dtype": recipe.dtype} | _law(rows, recipe)
        report("describing weights", done / len(recipes))
    hashes = dict.fromkeys(described, "")
    return {"file": "", "header_sha256": "", "tensors": hashes, "random": described, "seed": 0}


def _law(rows: Any, recipe: Any) -> dict[str, Any]:
    """The law of a sample: bytes that occur in codes, mean and spread of all else; scales are positive."""
    import numpy as np

    from llmc.codegen.weights import numpy_dtype

    sources = [str(name) for name in recipe.function.attrs["llmc.sources"]]
    if recipe.dtype == "uint8":
        occurs = np.bincount(rows.ravel(), minlength=256) > 0
        return {"bytes": np.packbits(occurs).tobytes().hex()}
    numbers = rows.view(numpy_dtype(recipe.dtype)).astype(np.float32)
    numbers = np.abs(numbers) if all(name.endswith(":scales") for name in sources) else numbers
    mean, spread = (float(f"{value:.2g}") for value in (numbers.mean(), numbers.std()))
    mean = 0.0 if abs(mean) < spread / 10 else mean  # what is left of a sample's mean
    return {"mean": mean, "spread": spread}


def _files(work: Work, files: dict[str, bytes]) -> dict[str, str]:
    """Write the tokenizer and what else travels along; -> name: sha256."""
    for name, content in files.items():
        (work.folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def quantization_facts(imported: Any, recipes: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of quantized weights; nothing where there are none."""
    from llmc import quantization

    plan = quantization.plan_of(imported)
    if not plan.schemes:
        return {}
    used = {str(name) for recipe in recipes.values() for name in recipe.function.attrs["llmc.sources"]}
    return {"quantization": plan.facts(imported.weights, used)}


def memory_facts(programs: list[Program], recipes: dict[str, Any]) -> dict[str, int]:
    """What running will take, in bytes: the weights, and the cache for each token of a sequence."""
    from llmc.runtime.weights import Spec

    per_token = max(
        sum(
            Spec(tuple(t["shape"]), t["dtype"]).bytes // group["page_size"]
            for group in program.state
            for t in group["tensors"]
        )
        for program in programs
    )
    weights = sum(recipe.nbytes for recipe in recipes.values())
    return {"weights_bytes": weights, "cache_bytes_per_token": per_token}


@dataclass
class Work:
    """A compilation in progress: NAME.llmc.partial, and in its work.json what of it is done."""

    folder: Path
    inputs: str
    libraries: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict] = field(default_factory=dict)  # library -> what it was made from, for its entry
    memory: dict[str, int] = field(default_factory=dict)  # facts of the libraries, see codegen.build
    tensors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, output: Path, request: Request, imported) -> Work:
        """Go on with an interrupted compilation of the same inputs, or begin."""
        folder = output.with_name(output.name + ".partial")
        inputs = _inputs_digest(request, imported)
        state = folder / "work.json"
        if state.is_file():
            found = json.loads(state.read_text())
            if found.get("inputs") == inputs:
                return cls(folder, **found)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        work = cls(folder, inputs)
        work.save()
        return work

    def has_library(self, relative: str) -> bool:
        return relative in self.libraries and (self.folder / relative).is_file()

    def save(self) -> None:
        state = {
            "inputs": self.inputs,
            "libraries": self.libraries,
            "sources": self.sources,
            "memory": self.memory,
            "tensors": self.tensors,
        }
        (self.folder / "work.json").write_text(json.dumps(state))

    def write(self, manifest) -> None:
        """Write the manifest: the folder is an artifact now."""
        from llmc.runtime import artifact

        artifact.write(self.folder, manifest)

    def finish(self, output: Path) -> Path:
        """Put the folder in its place by one rename."""
        (self.folder / "work.json").unlink()
        if output.exists():
            old = output.with_name(output.name + ".old")
            output.rename(old)
            self.folder.rename(output)
            shutil.rmtree(old)
        else:
            self.folder.rename(output)
        return output


def _inputs_digest(request: Request, imported) -> str:
    """What a compilation depends on: the source's files, the options, and llmc itself."""
    own = Path(__file__).parents[1]
    code = sorted(
        (str(file.relative_to(own)), file.stat().st_size, file.stat().st_mtime_ns)
        for room in ("llmc", "frontend", "ir", "passes", "codegen", "quality", "targets", "runtime")
        for file in (own / room).rglob("*.py")
    )
    options = [str(request.targets), request.max_context, request.dtype, request.weights]
    options += [request.kv_cache, request.quantize]
    for file in (request.calibrate, request.quality):
        found = Path(file) if file is not None else None
        options.append(hashlib.sha256(found.read_bytes()).hexdigest() if found and found.is_file() else str(file))
    digest = hashlib.sha256(json.dumps([llmc.__version__, code, options, imported.origin]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A full disk or a folder that can't be written is one clear line; what was half written is removed where full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
            raise CompileError(f"{output}: the disk is full; free some space or choose another output (-o)") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CompileError(f"{output}: cannot be written: {error.strerror} ({error.filename})") from None
        raise
