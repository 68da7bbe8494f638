"""llmc.verify: what it refuses, what it reports, and a whole model on the software device."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest

import llmc
from llmc.cli import main
from llmc.codegen.software_device import DeviceFault
from llmc.ir.errors import CompileError
from llmc.runtime import artifact
from llmc.runtime.executor import Table
from llmc.targets import cuda, rocm
from llmc.verification import Report, choose
from llmc.verification_worker import Sequences, Step, compared, error_bound, from_copies, steps_of, work
from tests.conftest import TINY_PYTHON

STEP = {"name": "decode", "tokens": 2, "error": 1e-6, "seconds": 1.5}


def report(**changes):
    return Report(**{"artifact": "tiny", "target": "metal", "dtype": "float16", "kernels": 9, "bound": 1e-4,
                     "steps": (STEP,)} | changes)  # fmt: skip


def test_a_cpus_target_needs_no_device(tiny_python):
    with pytest.raises(llmc.ArtifactError, match="is a CPU's: there is no device to stand in for; load it, or"):
        llmc.verify(tiny_python, "cpu")


def test_no_such_target(tiny_python):
    with pytest.raises(llmc.ArtifactError, match="no target 'metal' in this artifact; it has: cpu:"):
        llmc.verify(tiny_python, "metal")


def test_one_of_several_is_named(tiny_python):
    manifest = artifact.read(tiny_python)
    sources = artifact.Sources("src/x.zip", "", {})
    [entry] = manifest.targets
    several = dataclasses.replace(
        manifest,
        targets=tuple(
            dataclasses.replace(entry, target=f"cuda:{arch}", kind="cuda", sources=sources)
            for arch in ("sm_80", "sm_90")
        ),
    )
    assert choose(several, "cuda:sm_90").target == "cuda:sm_90"
    with pytest.raises(llmc.ArtifactError, match="'cuda' is several of its targets: name one of cuda:sm_80, cuda:sm_9"):
        choose(several, "cuda")


def test_what_is_reported():
    assert report().passed
    assert "decode                            2 tokens   error 1.0e-06 of the spread" in str(report())
    assert str(report()).endswith("passed")
    far = report(steps=(STEP, STEP | {"error": 2e-4}))
    assert not far.passed and "more than 1.0e-04" in str(far)
    fault = report(fault="race: kernel softmax, …")
    assert not fault.passed and "fault: race: kernel softmax" in str(fault) and str(fault).endswith("FAILED")
    assert not report(steps=()).passed


def test_bounds_grow_with_the_root_of_the_depth():
    assert error_bound("float32", 100) == 1e-4
    assert error_bound("bfloat16", 16) == pytest.approx(2 * error_bound("bfloat16", 4))
    assert error_bound("float16", 4) < 0.01 < error_bound("bfloat16", 4) < 0.1
    assert error_bound("float32", 4, "int8") < 1e-3 < error_bound("float32", 4, "fp8") < 4e-3
    assert error_bound("float32", 4, None, ["int8"]) < 4e-3 < error_bound("float32", 4, None, ["int8", "fp8"]) < 2e-2
    assert error_bound("float32", 4, "int8", ["int8"]) > error_bound("float32", 4, None, ["int8"])
    assert error_bound("float16", 4, "int8") < 0.02 < error_bound("float16", 4, "fp8") < 0.05


def test_steps_after_the_first_read_copies():
    """Of a group with a window, too, whose first page goes back to whoever asks: it is still the copy on the device."""
    groups = [artifact.StateGroup("paged", 16, window, 0, (0,), ()) for window in (0, 4)]
    sequences = Sequences(groups, 99)
    (_, first), (_, second), *_ = steps_of(16)
    tokens, _ = sequences.arguments(first)
    assert len(tokens) == 19
    copies = sequences.whole_pages("a", [33, 40])
    [[source, copy], [other, other_copy]] = [next(iter(pages.items())) for pages in copies]
    assert (copy, other_copy) == (32, 39) and source in sequences.pages[0].held["a"] and other
    _, rest = sequences.arguments(second)
    tables = from_copies(rest, copies)[-1]
    assert copy in tables[0].kv_indices and source not in tables[0].kv_indices
    assert tables[0].kv_indptr.tolist() == rest[-1][0].kv_indptr.tolist()
    expected = [other_copy if page == other else page for page in rest[-1][1].kv_indices.tolist()]
    assert tables[1].kv_indices.tolist() == expected


class Summed:
    """An executor whose logits are sums of tokens: of a step's all, or of each sequence's where they are apart."""

    samples = False

    def __init__(self, apart):
        self.apart = apart

    def embed(self, tokens):
        return tokens.astype("float32")

    def step(self, hidden, positions, qo_indptr, logit_rows, tables):
        ends = qo_indptr if self.apart else qo_indptr[[0, -1]]
        sums = np.repeat(np.add.reduceat(hidden, ends[:-1]), np.diff(ends))
        used = [table.kv_indices[table.kv_indptr[:-1]] for table in tables]  # the first page of each sequence
        first = np.repeat(used[0], np.diff(qo_indptr))
        return np.stack([sums, positions[0], first], 1)[logit_rows].astype("float32")

    def fetch(self, logits):
        return logits

    def copy_pages(self, group, source, target):
        pass


@pytest.mark.parametrize("apart", [True, False])
def test_batch_invariant_functions_are_given_each_sequence_by_itself(apart):
    tokens = np.arange(1, 11, dtype="int32")
    tables = [Table(*(np.array(a, "int32") for a in ([0, 2, 3], [4, 5, 6], [3, 9])))]
    rest = (np.array([[19, *range(9)]], "int32"), np.array([0, 1, 10], "int32"), np.arange(10, dtype="int32"), tables)
    machines = {"forward": Summed(apart), "reverse": Summed(apart)}
    nothing = [{}]
    step = Step("mixed", tokens, rest, Summed(apart).step(tokens, *rest), nothing, nothing)
    [plain] = compared(machines, [step], invariant=False)
    assert (plain["name"], plain["error"]) == ("mixed", 0)
    if apart:
        [found] = compared(machines, [step], invariant=True)
        assert (found["name"], found["tokens"], found["error"]) == ("mixed, invariant", 10, 0)
    else:
        with pytest.raises(DeviceFault, match="mixed: lanes in reverse order give other logits: a race, or sums that"):
            list(compared(machines, [step], invariant=True))


def test_an_artifact_without_loops_to_compare_with(tiny_python, tmp_path):
    """As an earlier version wrote it."""
    (tmp_path / "src").mkdir()
    with zipfile.ZipFile(tmp_path / "src" / "x.zip", "w") as sources:
        sources.writestr("module.json", "{}")
        sources.writestr("kernels.cu", "")
    manifest = artifact.read(tiny_python)
    [entry] = manifest.targets
    made = artifact.Sources("src/x.zip", "", {})
    entry = dataclasses.replace(entry, target="cuda:sm_90", kind="cuda", host="linux-x86_64", sources=made)
    artifact.write(tmp_path, dataclasses.replace(manifest, targets=(entry,)))
    with pytest.raises(
        CompileError, match=r"src/x.zip: expected reference.json, found module.json, kernels.cu: an llmc"
    ):
        work(tmp_path, "cuda:sm_90", "linux-x86_64")


@pytest.mark.parametrize("found, code", [(report(), 0), (report(fault="race"), 1)])
def test_exit_codes(found, code, tiny_python, monkeypatch, capsys):
    monkeypatch.setattr(llmc, "verify", lambda path, target: found, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tiny_python), "--target", "metal"])
    assert (ended.value.code or 0) == code
    assert capsys.readouterr().out.splitlines()[-1] == ("passed" if code == 0 else "FAILED")


def test_a_report_as_json(tiny_python, monkeypatch, capsys):
    step = {"name": "decode", "tokens": 2, "error": float("inf"), "seconds": 0.1}
    found = dataclasses.replace(report(), steps=(step,))
    monkeypatch.setattr(llmc, "verify", lambda path, target: found, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tiny_python), "--target", "metal", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and told["passed"] is False and told["bound"] == found.bound
    assert told["steps"] == [step | {"error": None}]


def test_a_wrong_target_is_wrong_usage(tiny_python, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tiny_python), "--target", "metal"])
    assert ended.value.code == 2
    assert "no target 'metal' in this artifact" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["cuda:sm_90", "rocm:gfx942", "metal"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_whole_model(target, dtype, tmp_path):
    path = llmc.compile(TINY_PYTHON, target, output=tmp_path / "tiny.llmc", dtype=dtype)
    found = llmc.verify(path, target)
    assert found.passed, str(found)
    assert [step["tokens"] for step in found.steps] == [19, 10, 2, 2] * 2
    assert [step["name"] for step in found.steps][3:5] == ["decode", "prefill, invariant"]


# Of each architecture beside those above, one dtype; PTX for later cards is written as machine code is.
OTHERS = {
    "cuda:sm_80": "float16", "cuda:sm_86": "bfloat16", "cuda:sm_89": "float16", "cuda:sm_100": "bfloat16",
    "cuda:sm_120": "float16", "cuda:compute_80": "bfloat16", "rocm:gfx90a": "bfloat16", "rocm:gfx1100": "float16",
    "rocm:gfx1201": "bfloat16",
}  # fmt: skip


def test_every_architecture_is_there():
    known = {f"cuda:{a}" for a in (*cuda.GENERIC, *cuda.ARCHITECTURES)} | {f"rocm:{a}" for a in rocm.ARCHITECTURES}
    assert known == {*OTHERS, "cuda:sm_90", "rocm:gfx942"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", OTHERS)
def test_a_whole_model_on_other_architectures(target, tmp_path):
    path = llmc.compile(TINY_PYTHON, target, output=tmp_path / "tiny.llmc", dtype=OTHERS[target])
    found = llmc.verify(path, target)
    assert found.passed, str(found)
    assert found.dtype == OTHERS[target] and len(found.steps) == 8


def greedy(path, target, prompt):
    """64 greedy tokens of an artifact's GPU target on the software device, through the runtime's own engine."""
    import zipfile
    from pathlib import Path

    import tvm

    from llmc import targets
    from llmc.codegen.library import machine_code
    from llmc.codegen.software_device import device
    from llmc.runtime.devices.gpu import GpuExecutor
    from llmc.runtime.engine import Engine
    from llmc.runtime.model import Model

    manifest = artifact.read(path)
    [entry] = [t for t in manifest.targets if t.target == target]
    [facts] = targets.parse(target)
    with zipfile.ZipFile(Path(path) / entry.sources.file) as sources:
        module = tvm.ir.load_json(sources.read("module.json").decode())
    device.install(entry.kind, strict=False)
    executable, _ = machine_code(module, tvm.target.Target(facts.tvm(), host={"kind": "llvm"}))
    machine = executable.mod["vm_load_executable"]()
    executor = GpuExecutor(Path(path), manifest, entry, cache_tokens=256, machine=machine)
    with Model(manifest, Engine(executor), target=target) as model:
        return model.generate(prompt, max_tokens=64, ignore_eos=True).token_ids


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["cuda:sm_90", "rocm:gfx942", "metal"])
def test_greedy_tokens_are_the_cpus(target, tiny_python, tmp_path, isolated):
    path = llmc.compile(TINY_PYTHON, target, output=tmp_path / "tiny.llmc", dtype="float32")
    with llmc.load(tiny_python) as model:
        prompt = model.tokenizer.encode("def read_lines(path):")
        expected = model.generate(prompt, max_tokens=64, ignore_eos=True).token_ids
    assert isolated(greedy, str(path), target, prompt, timeout=3000) == expected
