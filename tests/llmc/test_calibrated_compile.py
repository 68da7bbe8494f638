"""llmc.compile(calibrate=...): models whose activations have outliers, scaled and rounded, through the whole path."""

import shutil
from pathlib import Path

import pytest
import torch

import llmc
from tests.frontend.conftest import make
from tests.perplexity import perplexity

TINY = Path(__file__).parents[1] / "data" / "tiny-python"
SHAPE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256}


QKV = [f"self_attn.{s}_proj.weight" for s in "qkv"]
GATED = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
EXPERTS = ["mlp.gate.weight", "mlp.experts.gate_up_proj"]
# Norms of a layer, and what reads them.
READERS = {
    "llama": {"input_layernorm": QKV, "post_attention_layernorm": GATED},
    "gemma2": {"input_layernorm": QKV, "pre_feedforward_layernorm": GATED},
    "mixtral": {"input_layernorm": QKV, "post_attention_layernorm": EXPERTS},
}


def publish(kind, folder):
    """A small model with a few activations 32 times as large as the others, met by weights as much smaller; a
    tokenizer; and a text."""
    model = make(kind, **SHAPE)
    parameters = dict(model.named_parameters())
    one = float(kind == "gemma2")  # which is added to what its norms store
    with torch.no_grad():
        for layer in range(2):
            for norm, readers in READERS[kind].items():
                weight = parameters[f"model.layers.{layer}.{norm}.weight"]
                weight[3::23] = 32 * (weight[3::23] + one) - one
                for reader in readers:
                    parameters[f"model.layers.{layer}.{reader}"][..., 3::23] /= 32
    model.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    text = folder / "text.py"
    text.write_text((TINY / "heldout.txt").read_text()[60_000:66_000])
    return text


def compiled(kind, folder, quantize, thorough):
    """-> facts of the manifest, what inspect shows, the perplexity that the artifact gives itself; and if it is to be
    thorough (verified pass by pass, too), calls of kernels with calibration and without."""
    text, asked = publish(kind, folder), {"quantize": quantize, "max_context": 64}
    path = llmc.compile(folder, calibrate=text, quality=text, verify=thorough, output=folder / "a.llmc", **asked)
    paths = [path, llmc.compile(folder, quality="none", output=folder / "b.llmc", **asked)] if thorough else []
    with llmc.load(path) as model:
        found, _ = perplexity(model, text.read_text(), 64)
    calls = [sum(k["calls"] for k in llmc.inspect(p).manifest.targets[0].kernels) for p in paths]
    return dict(llmc.inspect(path).manifest.model), str(llmc.inspect(path)), found, calls


CASES = [
    ("llama", "int4", ["self_attn.q_proj", "mlp.gate_proj"], False),
    pytest.param("llama", "nf4-g64", ["mlp.gate_proj"], True, marks=pytest.mark.slow),
    pytest.param("gemma2", "int4:head=none", ["mlp.gate_proj"], True, marks=pytest.mark.slow),
    pytest.param("mixtral", "int3-g32", ["experts.gate_up_proj"], True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "quantize", "names", "thorough"), CASES)
def test_kernels_compute_what_calibration_chose(kind, quantize, names, thorough, tmp_path, isolated):
    facts, shown, found, calls = isolated(compiled, kind, tmp_path, quantize, thorough, timeout=500)
    scaled = facts["calibration"]["scaled"]
    assert all(any(name in weight for weight in scaled) for name in names), scaled
    assert not any("o_proj" in weight for weight in scaled)
    assert len(set(calls)) == thorough, "a factor is no kernel"
    # what the evaluator says of the weights that were chosen is what the kernels give
    assert found == pytest.approx(facts["quality"]["perplexity"], rel=1e-3)
    assert abs(facts["quality"]["perplexity"] / facts["quality"]["unquantized"] - 1) > 1e-3
    count = facts["calibration"]["weights"]
    assert f"inputs scaled (AWQ) of {len(scaled)} of {count} weights" in shown
    assert f"calibrated on {tmp_path / 'text.py'}: rows rounded " in shown and "to second order (GPTQ)" in shown


def scaled(folder, target):
    text = publish("llama", folder)
    made = dict(quantize="int4", calibrate=text, quality="none", max_context=64)
    path = llmc.compile(folder, target, output=folder / "a.llmc", **made)
    assert llmc.inspect(path).manifest.model["calibration"]["scaled"]
    return path


@pytest.mark.slow
def test_scaled_weights_on_gpus(tmp_path, isolated):
    """The factor before a product, in kernels of every family."""
    targets = ("cuda:sm_90", "rocm:gfx942", "metal")
    path = isolated(scaled, tmp_path, ",".join(targets), timeout=500)
    for target in targets:
        found = llmc.verify(path, target)
        assert found.passed and found.bound == 1e-4, str(found)
