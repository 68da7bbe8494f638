"""llmc.compile: the whole path on a real model, what it leaves behind, and what it refuses."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import llmc
from llmc.cli import main
from llmc.compiler import model_name

TINY_PYTHON = Path(__file__).parents[1] / "data" / "tiny-python"


@pytest.fixture(scope="module")
def reference():
    """transformers' own tiny-python in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TINY_PYTHON, dtype=torch.float32).eval()


def expected_logits(reference, tokens):
    import torch

    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].numpy()


def test_logits_are_those_of_transformers(tiny_python, reference):
    random = np.random.default_rng(0)
    sequences = [random.integers(2, 4096, n).tolist() for n in (1, 2, 17, 31, 64, 100)]
    with llmc.load(tiny_python) as model:
        found = model.logits(sequences)
    for tokens, logits in zip(sequences, found, strict=True):
        expected = expected_logits(reference, tokens)
        # float32 against float32 in another order of summation: 1e-4 of the spread is a hundred times the rounding.
        assert np.abs(logits - expected).max() <= 1e-4 * expected.std()


def test_greedy_text_is_that_of_transformers(tiny_python, reference):
    import torch

    with llmc.load(tiny_python) as model:
        prompt = model.tokenizer.encode("def read_lines(path):\n")
        completion = model.generate("def read_lines(path):\n", max_tokens=40)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
    assert completion.token_ids == expected.tolist()
    assert "path" in completion.text


def test_the_runtime_loads_no_compiler(tiny_python):
    code = (
        "import sys, llmc\n"
        f"with llmc.load({str(tiny_python)!r}) as model: model.generate('import ', max_tokens=4)\n"
        "assert not {'tvm', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_inspect(tiny_python):
    report = llmc.inspect(tiny_python, check=True)
    text = str(report)
    assert "llama: 4 layers, hidden size 256" in text
    assert "agree with their hashes" in text
    assert report.to_dict()["model"]["vocab_size"] == 4096
    assert "kernel" in report.render(kernels=True)


def test_inspect_after_a_pass():
    text = str(llmc.inspect(TINY_PYTHON, after="page_attention"))
    assert "paged_attention" in text
    with pytest.raises(llmc.CompileError, match="no pass is called 'page_attn'; there are: import, raise_positions"):
        llmc.inspect(TINY_PYTHON, after="page_attn")


def test_dump_and_verify(tmp_path):
    path = llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc", dump=tmp_path / "passes", verify=True)
    assert path.is_dir()
    written = [file.name.partition("-")[2] for file in sorted((tmp_path / "passes").iterdir())]
    assert written.index("page_attention.diff") < written.index("lower_matmul.diff")


def test_verify_sees_a_fault_in_what_was_built(tmp_path, monkeypatch):
    """The packed weights of one product are wrong: no pass can see it, the artifact can."""
    from llmc.codegen.weights import Recipe

    slices = Recipe.slices

    def faulty(recipe, *size):
        for rows in slices(recipe, *size):
            yield rows if any("down_proj" not in name for name in names(recipe)) else rows[..., ::-1]

    def names(recipe):
        return [str(name) for name in recipe.function.attrs["llmc.sources"]]

    monkeypatch.setattr(Recipe, "slices", faulty)
    with pytest.raises(llmc.CompileError, match="the kernels changed what the program computes: expected") as error:
        llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc", verify=True)
    assert error.value.stage == "kernels"
    assert not (tmp_path / "a.llmc").exists()


@pytest.mark.parametrize(("level", "shown"), [("1", "stage kernels: "), ("2", "  lower_pages: "), ("4", "T.prim_func")])
def test_debug_reaches_the_kernels(level, shown, monkeypatch, capsys):
    from llmc.compiler import Request, lower, open_door
    from llmc.targets import detect

    monkeypatch.setenv("LLMC_DEBUG", level)
    request = Request(TINY_PYTHON, (detect(),), None, None, False, None)
    lower(open_door(request), detect(), request, lambda stage, done: None)
    assert shown in capsys.readouterr().err


def test_names():
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
    assert model_name(TINY_PYTHON) == "tiny-python"
    assert model_name(TINY_PYTHON / "model.safetensors") == "tiny-python"


def test_an_interrupted_compilation_goes_on(tmp_path, monkeypatch):
    """Ctrl-C while weights are packed: the next run keeps the library and the tensors that were done."""
    from llmc import codegen

    stopped = []

    def interrupt(stage, done):
        if stage == "packing weights" and done > 0.5:
            stopped.append(done)
            raise KeyboardInterrupt

    output = tmp_path / "a.llmc"
    with pytest.raises(KeyboardInterrupt):
        llmc.compile(TINY_PYTHON, output=output, progress=interrupt)
    assert stopped
    assert not output.exists()
    work = json.loads((tmp_path / "a.llmc.partial" / "work.json").read_text())
    assert work["libraries"] and work["tensors"]

    built = []
    monkeypatch.setattr(codegen, "build", lambda *_: built.append(True) or {})
    assert llmc.compile(TINY_PYTHON, output=output) == output
    assert not built
    assert [path.name for path in tmp_path.iterdir()] == ["a.llmc"]
    llmc.inspect(output, check=True)
    with llmc.load(output) as model:
        assert model.generate("import ", max_tokens=4).token_ids


def test_other_inputs_begin_anew(tmp_path):
    def interrupt(stage, done):
        if stage == "packing weights":
            raise KeyboardInterrupt

    output = tmp_path / "a.llmc"
    with pytest.raises(KeyboardInterrupt):
        llmc.compile(TINY_PYTHON, output=output, progress=interrupt)
    first = json.loads((tmp_path / "a.llmc.partial" / "work.json").read_text())
    with pytest.raises(KeyboardInterrupt):
        llmc.compile(TINY_PYTHON, output=output, progress=interrupt, max_context=256)
    second = json.loads((tmp_path / "a.llmc.partial" / "work.json").read_text())
    assert first["inputs"] != second["inputs"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    from llmc import codegen

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(codegen, "build", full)
    with pytest.raises(llmc.CompileError, match="the disk is full; free some space"):
        llmc.compile(TINY_PYTHON, output=tmp_path / "a.llmc")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_in_one_piece(tmp_path, tiny_python):
    output = tmp_path / "a.llmc"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(llmc.CompileError, match="exists already"):
        llmc.compile(TINY_PYTHON, output=output)
    llmc.compile(TINY_PYTHON, output=output, overwrite=True, max_context=128)
    assert not (output / "old").exists()
    assert llmc.inspect(output).manifest.model["max_context"] == 128


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(TINY_PYTHON, copy, ignore=shutil.ignore_patterns("*.txt", "*.py"))
    return copy


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "llmc.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def without_config(folder):
    (folder / "config.json").unlink()


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "abacus", "architectures": ["Abacus"]}))


def remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.EvilConfig"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": mapped}))


def lying(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])


def changed(folder, name, change):
    """The folder with one tensor changed."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder):
    changed(folder, "model.norm.weight", lambda tensor: tensor[:-1])


def wrong_dtype(folder):
    changed(folder, "model.norm.weight", lambda tensor: tensor.int())


def index(folder, shard):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def missing_shard(folder):
    index(folder, "model-00001-of-00002.safetensors")


def leaving_index(folder):
    index(folder, "../elsewhere/model.safetensors")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_config, "config.json"),
        (truncated, "model.safetensors"),
        (lying, "model.safetensors"),
        (unknown_type, "abacus"),
        (remote_code, "code"),
        (wrong_shape, "model.norm.weight: expected shape [256] by config.json, found [255]"),
        (wrong_dtype, "model.norm.weight: expected one of float32, bfloat16, float16, found int32"),
        (missing_shard, "model-00001-of-00002.safetensors"),
        (leaving_index, "expected shards inside the folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, folder, damage, expected, monkeypatch, capsys):
    damage(folder)
    monkeypatch.chdir(tmp_path)
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["compile", str(folder)])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    lines = [line for line in errors.strip().splitlines() if line.startswith("llmc: ")]
    assert len(lines) == 1 and expected in lines[0], errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_random_weights_need_a_config_alone(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    path = llmc.compile(folder / "config.json", weights="random", output=tmp_path / "random.llmc")
    assert not (path / "weights.safetensors").exists()
    report = llmc.inspect(path, check=True)
    assert "the weights are random" in str(report)
    assert "checked   every file agrees with its hash; random weights have none" in str(report)
    prompts = [[1, 2, 3], [4]]
    with llmc.load(path) as model, llmc.load(path) as other:
        found = model.logits(prompts)
        assert all(np.isfinite(logits).all() and logits.std() > 0 for logits in found)
        assert all(np.array_equal(a, b) for a, b in zip(found, other.logits(prompts), strict=True))
        assert len(model.generate(prompts[0], max_tokens=4, ignore_eos=True).token_ids) == 4


def test_the_manifest_says_what_a_step_sets_aside(tiny_python):
    memory = llmc.inspect(tiny_python).manifest.memory
    assert memory["max_step_tokens"] >= 512
    assert memory["intermediate_bytes"] > memory["max_step_tokens"] * 256 * 4


def test_run_and_bench_commands(tiny_python, tmp_path):
    done = command("run", tiny_python, "def read_lines(path):", "--max-tokens", "8", "--stats", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() and "8 tokens" in done.stderr, done.stderr
    done = command("bench", tiny_python, "--json", "--repeats", "1", "--prompt", "32", "--decode", "4", cwd=tmp_path)
    figures = json.loads(done.stdout)
    assert figures["decode_tokens_per_second"] > 0 and figures["share_of_bandwidth"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([""], "the prompt is empty"),
        (["x " * 600], "context"),
        (["x", "--temperature", "-1"], "temperature: expected a number of at least 0, found -1.0"),
        (["x", "--chat"], "this model has no chat template"),
        (["x", "--target", "cuda"], "no target"),
    ],
)
def test_requests_that_are_refused(tiny_python, tmp_path, arguments, expected):
    done = command("run", tiny_python, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout.strip() == "", done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and expected in done.stderr
