"""What can be compiled for, what this machine can run, and the toolchains that were found."""

from __future__ import annotations

from typing import NamedTuple

from . import cpu, cuda, metal, rocm, toolchains


class TargetFact(NamedTuple):
    """status: "runs here", "compiles" (for another machine), or "no tools" (about says what to install)."""

    name: str
    status: str
    about: str


def listing() -> list[TargetFact]:
    """What `--target` takes, one entry a name."""
    return [*_cpus(), *_cuda(), *_rocm(), *_metal()]


def _status(kind: str, here: bool) -> tuple[str, str]:
    """-> status, and the note on tools."""
    gone = toolchains.missing(kind)
    if gone:
        note = "; ".join(f"{t.name} not found: {t.advice}" for t in gone)
        return ("runs here" if here else "no tools"), note
    return ("runs here" if here else "compiles"), "with " + ", ".join(t.name for t in toolchains.NEEDED[kind])


def _cpus() -> list[TargetFact]:
    here = cpu.detect()
    _, tools = _status("cpu", True)
    found = [TargetFact("cpu", "runs here", f"this machine: {here.name}, {here.vector_bits}-bit vectors; {tools}")]
    for name, target in cpu.BY_NAME.items():
        status, _ = _status("cpu", cpu.runs_here(target))
        found.append(TargetFact(f"cpu:{name}", status, f"{target.vector_bits}-bit vectors, {target.host}"))
    return found


def _cuda() -> list[TargetFact]:
    card = cuda.card()
    here = f"this machine's card is {card.arch}" if card else "no NVIDIA driver with a card here"
    if card and card.driver < cuda.DRIVER:
        here += f", its driver has CUDA {_version(card.driver)} and {_version(cuda.DRIVER)} is needed"
    runs = cuda.runs_on(card.capability) if card and card.driver >= cuda.DRIVER else []
    status, tools = _status("cuda", bool(set(runs) & set(cuda.DEFAULT)))
    found = [TargetFact("cuda", status, f"{', '.join(cuda.DEFAULT)}; {here}; {tools}")]
    for arch, facts in cuda.ARCHITECTURES.items():
        status, _ = _status("cuda", arch in runs)
        found.append(TargetFact(f"cuda:{arch}", status, f"like {facts['card']}; {_rates(facts)}"))
    return found


def _rocm() -> list[TargetFact]:
    card = rocm.card()
    here = f"this machine's card is {card}" if card else "no AMD card here"
    status, tools = _status("rocm", card in rocm.DEFAULT)
    found = [TargetFact("rocm", status, f"{', '.join(rocm.DEFAULT)}; {here}; {tools}")]
    for arch, facts in rocm.ARCHITECTURES.items():
        status, _ = _status("rocm", card == arch)
        found.append(TargetFact(f"rocm:{arch}", status, f"like {facts['card']}; {_rates(facts)}"))
    return found


def _metal() -> list[TargetFact]:
    status, tools = _status("metal", metal.runs_here())
    return [TargetFact("metal", status, f"Apple 7 (M1) and later, for {metal.HOSTS[0]}; {tools}")]


def _rates(facts: dict) -> str:
    return f"{facts['bandwidth'] / 1e9:.0f} GB/s, {facts['peak'] / 1e12:.0f} TFLOP/s in float16"


def _version(number: int) -> str:
    """CUDA's version numbers: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"
