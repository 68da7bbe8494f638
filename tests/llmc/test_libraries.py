"""Several targets in one artifact, compiled on a machine that has none of them."""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc import targets
from llmc.libraries import Program, compute_dtype, share_recipes
from llmc.targets import toolchains

TINY_PYTHON = Path(__file__).parents[1] / "data" / "tiny-python"
TARGETS = "cuda:sm_90,rocm:gfx942,metal"


@pytest.mark.parametrize(
    ("target", "asked", "stored", "expected"),
    [
        ("cpu", None, "bfloat16", "float32"),
        ("cpu", "bfloat16", "float16", "bfloat16"),
        ("cuda:sm_90", None, "bfloat16", "bfloat16"),
        ("cuda:sm_90", None, "float32", "float32"),
        ("cuda:sm_90", None, "float8_e4m3fn", "float16"),
        ("rocm:gfx942", None, "bfloat16", "bfloat16"),
        ("metal", None, "bfloat16", "float16"),
        ("metal", None, "float16", "float16"),
        ("metal", "float32", "float16", "float32"),
    ],
)
def test_dtype_of_activations(target, asked, stored, expected):
    host = "linux-x86_64" if target.startswith(("cuda", "rocm")) else None
    assert compute_dtype(targets.parse(target, host)[0], asked, stored) == expected


def test_equal_recipes_are_shared_and_others_keep_apart():
    from tvm import relax

    def recipe(times):
        builder = relax.BlockBuilder()
        w = relax.Var("w", relax.TensorType((4, 4), "float32"))
        with builder.function("recipe", [w]):
            with builder.dataflow():
                out = builder.emit_output(relax.op.multiply(w, relax.const(times, "float32")))
            builder.emit_func_output(out)
        return builder.get()["recipe"].without_attr("global_symbol")

    def program(times):
        from llmc.codegen import Lowered

        return Program(None, "float32", Lowered(None, {"step": ["w:multiply"]}, {"w:multiply": recipe(times)}), [])

    programs = [program(np.float32(t)) for t in (2, 2, 3, 2, 3)]
    shared = share_recipes(programs)
    assert list(shared) == ["w:multiply", "w:multiply@2"]
    names = [p.lowered.weights["step"] for p in programs]
    assert names == [["w:multiply"], ["w:multiply"], ["w:multiply@2"], ["w:multiply"], ["w:multiply@2"]]
    assert shared["w:multiply@2"][1] is programs[2]


def test_missing_tools_are_told_before_anything_is_read(monkeypatch, tmp_path):
    absent = toolchains.Toolchain("NVRTC", "cuda", ("no_such_module",))
    monkeypatch.setattr(toolchains, "NEEDED", {"cuda": (absent,)})
    expected = r"compiling for cuda needs NVRTC; not found: no_such_module: pip install 'llmc\[cuda\]'"
    with pytest.raises(llmc.CompileError, match=expected):
        llmc.compile(tmp_path, "cuda:sm_90", host="linux-x86_64", output=tmp_path / "a.llmc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """tiny-python for one architecture of every family, in one artifact."""
    if toolchains.missing("cuda"):
        pytest.skip("needs llmc[cuda]")
    output = tmp_path_factory.mktemp("targets") / "tiny.llmc"
    return llmc.compile(TINY_PYTHON, TARGETS, host="linux-x86_64", output=output, max_context=256)


def test_one_artifact_for_three_families(compiled):
    manifest = llmc.inspect(compiled, check=True).manifest
    entries = {entry.target: entry for entry in manifest.targets}
    assert list(entries) == TARGETS.split(",")
    assert [e.host for e in manifest.targets] == ["linux-x86_64", "linux-x86_64", "macos-arm64"]
    assert [e.dtype for e in manifest.targets] == ["bfloat16", "bfloat16", "float16"]
    assert [e.arch for e in manifest.targets] == ["sm_90", "gfx942", "apple7"]
    # one copy of what lies alike
    assert entries["cuda:sm_90"].functions == entries["rocm:gfx942"].functions
    assert manifest.model["notes"][-1].startswith("metal computes in float16 (the checkpoint is in bfloat16, whose num")
    text = llmc.inspect(compiled).render(kernels=True)
    assert "target    metal on macos-arm64: lib/metal-macos-arm64.dylib" in text
    assert "sources src/metal.zip" in text and "float16 activations" in text


@pytest.mark.parametrize(("name", "suffix"), [("cuda-sm_90", ".cu"), ("rocm-gfx942", ".ll"), ("metal", ".metal")])
def test_sources_travel_and_are_tied_to_the_library(compiled, name, suffix):
    [entry] = [e for e in llmc.inspect(compiled).manifest.targets if e.sources.file == f"src/{name}.zip"]
    with zipfile.ZipFile(compiled / entry.sources.file) as file:
        assert {"module.json", f"kernels{suffix}"} <= set(file.namelist())
        source = file.read(f"kernels{suffix}").decode()
    assert len(entry.sources.kernels) > 10
    assert all(kernel in source for kernel in entry.sources.kernels)


def test_damaged_sources_are_found_but_do_not_stop_a_load(compiled, tmp_path):
    from llmc.runtime import artifact

    manifest = artifact.read(compiled)
    path = compiled / "src/metal.zip"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    try:
        with pytest.raises(llmc.ArtifactError, match=r"metal.zip: damaged: expected sha256"):
            llmc.inspect(compiled, check=True)
        artifact.check(compiled, manifest, manifest.targets[2])
    finally:
        path.write_bytes(content)


def test_sources_may_not_leave_the_folder(compiled, tmp_path):
    data = json.loads((compiled / "manifest.json").read_text())
    data["targets"][0]["sources"]["file"] = "../x.zip"
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(llmc.ArtifactError, match=r"the path '\.\./x\.zip' leaves the artifact's folder"):
        llmc.inspect(tmp_path)


def test_nothing_spills(compiled):
    for entry in llmc.inspect(compiled).manifest.targets:
        assert list(entry.sources.resources) == sorted(entry.sources.kernels)
        assert [name for name, each in entry.sources.resources.items() if each["spilled"]] == [], entry.target


def test_gates(compiled, golden):
    """Which kinds of kernels use the matrix units, and which load 16 bytes at a time, on every target."""
    found: dict[tuple[str, str], set[str]] = {}
    for entry in llmc.inspect(compiled).manifest.targets:
        for name, each in entry.sources.resources.items():
            kind = re.sub(r"\d*_kernel(_\d+)?$|_\d+x\d+_\w+$", "", name)  # without its shape and its launch
            words = found.setdefault((entry.target, kind), set())
            words |= {"matrix units"} if each["matrix"] else set()
            words |= {"16-byte loads"} if each["wide_loads"] else set()
    lines = [f"{target:13} {kind:16} {', '.join(sorted(words))}".rstrip() for (target, kind), words in found.items()]
    golden("gates.txt", "\n".join(lines) + "\n")
