"""The package: what `import llmc` does, and does not, load."""

import subprocess
import sys

import pytest

import llmc


def test_import_is_light():
    code = (
        "import sys, llmc; heavy = {'tvm', 'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    for name in llmc.__all__:
        assert getattr(llmc, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        llmc.compil  # noqa: B018


def test_targets_lists_and_is_the_room_as_well():
    from llmc.targets import detect

    listed = {fact.name: fact for fact in llmc.targets()}
    assert listed["cpu"].status == "runs here"
    assert detect().name in listed["cpu"].about
    assert listed["cuda"].status in ("compiles", "no tools", "runs here")


def test_schemes():
    assert {"int8", "int4", "int4-g64"} <= set(llmc.schemes())
