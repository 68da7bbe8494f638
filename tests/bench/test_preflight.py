"""What a machine is told that lacks something, before anything is imported that is not there."""

import subprocess
import sys
from pathlib import Path

from llmc.bench import preflight


def test_nothing_is_missing_here(tmp_path):
    assert preflight.missing() == preflight.missing(tmp_path) == []


def test_what_is_missing_is_told_with_the_way_to_get_it(monkeypatch, tmp_path):
    def version(name):
        if name == "torch":
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return {"numpy": "2.4.6", "transformers": "4.57.1"}[name]

    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    (tmp_path / "tvm_ffi").mkdir()
    for minor in (8, 99):
        (tmp_path / "tvm_ffi" / f"core.cpython-3{minor}-x86_64-linux-gnu.so").touch()
    python, torch, transformers = preflight.missing(tmp_path)
    own = "{}.{}".format(*sys.version_info)
    assert python.startswith(f"expected Python 3.8 or 3.99, for which this archive was made, found {own}: name another")
    assert python.endswith(f"make the archive with --python {own}")
    assert torch == "expected torch 2.6 or later, found none: pip install torch"
    assert transformers == "expected transformers 5.0 or later, found 4.57.1: pip install --upgrade transformers"


def test_it_needs_the_standard_library_alone():
    """-S: no site-packages, so that nothing else is found; -I: nor this folder."""
    done = subprocess.run([sys.executable, "-I", "-S", Path(preflight.__file__)], capture_output=True, text=True)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == f"the benchmark can't start with {sys.executable}:"
    assert lines[1:] == [f"  expected {p} or later, found none: pip install {p.split()[0]}"
                         for p in ("numpy 2.0", "torch 2.6", "transformers 5.0")]  # fmt: skip
