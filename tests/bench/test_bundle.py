"""The archive that is carried to a card: what is in it, and that it runs with nothing but Python and numpy."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from llmc.bench import bundle, shapes
from llmc.runtime import artifact

SCRIPT = """
import json, sys
import llmc
with llmc.load(sys.argv[1]) as model:
    best = model.logits([[1, 2, 3]])[0].argmax(-1).tolist()
print(json.dumps([best, sorted(m for m in ("tvm", "torch", "transformers", "llmc.codegen") if m in sys.modules)]))
"""


@pytest.fixture(scope="module")
def unpacked(tiny_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    file = bundle.bundle(folder / "sub" / "gpu.tar.gz", [tiny_python])
    assert file.stat().st_size < 6e6 + (tiny_python / "weights.safetensors").stat().st_size
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / bundle.NAME


def test_what_is_in_it(unpacked):
    site = unpacked / "site"
    assert os.access(unpacked / "run.sh", os.X_OK) and (unpacked / "artifacts" / "tiny-python.llmc").is_dir()
    assert {p.name for p in (site / "tvm" / "lib").iterdir()} == set(bundle.RUNTIME)
    assert sorted(p.name for p in (site / "llmc").iterdir()) == ["__init__.py", "bench", "runtime"]
    assert (site / "llmc" / "runtime" / "hip" / "source" / "include" / "tvm" / "support" / "io.h").exists()
    assert not list(site.rglob("libtvm_compiler*")) and not list(site.rglob("__pycache__"))


def test_it_runs_with_python_and_numpy_alone(unpacked, tiny_python, tmp_path):
    """-S: no site-packages. By links come numpy, typing_extensions (which tvm-ffi imports), and tokenizers: this
    artifact has a tokenizer, those with random weights have none."""
    numpy = Path(np.__file__).parent
    for name in ("numpy", "numpy.libs", "typing_extensions.py", "tokenizers", "jinja2", "markupsafe"):
        if (numpy.parent / name).exists():
            (tmp_path / name).symlink_to(numpy.parent / name)
    environment = os.environ | {"PYTHONPATH": f"{unpacked / 'site'}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, str(unpacked / "artifacts" / "tiny-python.llmc")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    best, modules = json.loads(done.stdout)
    assert len(best) == 3 and modules == []


def test_its_command_needs_a_card(unpacked):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHON": sys.executable}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([unpacked / "run.sh"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and "expected a GPU that PyTorch can use" in done.stderr, done.stderr


def test_a_cuda_artifact_takes_its_device_library_and_cudart(tiny_python, monkeypatch):
    cudart = Path("libcudart.so.13")
    monkeypatch.setattr(bundle, "_cudart", lambda: cudart)
    files = dict(bundle._files([tiny_python], {"cuda"}, None))
    assert files["site/tvm/lib/libtvm_runtime_cuda.so"].exists()
    assert files["site/tvm/lib/libcudart.so.13"] == cudart
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "CUDART", ("no_such_package", "x"))
    with pytest.raises(bundle.BundleError, match=r"expected no_such_package/x, found none; pip install 'llmc\[cuda\]'"):
        bundle._cudart()


def test_another_pythons_extension_comes_from_its_wheel(monkeypatch):
    """Of the same version; a wheel is a zip file that pip downloads."""

    def pip(command, **_):
        import zipfile

        assert command[command.index("--python-version") + 1] == "3.99"
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "tvm_ffi.whl", "w") as wheel:
            wheel.writestr("tvm_ffi/core.cpython-399.so", b"code")
            wheel.writestr("tvm_ffi/core.pyi", b"types")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bundle.subprocess, "run", pip)
    assert ("site/tvm_ffi/core.cpython-399.so", b"code") in list(bundle._ffi("3.99"))
    monkeypatch.setattr(bundle.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no network"))
    with pytest.raises(bundle.BundleError, match=r"for Python 3\.99, found none: no network"):
        list(bundle._ffi("3.99"))


def test_errors(tmp_path, capsys):
    assert bundle.main([str(tmp_path / "x.tar.gz")]) == 2
    assert "expected an artifact or a --shape, found none" in capsys.readouterr().err
    assert bundle.main([str(tmp_path / "x.tar.gz"), str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shape_is_compiled_first(tmp_path, monkeypatch):
    tiny = shapes.SHAPES["smollm-135m"] | {"num_hidden_layers": 1, "vocab_size": 1024}
    monkeypatch.setitem(shapes.SHAPES, "smollm-135m", tiny)
    assert bundle.main([str(tmp_path / "x.tar.gz"), "--shape", "smollm-135m", "--target", "cpu"]) == 0
    manifest = artifact.read(tmp_path / "smollm-135m.llmc")
    assert manifest.weights.file == "" and manifest.model["max_context"] == bundle.CONTEXT
    assert not (tmp_path / "smollm-135m").exists()
