"""The process that builds one GPU target's library: `python -m llmc.codegen.binaries.worker REQUEST.json`."""

from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tvm

from llmc.ir.errors import CompileError
from llmc.targets import GpuTarget, toolchains

from ..library import export, machine_code
from . import cuda, gates, metal, rocm
from .device_code import DeviceCode, DeviceCompiler

COMPILERS: dict[str, type[DeviceCompiler]] = {
    "cuda": cuda.Compiler,
    "amdgpu": rocm.Compiler,
    "msl": metal.Compiler,
}


def main(request: Path) -> None:
    """Do what the request says, and write the report that `process.build` reads."""
    asked = json.loads(request.read_text())
    try:
        report = work(asked)
    except CompileError as error:
        report = {"error": str(error), "stage": error.stage, "op": error.op}
    Path(asked["report"]).write_text(json.dumps(report))


def work(asked: dict) -> dict:
    """-> facts of memory, and the kernels' digests."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked["target"].items()
    }
    target = GpuTarget(**fields)
    modules = {f"{name}.json": Path(path).read_text() for name, path in asked["modules"].items()}
    compiler = COMPILERS[target.language](target)  # type: ignore[call-arg]
    compiler.install()
    machine = tvm.target.Target(target.tvm(), host=target.host_tvm())
    executable, memory = machine_code(tvm.ir.load_json(modules["module.json"]), machine)
    code = compiler.device_code(executable.mod)
    library = Path(asked["library"])
    export(executable, target.host, library)
    embedded = library.read_bytes()
    for binary in code.binaries:
        if binary not in embedded:
            raise CompileError(
                f"{library.name}: the machine code that was made is not in it; this is a fault of the compiler",
                stage="library",
            )
    write_sources(Path(asked["sources"]), code, modules)
    found = gates.resources(code, target) if can_read(target) else {}
    return {**memory, "kernels": code.digests(), "resources": {name: asdict(each) for name, each in found.items()}}


def can_read(target: GpuTarget) -> bool:
    """Whether what a kernel takes can be read: NVIDIA's machine code needs NVIDIA's tools, and is no text of PTX."""
    return target.language != "cuda" or (toolchains.DISASSEMBLER.found and target.arch.startswith("sm_"))


def write_sources(path: Path, code: DeviceCode, modules: dict[str, str]) -> None:
    """The zip of what a library was made from: the kernels' sources, and modules as JSON: the one in the kernels form,
    and the plain loops of what it computes (`llmc verify` compares with them).

    The same sources give the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in sorted({**code.sources, **modules}.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
