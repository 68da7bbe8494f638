"""The command line: exit codes, one clear line, results on stdout."""

import json
import subprocess
import sys

import pytest


def llmc(*arguments, cwd=None, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "llmc.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
        timeout=300,
    )


def one_line(done):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_targets():
    done = llmc("targets")
    assert done.returncode == 0
    assert "runs here" in done.stdout
    assert {entry["name"] for entry in json.loads(llmc("targets", "--json").stdout)} >= {"cpu", "cuda", "metal"}


def test_help_has_examples():
    for command in ("compile", "run", "inspect", "bench"):
        done = llmc(command, "--help")
        assert done.returncode == 0
        assert f"llmc {command} " in done.stdout, command


@pytest.mark.parametrize("arguments", [["compile"], ["compile", "x", "--no-such-option"], ["no-such-command"]])
def test_wrong_usage(arguments):
    assert llmc(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target", "abacus"], "unknown target 'abacus': expected one of cpu, cuda, rocm, metal"),
        (
            ["--target", "cuda:sm_75"],
            "unknown architecture cuda:sm_75: expected cuda, cuda:native, or one of cuda:sm_80",
        ),
        (["--target", "metal", "--host", "linux-x86_64"], "can't run metal: expected macos-arm64"),
        (["--host", "vax"], "unknown host 'vax': expected one of linux-x86_64"),
        (["--quantize", "imt4"], "no quantization scheme is called 'imt4': did you mean int4? There are: int8, int4"),
        (["--quantize", "int4-g48"], "'int4-g48': expected groups of 16, 32, 64, 128; found 48"),
        (["--quantize", "int8-zp"], "'int8-zp': expected after int8: -g128 … -g16, each once; found -zp"),
        (["--quantize", "int4:head"], "expected a scheme, or a scheme and :head=SCHEME or :head=none"),
        (["--kv-cache", "int4"], "kv_cache='int4': expected 'int8' or 'fp8', or None for the activations' dtype"),
        (["--dtype", "float8"], "dtype='float8': expected one of float32, bfloat16, float16"),
        (["--max-context", "0"], "max_context=0: expected at least 1 token"),
        (["--weights", "none"], "weights='none': expected 'load' or 'random'"),
    ],
)
def test_options_that_are_refused(tmp_path, options, expected):
    assert expected in one_line(llmc("compile", tmp_path, *options, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(tmp_path):
    (tmp_path / "old.llmc").mkdir()
    line = one_line(llmc("compile", tmp_path, "-o", tmp_path / "old.llmc"))
    assert "exists already: give overwrite=True (--overwrite)" in line


def test_a_file_that_is_not_read_yet(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert ".onnx files are not read yet" in one_line(llmc("compile", tmp_path / "model.onnx", cwd=tmp_path))


@pytest.mark.parametrize("command", ["run", "inspect", "bench"])
def test_no_artifact(tmp_path, command):
    assert "nowhere.llmc" in one_line(llmc(command, tmp_path / "nowhere.llmc"))


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_DEBUG", "1")
    done = llmc("inspect", tmp_path / "nowhere.llmc")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
