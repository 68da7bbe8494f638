"""Encoded weights in files, and a compilation that is killed and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import llmc
from llmc.passes import schemes
from llmc.quantization import EncodedWeights, Plan
from llmc.spill import Spill
from tests.quality.test_part import Lazy

TINY = Path(__file__).parents[1] / "data" / "tiny-python"
KINDS = {"codes": ((6, 4), "uint8"), "scales": ((6, 1), "bfloat16"), "zeros": ((6, 1), "uint8")}


def parts(rng):
    import ml_dtypes

    scales = rng.standard_normal((6, 1)).astype(ml_dtypes.bfloat16)
    return {
        "codes": rng.integers(0, 256, (6, 4), "uint8"),
        "scales": scales,
        "zeros": np.arange(6, dtype="uint8")[:, None],
    }


def test_what_is_written_is_found(tmp_path):
    spill, own = Spill(tmp_path / "encoded"), parts(np.random.default_rng(0))
    assert spill.find("a/b.weight", KINDS) is None
    pieces = [("scales", 0, own["scales"]), ("codes", 2, own["codes"][2:]), ("zeros", 0, own["zeros"])]
    written = spill.write("a/b.weight", KINDS, iter([*pieces, ("codes", 0, own["codes"][:2])]))
    found = Spill(tmp_path / "encoded").find("a/b.weight", KINDS)
    for name, part in own.items():
        np.testing.assert_array_equal(written[name], part)
        np.testing.assert_array_equal(found[name], part)
    assert len(list(tmp_path.rglob("*.weight"))) == 1
    spill.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_half_written_is_not_found(tmp_path):
    spill, own = Spill(tmp_path), parts(np.random.default_rng(0))

    def stopped():
        yield "codes", 0, own["codes"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spill.write("w", KINDS, stopped())
    assert spill.find("w", KINDS) is None
    spill.write("w", KINDS, ((name, 0, part) for name, part in own.items()))
    np.testing.assert_array_equal(spill.find("w", KINDS)["scales"], own["scales"])


def test_facts_are_made_once(tmp_path):
    assert Spill(tmp_path).once("quality", lambda: {"perplexity": 1.5}) == {"perplexity": 1.5}
    assert Spill(tmp_path).once("quality", lambda: 1 / 0) == {"perplexity": 1.5}


@pytest.mark.parametrize("turned", [False, True])
def test_spilled_weights_are_those_that_are_encoded_when_read(turned, tmp_path, monkeypatch):
    """And a weight is read once, however often its parts are."""
    from llmc import quantization

    reads = []

    class Counted(Lazy):
        def read(self, start=0, stop=None):
            reads.append((start, stop))
            return super().read(start, stop)

    weight = np.random.default_rng(0).standard_normal((96, 64)).astype("float32")
    plan = Plan("int4", {"w": schemes.parse("int4")}, transposed=frozenset("w" if turned else ""))
    want = EncodedWeights({"w": Lazy(weight)}, plan)
    monkeypatch.setattr(quantization, "SLICE", 64 * 10)
    found = EncodedWeights({"w": Counted(weight)}, plan, spill=Spill(tmp_path))
    assert found.kinds("w") == want["w:codes"].encoding.kinds and not reads
    for _ in range(2):
        for part in ("scales", "codes"):
            np.testing.assert_array_equal(found[f"w:{part}"].read(5, 30), want[f"w:{part}"].read(5, 30))
            np.testing.assert_array_equal(found[f"w:{part}"].read(), want[f"w:{part}"].read())
    assert turned or sorted(reads) == [(i, min(i + 10, 96)) for i in range(0, 96, 10)]
    again = EncodedWeights({"w": None, "w2": None}, plan, spill=Spill(tmp_path))
    again.weights["w"] = Lazy(np.zeros_like(weight))  # of the file, not encoded anew
    np.testing.assert_array_equal(again["w:codes"].read(), want["w:codes"].read())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A little model with a tokenizer, and a text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64)).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    (folder / "text.py").write_text((TINY / "heldout.txt").read_text()[60_000:63_000])
    return folder


def die(code, output):
    """Runs code in a process that is killed in it; -> the files of encoded weights that are there then, and their
    times."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return {file: os.stat(file).st_mtime_ns for file in (output / "encoded").iterdir() if file.suffix != ".partial"}


KILL = """
import os, signal
def progress(stage, share):
    if stage == {stage!r} and share >= {share}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def refine(small, folder, progress):
    """Calibrates; -> all codes."""
    from llmc import quantization
    from llmc.frontend import huggingface
    from llmc.refinement import refined

    request = SimpleNamespace(calibrate=small / "text.py", quality="none", weights="load", quantize="int4")
    door = quantization.prepare(huggingface.load(small), "int4")
    with refined({"float32": door}, request, folder, progress) as (doors, _):
        weights = doors["float32"].weights
        return {name: np.array(weights[f"{name}:codes"].read()) for name in weights.plan.schemes}


def test_a_calibration_that_was_killed_goes_on(small, tmp_path):
    """What was encoded before is not encoded again, and all comes out as if nothing had happened."""
    folder = tmp_path / "a"
    code = f"""{KILL.format(stage="calibrating", share=0.5)}
from pathlib import Path
from tests.llmc.test_spill import refine
refine(Path({str(small)!r}), Path({str(folder)!r}), progress)
"""
    before, touched = die(code, folder), []

    def progress(stage, share):
        touched.extend(file for file, time in before.items() if os.stat(file).st_mtime_ns != time)

    codes = refine(small, folder, progress)
    encoded = [file for file in before if file.suffix != ".json"]  # beside factors of inputs and counts of rows
    assert 0 < len(encoded) < len(codes) and not touched and not list(folder.iterdir())
    whole = refine(small, tmp_path / "b", lambda stage, share: None)
    assert codes.keys() == whole.keys()
    for name in codes:
        np.testing.assert_array_equal(codes[name], whole[name])


@pytest.mark.slow
@pytest.mark.parametrize("quantize, calibrate", [("int4", False), ("auto:5", True)])
def test_a_compilation_that_was_killed_goes_on(small, tmp_path, quantize, calibrate):
    text, output = str(small / "text.py"), tmp_path / "a.llmc"
    options = {"quantize": quantize, "quality": text} | ({"calibrate": text} if calibrate else {})
    code = f"""{KILL.format(stage="packing weights", share=0.4)}
import llmc
llmc.compile({str(small)!r}, output={str(output)!r}, progress=progress, **{options!r})
"""
    before = die(code, output.with_name("a.llmc.partial"))
    facts = {file.stem for file in before if file.suffix == ".json"}
    of_all = {fact for fact in facts if "%20of%20" not in fact}  # the others are of a weight's calibration
    assert of_all == ({"schemes", "quality"} if calibrate else {"quality"}) and len(before) > len(facts)
    touched, stages = set(), []

    def progress(stage, share):
        stages.append(stage)
        if stage == "packing weights":
            touched.update(file for file, time in before.items() if os.stat(file).st_mtime_ns != time)

    path = llmc.compile(small, output=output, progress=progress, **options)
    assert not touched and not {"measuring quality", "spending the budget"} & set(stages)
    assert not (path / "encoded").exists()
    whole = llmc.compile(small, output=tmp_path / "b.llmc", **options)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (path, whole)]
    assert manifests[0]["weights"] == manifests[1]["weights"]
    assert manifests[0]["model"]["quality"] == manifests[1]["model"]["quality"]
