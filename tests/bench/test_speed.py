"""The speed benchmark: its arithmetic and its processes; speeds themselves are never a test."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmc.bench import speed
from llmc.bench.bandwidth import ReadProbe
from llmc.bench.engines import Llmc, Prompts


def test_the_probe_reads_the_whole_buffer():
    probe = ReadProbe(nbytes=(1 << 24) + 4096, threads=2)
    assert probe._memchr(probe._address, 1, probe.nbytes) == probe._address
    assert probe._memchr(probe._address, 0, probe.nbytes) is None  # so every byte was looked at
    assert probe.read() > 0


def test_prompts_never_repeat():
    prompts = Prompts(1000)
    first, second = prompts(32), prompts(32)
    assert first != second
    assert min(first + second) >= 3 and max(first + second) < 1000


def test_table_has_medians_and_ratios():
    found = {
        "bandwidth": 20e9,
        "seconds": {
            "decode-128": {"llmc-float32": [0.1, 0.2, 0.1], "llama.cpp": [0.2, 0.2, 0.4]},
            "prefill-512": {
                "llmc-float32": [2.0],
                "llmc-bfloat16": [1.0],
                "llama.cpp": [4.0],
                "transformers-bfloat16": [4.0],
                "transformers-float32": [4.0],
            },
            "batch8-128": {"llmc-float32": [0.5]},
        },
    }
    text = speed.table(found)
    assert "| decode-128 | llmc-float32 | 10.0 | 5.0 to 10.0 |  |  |" in text
    assert "| decode-128 | llama.cpp | 5.0 | 2.5 to 5.0 | 2.00 |  |" in text
    assert "| prefill-512 | llama.cpp | 128.0 | 128.0 to 128.0 | 2.00 | 4.00 |" in text
    assert "| prefill-512 | transformers-bfloat16 | 128.0 | 128.0 to 128.0 |  | 4.00 |" in text
    assert "| prefill-512 | transformers-float32 | 128.0 | 128.0 to 128.0 | 2.00 |  |" in text
    assert "| batch8-128 | llmc-float32 | 16.0 |" in text
    assert "read bandwidth 20.0 GB/s" in text


def test_table_of_quantized_engines():
    seconds = {"llmc-int4": [0.1], "llmc-int4-g32-a8": [0.05], "llama.cpp-Q4_0": [0.2]}
    text = speed.table({"bandwidth": 1e9, "seconds": {"decode-128": seconds}, "weight_bytes": {"llmc-int4": 81e7}})
    assert "| task | engine | tokens/s | range | int4 / engine | int4-g32-a8 / engine |" in text
    assert "| decode-128 | llama.cpp-Q4_0 | 5.0 | 5.0 to 5.0 | 2.00 | 4.00 |" in text
    assert "weights on disk, MB: llmc-int4 810" in text and "computing time" not in text
    one_core = {"cpu_time_of_one_core": True, "load_average": 7.0}
    assert "one core's computing time, at a load average of 7.0" in speed.table(
        {"bandwidth": 1e9, "seconds": {}, **one_core}
    )


def test_engines_know_their_tasks_and_packages(monkeypatch):
    assert speed.tasks_of("llama.cpp") == speed.ENGINES["llama.cpp"]
    assert "decode-2048" in speed.tasks_of("llama.cpp-Q4_0") and "prefill-512" in speed.tasks_of("llmc-int3-g32")
    assert speed.installed("llmc-int4") and speed.installed("transformers-float32")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert not speed.installed("ctranslate2-int8") and speed.installed("llmc-int4")


def test_weights_are_counted_by_file_or_folder(tmp_path):
    (tmp_path / "model.bin").write_bytes(bytes(100))
    (tmp_path / "config.json").write_bytes(bytes(7))
    assert speed.weight_bytes(tmp_path) == speed.weight_bytes(tmp_path / "model.bin") == 100


def test_an_engine_that_dies_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"llama.cpp: the engine's process ended with exit code"):
        speed.Worker.start("llama.cpp", tmp_path / "missing.gguf")


@pytest.mark.parametrize("cpu_time", [False, True])
def test_an_engine_in_its_process(tiny_python, cpu_time):
    worker = speed.Worker.start("llmc-float32", tiny_python, cpu_time)
    try:
        assert worker.measure({"do": "decode", "context": 20, "batch": 2, "steps": 3})["seconds"] > 0
        assert worker.measure({"do": "prefill", "tokens": 20})["seconds"] > 0
    finally:
        worker.stop()
    assert worker.process.returncode == 0


def test_decode_measures_steps(tiny_python):
    engine = Llmc(str(tiny_python))
    assert 0 < engine.decode(context=16, batch=1, steps=4) < 60
    engine.model.close()


def test_shapes_can_be_written(tmp_path, monkeypatch):
    from llmc.bench import shapes

    small = {
        **shapes.SHAPES["smollm-135m"],
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    folder = shapes.write("small", tmp_path / "small")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1
    import ml_dtypes  # noqa: F401  # gives numpy its bfloat16
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"].astype(np.float32)
    assert 0.015 < table.std() < 0.025
    assert (Path(folder) / "tokenizer.json").exists()
