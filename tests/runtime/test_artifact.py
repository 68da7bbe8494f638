"""The artifact: written and read back, and every way to be refused."""

import dataclasses
import json

import numpy as np
import pytest

from llmc.runtime import artifact
from llmc.runtime.artifact import (
    Function,
    Manifest,
    StateGroup,
    StateTensor,
    TargetEntry,
    WeightsEntry,
    WeightsWriter,
)
from llmc.runtime.errors import ArtifactError

HOST = artifact.machine_host()


def make(folder, **changes):
    """A small whole artifact, but for its library being no library."""
    (folder / "lib").mkdir(parents=True)
    (folder / "lib/cpu.so").write_bytes(b"\x7fELF library")
    (folder / "tokenizer.json").write_text("{}")
    with WeightsWriter(folder / "weights.safetensors", {"a": ((4, 8), "float32"), "b": ((3,), "bfloat16")}) as writer:
        writer["a"][:] = np.arange(32).reshape(4, 8)
    tensor = StateTensor("k_pages_0", (2, 8, 16), "float32")
    target = TargetEntry(
        target="cpu:generic",
        kind="cpu",
        host=HOST,
        features=(),
        library="lib/cpu.so",
        sha256=artifact.sha256(folder / "lib/cpu.so"),
        state=(StateGroup("paged", 16, 0, 0, (0,), (tensor,)),),
        functions={"embed": Function(("a",)), "step": Function(("a", "b"))},
        kernels=({"name": "matmul", "count": 3},),
    )
    manifest = Manifest(
        name="tiny",
        model={"vocab_size": 8, "max_context": 64},
        targets=(target,),
        weights=WeightsEntry(**writer.entry),
        llmc="0.1.0",
        files={"tokenizer.json": artifact.sha256(folder / "tokenizer.json")},
        stages=({"name": "textbook", "seconds": 0.5, "passes": []},),
        memory={"weights": 134},
    )
    manifest = dataclasses.replace(manifest, **changes)
    artifact.write(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "tiny.llmc")
    return tmp_path / "tiny.llmc"


def edit(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_was_written_is_read(tmp_path):
    manifest = make(tmp_path / "tiny.llmc")
    assert artifact.read(tmp_path / "tiny.llmc") == manifest
    assert not list((tmp_path / "tiny.llmc").glob("*.partial"))


def test_a_whole_artifact_passes_every_check(folder):
    seen = []
    manifest = artifact.check_all(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (134, 134)
    assert artifact.check(folder, manifest, manifest.targets[0])["a"][1, 0] == 8


def test_keys_of_later_versions_are_left_alone(folder):
    edit(folder, lambda d: d.update(later={"x": 1}))
    assert artifact.read(folder).name == "tiny"


def test_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="expected an artifact folder, found nothing there"):
        artifact.read(tmp_path / "none.llmc")
    (tmp_path / "file.llmc").write_text("x")
    with pytest.raises(ArtifactError, match="expected an artifact folder, found a file"):
        artifact.read(tmp_path / "file.llmc")
    (tmp_path / "empty.llmc").mkdir()
    with pytest.raises(ArtifactError, match=r"not an llmc artifact: it has no manifest.json; compile a model"):
        artifact.read(tmp_path / "empty.llmc")
    (tmp_path / "half.llmc.partial").mkdir()
    with pytest.raises(ArtifactError, match="a compilation that did not end"):
        artifact.read(tmp_path / "half.llmc.partial")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_manifest_that_is_not_json(folder, text):
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest.json: expected JSON.*damaged"):
        artifact.read(folder)


@pytest.mark.parametrize("text", ["[]", "{}", "3"])
def test_json_that_is_no_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="this is not an llmc artifact"):
        artifact.read(folder)


def test_other_versions_are_refused(folder):
    edit(folder, lambda d: d.update(format=2))
    with pytest.raises(ArtifactError, match=r"expected artifact format version 1, found 2 \(made by llmc 0.1.0\)"):
        artifact.read(folder)
    edit(folder, lambda d: d.update(format=1, abi=7))
    with pytest.raises(ArtifactError, match="expected step ABI version 1, found 7"):
        artifact.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("name"), "name: expected a value, found None"),
        (lambda d: d.update(name=3), "name: expected a string, found 3"),
        (lambda d: d.update(model=[]), "model: expected an object, found []"),
        (lambda d: d.update(targets={}), "targets: expected a list, found {}"),
        (lambda d: d.update(targets=[1]), "targets[0].: expected an object, found 1"),
        (lambda d: d["targets"][0].pop("library"), "targets[0].library: expected a value"),
        (lambda d: d["targets"][0].update(features=[1]), "targets[0].features[0]: expected a string, found 1"),
        (lambda d: d["targets"][0]["state"][0].update(page_size="16"), "targets[0].state[0].page_size: expected a num"),
        (lambda d: d["targets"][0]["state"][0].update(page_size=True), "targets[0].state[0].page_size: expected a num"),
        (
            lambda d: d["targets"][0]["state"][0]["tensors"][0].update(shape=["a"]),
            "tensors[0].shape[0]: expected a num",
        ),
        (lambda d: d["targets"][0]["functions"].update(step=[]), "targets[0].functions.step.: expected an object"),
        (lambda d: d["weights"].update(tensors={"a": 1}), "weights.tensors.a: expected a string, found 1"),
        (lambda d: d.update(files={"tokenizer.json": None}), "files.tokenizer.json: expected a string"),
        (lambda d: d["targets"][0]["functions"].pop("step"), "expected a function 'step', found ['embed']"),
        (lambda d: d["targets"][0]["functions"]["step"].update(weights=["z"]), "step takes the weight z, which the"),
        (lambda d: d["targets"][0]["state"][0].update(kind="slot"), "state group 0 is 'slot'; this llmc runs 'paged'"),
        (lambda d: d["targets"][0].update(state=[]), "expected state groups of one page size, found []"),
        (lambda d: d["targets"][0]["state"][0].update(page_size=0), "state group 0 has impossible sizes"),
        (lambda d: d["targets"][0]["state"][0].update(tensors=[]), "state group 0 has impossible sizes"),
    ],
)
def test_a_manifest_with_a_fault(folder, change, message):
    edit(folder, change)
    with pytest.raises(ArtifactError) as refused:
        artifact.read(folder)
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "", "lib/../../outside", "link/x"])
@pytest.mark.parametrize("where", ["library", "weights", "files"])
def test_a_path_that_leaves_the_folder(folder, path, where):
    (folder / "link").symlink_to(folder.parent)

    def change(data):
        if where == "library":
            data["targets"][0]["library"] = path
        elif where == "weights":
            data["weights"]["file"] = path
        else:
            data["files"][path] = "0" * 64

    edit(folder, change)
    with pytest.raises(ArtifactError, match="leaves the artifact's folder"):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["lib/cpu.so", "tokenizer.json"])
def test_a_changed_or_missing_file(folder, name):
    manifest = artifact.read(folder)
    with open(folder / name, "ab") as file:
        file.write(b"!")
    with pytest.raises(ArtifactError, match=f"{name}: damaged: expected sha256"):
        artifact.check(folder, manifest)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: the manifest names this file, found none"):
        artifact.check(folder, manifest)


def test_a_changed_header(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[4,8]", b"[8,4]"))
    with pytest.raises(ArtifactError, match="header: damaged: expected sha256"):
        artifact.check(folder, artifact.read(folder))


def test_a_tensor_that_the_file_lacks(folder):
    edit(folder, lambda d: d["weights"]["tensors"].update(c="0" * 64))
    with pytest.raises(ArtifactError, match="names the tensor c, the file does not have it"):
        artifact.check(folder, artifact.read(folder))


def test_a_changed_tensor_is_found_by_the_full_check_alone(folder):
    with open(folder / "weights.safetensors", "r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x01")
    artifact.check(folder, artifact.read(folder))
    with pytest.raises(ArtifactError, match="tensor a: damaged"):
        artifact.check_all(folder)


class TestChoosingATarget:
    def manifest(self, folder, *targets):
        base = artifact.read(folder)
        return dataclasses.replace(base, targets=tuple(dataclasses.replace(base.targets[0], **t) for t in targets))

    def test_the_one_with_most_features_that_are_there(self, folder):
        manifest = self.manifest(
            folder,
            {"target": "cpu:x86-64-v3", "features": ("avx2", "fma")},
            {"target": "cpu:x86-64-v4", "features": ("avx2", "fma", "avx512f")},
            {"target": "cpu:plain"},
        )
        have = {"AVX2", "fma", "avx512_bf16"}
        assert artifact.choose_target(manifest, features=have).target == "cpu:x86-64-v3"
        assert artifact.choose_target(manifest, features=have | {"avx512f"}).target == "cpu:x86-64-v4"
        assert artifact.choose_target(manifest, "cpu:plain", features=have).target == "cpu:plain"

    def test_missing_features_are_named(self, folder):
        manifest = self.manifest(folder, {"target": "cpu:znver4", "features": ("avx512f", "avx2")})
        with pytest.raises(ArtifactError, match="cpu:znver4 needs avx512f, avx2; missing: avx512f; compile it here"):
            artifact.choose_target(manifest, features={"avx2"})

    def test_no_such_target(self, folder):
        with pytest.raises(ArtifactError, match=r"no target 'cuda' in this artifact; it has: cpu:generic on "):
            artifact.choose_target(artifact.read(folder), "cuda")

    def test_another_host(self, folder):
        manifest = self.manifest(folder, {"host": "plan9-mips"})
        with pytest.raises(ArtifactError, match=rf"no target for this machine \({HOST}\).*cpu:generic on plan9-mips"):
            artifact.choose_target(manifest)

    def test_a_gpu_that_runs_it_comes_before_the_cpu(self, folder):
        manifest = self.manifest(
            folder,
            {"target": "cpu:plain"},
            {"target": "cuda:sm_80", "kind": "cuda"},
            {"target": "cuda:sm_90", "kind": "cuda"},
            {"target": "rocm:gfx942", "kind": "rocm"},
        )

        def chosen(target=None, runs=()):
            return artifact.choose_target(
                manifest, target, features=(), obstacle=lambda t: None if t.target in runs else f"{t.target} can't"
            ).target

        assert chosen() == "cpu:plain"
        assert chosen(runs={"cuda:sm_80"}) == "cuda:sm_80"
        assert chosen(runs={"cuda:sm_80", "cuda:sm_90"}) == "cuda:sm_90"
        assert chosen("cuda", runs={"cuda:sm_80", "rocm:gfx942"}) == "cuda:sm_80"
        with pytest.raises(ArtifactError, match="no target for this machine: cuda:sm_80 can't; cuda:sm_90 can't; comp"):
            chosen("cuda")

    def test_linux_and_llvm_spell_features_differently(self, folder):
        manifest = self.manifest(folder, {"features": ("avx512bf16", "+sse4.1", "sse4_2")})
        assert artifact.choose_target(manifest, features={"avx512_bf16", "sse4_1", "sse4_2"})

    def test_this_machine_knows_itself(self):
        assert artifact.machine_host().count("-") == 1
        assert all(f == f.lower() and "_" not in f for f in artifact.machine_features())
