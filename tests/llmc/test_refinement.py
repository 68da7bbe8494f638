"""Quality in the compile, and calibration, through the front door."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import llmc
from llmc.ir.errors import CompileError
from llmc.refinement import refined
from tests.perplexity import perplexity

TINY = Path(__file__).parents[1] / "data" / "tiny-python"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text((TINY / "heldout.txt").read_text()[60_000:64_000])
    return file


def test_quality_is_that_of_the_artifact(text, tmp_path):
    """Perplexity and divergence in the manifest are what the compiled kernels give on the same windows."""
    done = []
    path = llmc.compile(
        TINY,
        quantize="int4",
        calibrate=text,
        quality=text,
        max_context=64,
        output=tmp_path / "t.llmc",
        progress=lambda stage, share: done.append(stage),
    )
    assert {"calibrating", "measuring quality"} <= set(done)
    assert not (path / "encoded").exists()
    with llmc.load(path) as model:
        facts = model.info.model["quality"]
        found, tokens = perplexity(model, text.read_text(), 64)
    assert facts["tokens"] == tokens and facts["window"] == 64 and facts["text"] == str(text)
    assert facts["perplexity"] == pytest.approx(found, rel=1e-3)
    assert 0 < facts["divergence"] < 0.1 and 0.8 < facts["agreement"] < 1
    shown = str(llmc.inspect(path))
    chosen = llmc.inspect(path).manifest.model["calibration"]
    assert chosen["text"] == str(text) and chosen["weights"] == 29 and f"calibrated on {text}: rows rounded " in shown
    assert sum(chosen["rows"].values()) == 4096 + 4 * (256 + 128 + 128 + 256 + 704 + 704 + 256)
    assert chosen["rows"]["plain"] >= 4096, "the table that is the head, too, is encoded by itself"
    assert f"unquantized {facts['unquantized']:.4g}" in shown and "damage  layer" in shown


def request(**given):
    return SimpleNamespace(**{"calibrate": None, "quality": None, "weights": "load", "quantize": None} | given)


def door(quantize=None, files=True):
    from dataclasses import replace

    from llmc import quantization
    from llmc.frontend import huggingface

    imported = huggingface.load(TINY, max_context=64)
    imported = imported if files else replace(imported, files={})
    return {"float32": quantization.prepare(imported, quantize)}


def refine(tmp_path, doors, **given):
    with refined(doors, request(**given), tmp_path, lambda stage, share: None) as (_, facts):
        return facts


def test_without_a_tokenizer_nothing_is_measured_unless_asked_for(tmp_path, text):
    doors = door("int8", files=False)
    (note,) = refine(tmp_path, doors)["notes"]
    assert note.startswith("quality was not measured: the bundled text: expected a model with a tokenizer")
    with pytest.raises(CompileError, match="expected a model with a tokenizer to read it, found none"):
        refine(tmp_path, doors, quality=text)


def test_what_cannot_be_measured_is_refused(tmp_path, text):
    with pytest.raises(CompileError, match=r"quality=.*: expected weights in floats and a scheme, found no quantize"):
        refine(tmp_path, door(), quality=text)
    with pytest.raises(CompileError, match=r"calibrate=.*found no quantize"):
        refine(tmp_path, door(), calibrate=text)
    doors = door("int8")
    with pytest.raises(CompileError, match=r"quality='x': .*found random weights"):
        refine(tmp_path, doors, quality="x", weights="random")
    assert refine(tmp_path, doors, weights="random") == refine(tmp_path, doors, quality="none") == {}
    with pytest.raises(CompileError, match=r"missing\.txt: expected a text file in UTF-8"):
        refine(tmp_path, doors, quality=tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("x = 1")
    with pytest.raises(CompileError, match="expected a text of at least 32 tokens, found"):
        refine(tmp_path, doors, calibrate=tmp_path / "short.txt")


def test_a_budget_becomes_a_plan(tmp_path, text):
    from llmc import quantization

    doors = door("auto:4.4")
    stages = []
    asked = request(quantize="auto:4.4", quality="none", calibrate=None)
    with refined(doors, asked, tmp_path, lambda stage, share: stages.append(stage)) as (found, facts):
        assert facts == {} and "spending the budget" in stages
        plan = quantization.plan_of(found["float32"])
        weights = found["float32"].weights
        used = {f"{name}:codes" for name in plan.schemes}
        assert plan.facts(weights, used)["bits_per_weight"] <= 4.4
        assert len({scheme.name for scheme in plan.schemes.values()}) > 1
        assert set(plan.schemes) == set(quantization.plan_of(doors["float32"]).schemes)
        name, scheme = next(iter(plan.schemes.items()))
        assert weights[f"{name}:scales"].shape[1] == scheme.format(weights[name].shape[1]).groups(
            weights[name].shape[1]
        )


def test_budgets_that_cannot_be_are_refused(tmp_path):
    from llmc import quantization

    for wrong in ("auto", "auto:", "auto:four", "auto:0", "auto:4:5"):
        with pytest.raises(CompileError, match=r"expected auto: and bits a weight, such as auto:4\.5"):
            quantization.parse(wrong)
    with pytest.raises(CompileError, match=r"quantize='auto:4': .*found random weights"):
        refine(tmp_path, door("auto:4"), quantize="auto:4", weights="random")
