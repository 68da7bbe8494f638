"""The benchmark of cards: its arithmetic, its files, and all of it on the CPU; speeds themselves are never a test."""

import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from llmc.bench import gpu, roof
from llmc.bench.shapes import SHAPES
from llmc.runtime.errors import ArtifactError

TINY = Path(__file__).parents[1] / "data" / "tiny-python" / "config.json"
TASKS = {"decode-2": {"context": 16, "batch": 2, "steps": 3}, "prefill-16": {"tokens": 16}}
SHAPE = SHAPES["llama-3.1-8b"]


def row(**changed):
    measured = {"decode-8": {"seconds": 0.01, "context": 512.0}, "prefill-512": {"seconds": 0.1, "context": 0.0}}
    made = {
        "date": "2026-01-02",
        "artifact": "llama-3.1-8b",
        "target": "cuda:sm_90",
        "dtype": "bfloat16",
        "card": dict(name="NVIDIA H100 80GB HBM3", kind="cuda", dtype="bfloat16", bandwidth=3e12, matmul=7e14),
        "config": SHAPE,
        "llmc": measured,
        "transformers": {"decode-8": {"seconds": 0.02, "context": 512.0}, "prefill-512": {"error": "no room"}},
        "logits": dict(llmc=0.01, transformers=0.02, allowed=0.1, same_best_token=0.97, reference="float32"),
    }
    return made | changed


def test_rates_shares_and_ratios():
    tasks = {name: gpu.TASKS[name] for name in ("decode-8", "prefill-512", "decode-1")}
    found = gpu.shares(row(), tasks)
    moved = 2 * (7504658432 + 8 * 512 * 65536)  # weights but the table of tokens, and the cache, of 2 bytes
    assert found["decode-8"]["llmc"] == {"rate": 800.0, "share": pytest.approx(moved / 3e12 / 0.01)}
    assert found["decode-8"]["ratio"] == 2.0
    assert found["prefill-512"]["transformers"] is None and found["prefill-512"]["ratio"] is None
    computed = roof.LlamaCosts(SHAPE, 2).prefill(512).flops
    assert found["prefill-512"]["llmc"]["share"] == pytest.approx(computed / 7e14 / 0.1)
    assert found["decode-1"] == {"llmc": None, "transformers": None, "ratio": None}


def test_the_roof_of_quantized_weights_is_that_of_their_bytes():
    tasks = {"decode-8": gpu.TASKS["decode-8"]}
    found = gpu.shares(row(weight_width=0.5625), tasks)["decode-8"]["llmc"]
    assert found["share"] == pytest.approx((0.5625 * 7504658432 + 2 * 8 * 512 * 65536) / 3e12 / 0.01)


def test_artifacts_of_a_shape_stand_beside_the_first():
    tasks = {name: gpu.TASKS[name] for name in ("decode-8", "prefill-512")}
    quick = {"decode-8": {"seconds": 0.004, "context": 512.0}, "prefill-512": {"error": "no room"}}
    rows = [row(), row(artifact="llama-3.1-8b-int4", weight_width=0.5625, llmc=quick)]
    text = gpu.beside(rows, tasks)
    assert "llama-3.1-8b-int4 beside llama-3.1-8b" in text and "- decode-8: 2.50 (" in text
    assert "prefill-512" not in text
    assert gpu.beside(rows[:1], tasks) == ""


def test_the_table_says_all_of_it():
    text = gpu.table(row(), {name: gpu.TASKS[name] for name in ("decode-8", "prefill-512")})
    assert "copies at 3000 GB/s" in text and "at 700.0 TFLOP/s" in text and "Logits agree with float32: 0.01" in text
    assert "| decode-8 | 800.0 | 52% | 400.0 | 26% | 2.00 |" in text
    assert "| prefill-512 | 5120.0 |" in text and "| failed |  |  |" in text and "prefill-512: no room" in text
    wrong = row()["logits"] | {"llmc": 0.2}
    assert "DO NOT AGREE" in gpu.table(row(logits=wrong), {})


def test_results_are_appended(tmp_path):
    for _ in range(2):
        file = gpu.write(row(), tmp_path, {})
    assert file == tmp_path / "gpu-nvidia-h100-80gb-hbm3-2026-01-02.md"
    assert file.read_text().count("## llama-3.1-8b") == 2
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["artifact"] for line in lines] == ["llama-3.1-8b"] * 2


def test_tolerance_follows_dtype_and_depth():
    assert gpu.tolerance("float32", SHAPE) < 1e-3 < gpu.tolerance("float16", SHAPE) < gpu.tolerance("bfloat16", SHAPE)
    assert gpu.tolerance("bfloat16", SHAPE) == pytest.approx(
        2 * gpu.tolerance("bfloat16", SHAPE | {"num_hidden_layers": 8})
    )
    assert gpu.tolerance("bfloat16", SHAPE) < 0.2
    exact = np.random.default_rng(0).standard_normal((4, 1000))
    assert gpu.distance(exact, exact) == 0 and gpu.distance(exact + 0.1, exact) == pytest.approx(0.1, rel=0.1)


def test_what_does_not_fit_is_told_and_the_rest_measured():
    def ask(name, **task):
        if task.get("batch") == 2:
            raise MemoryError("out of memory\nand more")
        return 0.5

    found = gpu.run(ask, TASKS, rounds=1)
    assert found["decode-2"] == {"error": "MemoryError: out of memory"}
    assert found["prefill-16"] == {"seconds": 0.5, "context": 0.0}

    def crash(name, **task):
        raise BrokenProcessPool("killed")

    with pytest.raises(BrokenProcessPool):
        gpu.run(crash, TASKS, rounds=1)


def test_configs(tmp_path):
    assert gpu.config_of(Path("x/llama-3.2-1b.llmc"), None) is SHAPES["llama-3.2-1b"]
    assert gpu.config_of(Path("llama-3.1-8b-int4-g64.llmc"), None) is SHAPES["llama-3.1-8b"]
    assert gpu.config_of(Path("x.llmc"), TINY)["model_type"]
    with pytest.raises(ArtifactError, match="expected a name out of llama"):
        gpu.config_of(Path("x.llmc"), None)


def test_without_a_card(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["llama-3.2-1b.llmc"]) == 2
    assert "expected a GPU that PyTorch can use, found none" in capsys.readouterr().err
    assert gpu.main(["nothing.llmc", "--device", "cpu"]) == 2
    assert "expected a name out of" in capsys.readouterr().err


def test_all_of_it_on_the_cpu(tiny_python, tmp_path):
    config = gpu.config_of(tiny_python, TINY)
    card = roof.measure("cpu", "float32", copied=1 << 20, size=64, repeats=2)
    found = gpu.bench(tiny_python, config, card, device="cpu", tasks=TASKS, compiled=False, rounds=1)
    assert found["logits"]["reference"] == "transformers in float32"
    assert found["logits"]["llmc"] <= found["logits"]["allowed"] < 1e-4
    assert found["logits"]["same_best_token"] == 1.0
    assert 2 < found["weight_width"] < 2.1  # the checkpoint's bfloat16, norms, and what fills panels
    for task in TASKS:
        for engine in ("llmc", "transformers"):
            assert found[engine][task]["seconds"] > 0, found[engine]
    assert 16 < found["llmc"]["decode-2"]["context"] < 32
    assert "| decode-2 |" in gpu.write(found, tmp_path, TASKS).read_text()


@pytest.mark.slow
def test_the_baseline_compiles(tiny_python):
    from llmc.bench.gpu_engines import Baseline

    baseline = Baseline(str(tiny_python), "cpu", gpu.config_of(tiny_python, TINY), "cpu")
    assert baseline.prefill(16) > 0
    assert baseline.steps(context=16, batch=2, steps=2)[0] > 0
