"""One archive with what a machine with a card needs to measure: python -m llmc.bench.bundle OUT.tar.gz ARTIFACT …

    python -m llmc.bench.bundle build/gpu.tar.gz --shape llama-3.2-1b --target cuda:sm_90 --python 3.12

It holds llmc's runtime and benchmark, tvm-ffi, the few libraries of TVM's runtime that they need, the artifacts, and
run.sh: a few MB. The machine it is carried to has Python, numpy, PyTorch and transformers; it needs neither a network
nor TVM's compiler. --shape compiles a shape of `llmc.bench.shapes` with random weights first, and with --quantize once
more in that scheme. --python names the Python of that machine where it is another than this one: tvm-ffi's extension
for it is taken from its wheel on the package index.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmc.bench import shapes
from llmc.ir.errors import CompileError
from llmc.runtime import artifact
from llmc.runtime.errors import ArtifactError

NAME = "llmc-gpu"
# The rooms that are needed, and of the front door what is needed of it.
ROOMS = ("runtime", "bench")
DOOR = ("__init__.py",)
# Beside every artifact; and by kind of target.
RUNTIME = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
DEVICES = {"cuda": ("libtvm_runtime_cuda.so",)}
CUDART = ("nvidia", "cu13/lib/libcudart.so.13")  # what libtvm_runtime_cuda.so is linked with; found beside it
CONTEXT = 8192

RUN = """#!/usr/bin/env bash
# Measures llmc on this machine's card; results are written beside this file. Options: --only decode-1, --rounds 5, …
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
cd "$here"  # no other llmc is found first
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
"${PYTHON:-python3}" -m llmc.bench.preflight
exec "${PYTHON:-python3}" -m llmc.bench.gpu "$here"/artifacts/*.llmc --out "$here/results" "$@"
"""


class BundleError(Exception):
    """The archive can't be made; the message says what is missing."""


def bundle(out: Path, artifacts: Iterable[Path], python: str | None = None) -> Path:
    """Write the archive. Raises BundleError, ArtifactError (not an artifact)."""
    artifacts = [Path(path) for path in artifacts]
    kinds = {target.kind for path in artifacts for target in artifact.read(path).targets}
    files = dict(_files(artifacts, kinds, python))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:gz") as archive:
        for name, content in files.items():
            if isinstance(content, Path):
                archive.add(content, f"{NAME}/{name}")
            else:
                entry = tarfile.TarInfo(f"{NAME}/{name}")
                entry.size, entry.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
                archive.addfile(entry, io.BytesIO(content))
    return out


def _files(artifacts: list[Path], kinds: set[str], python: str | None) -> Iterator[tuple[str, Path | bytes]]:
    """What goes in: (name in the archive, file or content)."""
    yield "run.sh", RUN.encode()
    for path in artifacts:
        yield f"artifacts/{path.name}", path
    door = _package("llmc", "llmc")
    for name in DOOR:
        yield f"site/llmc/{name}", door / name
    for room in ROOMS:
        folder = _package(f"llmc.{room}", "llmc")
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".cc", ".h") or file.name.startswith("libllmc_hip-"):
                yield f"site/llmc/{room}/{file.relative_to(folder)}", file
    libraries = _package("tvm", "apache-tvm") / "lib"
    for name in (*RUNTIME, *(name for kind in sorted(kinds) for name in DEVICES.get(kind, ()))):
        yield f"site/tvm/lib/{name}", libraries / name
    if "cuda" in kinds:
        yield "site/tvm/lib/libcudart.so.13", _cudart()
    yield from _ffi(python)
    for name in ("llmc", "apache-tvm", "apache-tvm-ffi"):  # versions and entry points are asked for by name
        information = importlib.metadata.distribution(name)
        for part in ("METADATA", "entry_points.txt"):
            if text := information.read_text(part):
                yield f"site/{name.replace('-', '_')}-{information.version}.dist-info/{part}", text.encode()


def _ffi(python: str | None) -> Iterator[tuple[str, Path | bytes]]:
    """tvm-ffi without its headers and sources; its extension for this Python, and for another."""
    folder = _package("tvm_ffi", "apache-tvm-ffi")
    for file in sorted(folder.rglob("*.py")):
        yield f"site/tvm_ffi/{file.relative_to(folder)}", file
    for file in (*folder.glob("lib/*.so"), *folder.glob("core*.so")):
        yield f"site/tvm_ffi/{file.relative_to(folder)}", file
    if python is not None and python != "{}.{}".format(*sys.version_info):
        yield from _extension(python)


def _extension(python: str) -> Iterator[tuple[str, bytes]]:
    """tvm-ffi's extension for another Python, from the wheel of the same version."""
    wanted = f"apache-tvm-ffi=={importlib.metadata.version('apache-tvm-ffi')}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--python-version", python, "--dest", folder, wanted], capture_output=True, text=True
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise BundleError(
                f"expected a wheel of {wanted} for Python {python}, found none: {done.stderr.strip()[-500:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                if name.startswith("tvm_ffi/core") and name.endswith(".so"):
                    yield f"site/{name}", wheel.read(name)


def _package(module: str, distribution: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise BundleError(f"expected the package {module}, found none; pip install {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


def _cudart() -> Path:
    package, file = CUDART
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / file).exists():
            return found
    raise BundleError(f"expected {package}/{file}, found none; pip install 'llmc[cuda]'")


def compile_shape(shape: str, target: str, folder: Path, scheme: str | None = None) -> Path:
    """An artifact of a shape with random weights, to serve contexts of up to CONTEXT tokens; in a scheme of
    quantization, if one is given. Raises CompileError.
    """
    import llmc

    config = shapes.write_config(shape, folder / shape)
    made = {} if scheme is None else {"quantize": scheme}
    suffix = "" if scheme is None else "-" + re.sub(r"[^a-z0-9.-]+", "-", scheme)
    output = folder / f"{shape}{suffix}.llmc"
    return llmc.compile(
        config, target, weights="random", max_context=CONTEXT, output=output, overwrite=True, progress=True, **made
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifact", type=Path, nargs="*")
    parser.add_argument("--shape", action="append", default=[], choices=sorted(shapes.SHAPES))
    parser.add_argument("--quantize", action="append", default=[], help="a scheme, e.g. int4, beside the floats")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--python", help="version of the other machine's Python, e.g. 3.12")
    given = parser.parse_args(arguments)
    try:
        made = [
            compile_shape(shape, given.target, given.out.parent, *scheme)
            for shape in given.shape
            for scheme in ((), *((name,) for name in given.quantize))
        ]
        if not made + given.artifact:
            raise BundleError("expected an artifact or a --shape, found none")
        print(bundle(given.out, [*given.artifact, *made], given.python))
    except (ArtifactError, BundleError, CompileError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        for shape in given.shape:
            shutil.rmtree(given.out.parent / shape, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
