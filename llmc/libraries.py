"""The libraries of an artifact: built side by side, each with its entry in the manifest; and the weights they share."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import tvm_ffi

from llmc.progress import Progress
from llmc.runtime import artifact

BUILDS = 2  # processes at a time; each takes a core and up to a gigabyte


@dataclass
class Program:
    """One target's program in the kernels form, and what the manifest says of it."""

    target: Any
    dtype: str
    lowered: Any
    state: list[dict]
    stages: list[dict] = field(default_factory=list)
    verifier: Any = None


def compute_dtype(target: Any, asked: str | None, stored: str) -> str:
    """The dtype of activations: what was asked for; on a CPU float32; on a GPU the checkpoint's own where the target
    multiplies it, else float16."""
    if asked is not None:
        return asked
    if target.kind == "cpu":
        return "float32"
    return stored if stored in ("float32", *target.dtypes) else "float16"


def dtype_notes(programs: list[Program], facts: dict[str, Any]) -> list[str]:
    """For people: which dtype every GPU target computes in, and why where that is not the checkpoint's."""
    stored, notes = facts["checkpoint_dtype"], []
    for program in programs:
        if program.target.kind != "cpu":
            why = "the checkpoint's own" if program.dtype == stored else f"the checkpoint is in {stored}"
            if (stored, program.dtype) == ("bfloat16", "float16"):
                why += ", whose numbers reach further than 65504: should activations overflow, a run ends with an error"
            notes.append(f"{program.target.name} computes in {program.dtype} ({why})")
    return notes


def share_recipes(programs: list[Program]) -> dict[str, tuple[Any, Program]]:
    """One name for every distinct weight of all programs: those that lie alike are stored once.

    -> name -> (its recipe, a program that it is of); the programs' own lists of weights take the names over.
    """
    shared: dict[str, tuple[Any, Program]] = {}
    for program in programs:
        names = {}
        for name, function in program.lowered.recipes.items():
            names[name] = _name(shared, name, function)
            shared.setdefault(names[name], (function, program))
        weights = {of: [names[name] for name in listed] for of, listed in program.lowered.weights.items()}
        program.lowered = replace(program.lowered, weights=weights, recipes={})
    return shared


def _name(shared: dict[str, tuple[Any, Program]], name: str, function: Any) -> str:
    """The name of an equal recipe that is there already, or a new one."""
    candidate, count = name, 1
    while candidate in shared and not tvm_ffi.structural_equal(shared[candidate][0], function):
        count += 1
        candidate = f"{name}@{count}"
    return candidate


def build_libraries(work: Any, programs: list[Program], report: Progress) -> list[artifact.TargetEntry]:
    """Build what an interrupted compilation did not; -> the entries of the manifest, in the programs' order.

    GPU targets are built in processes of their own, BUILDS at a time; CPU targets within this one.
    """
    from llmc import codegen

    def timed(program: Program) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        target = program.target
        library = work.folder / f"lib/{codegen.library_name(target)}"
        sources = work.folder / f"src/{codegen.sources_name(target)}"
        facts = codegen.build(program.lowered, target, library, sources)
        return facts, round(time.perf_counter() - started, 4)

    with ThreadPoolExecutor(BUILDS) as pool:
        started: dict[str, Future] = {}
        todo = [p for p in programs if not work.has_library(f"lib/{codegen.library_name(p.target)}")]
        for program in todo:
            if program.target.kind != "cpu":
                started[program.target.name] = pool.submit(timed, program)
        try:
            for program in todo:
                report(f"building {program.target.name}", 0.0)
                running = started.get(program.target.name)
                facts, seconds = running.result() if running else timed(program)
                _keep(work, program, facts)
                program.stages.append({"name": f"library {program.target.name}", "seconds": seconds, "passes": []})
                report(f"building {program.target.name}", 1.0)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [_entry(work, program) for program in programs]


def _keep(work: Any, program: Program, facts: dict[str, Any]) -> None:
    """Note down a library that was built, for the manifest and for a compilation that goes on later."""
    from llmc import codegen

    kernels, resources = facts.pop("kernels", None), facts.pop("resources", {})
    for fact, value in facts.items():
        work.memory[fact] = max(value, work.memory.get(fact, 0))
    relative = f"lib/{codegen.library_name(program.target)}"
    if kernels is not None:
        sources = f"src/{codegen.sources_name(program.target)}"
        work.sources[relative] = {
            "file": sources,
            "sha256": artifact.sha256(work.folder / sources),
            "kernels": kernels,
            "resources": resources,
        }
    work.libraries[relative] = artifact.sha256(work.folder / relative)
    work.save()


def _entry(work: Any, program: Program) -> artifact.TargetEntry:
    from llmc import codegen

    target = program.target
    relative = f"lib/{codegen.library_name(target)}"
    sources = work.sources.get(relative)
    return artifact.TargetEntry(
        target=target.name,
        kind=target.kind,
        host=target.host,
        features=tuple(target.features),
        library=relative,
        sha256=work.libraries[relative],
        state=tuple(_state(group) for group in program.state),
        functions={name: artifact.Function(tuple(names)) for name, names in program.lowered.weights.items()},
        kernels=tuple(program.lowered.kernels),
        arch=target.arch,
        dtype=program.dtype,
        sources=artifact.Sources(**sources) if sources else None,
    )


def _state(group: dict) -> artifact.StateGroup:
    return artifact.StateGroup(
        kind=group["kind"],
        page_size=group["page_size"],
        window=group["window"],
        chunk=group["chunk"],
        layers=tuple(group["layers"]),
        tensors=tuple(artifact.StateTensor(t["name"], tuple(t["shape"]), t["dtype"]) for t in group["tensors"]),
    )
