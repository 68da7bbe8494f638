"""What the tests of the HIP runtime are run on, built once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmc.runtime.hip import build

HERE = Path(__file__).parent


def made(folder):
    """The runtime, the stand-in (and one that lacks a function), kernels for the host and for the card."""
    from tests.runtime.hip.export_kernels import export

    build.build()
    for name, options, source in (
        ("libamdhip64.so", [], "stand_in.cc"),
        ("old.so", ["-DWITHOUT_ELAPSED_TIME"], "stand_in.cc"),
        ("kernels.so", [], "kernels.cc"),
    ):
        options = [*options, "-O1", "-Wall", "-Wextra", "-Werror"]
        command = [*build.compiler(), "-std=c++20", "-fPIC", "-shared", *options, str(HERE / source), "-ldl"]
        subprocess.run([*command, "-o", f"{folder}/{name}"], check=True)
    return export(f"{folder}/scale.so")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with what `made` makes, once for all test processes."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "hip"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not (folder / "done").exists():
            assert time.monotonic() < deadline, "the other test process did not build the stand-in in 300 s"
            time.sleep(0.2)
    else:
        command = "import sys; from tests.runtime.hip.conftest import made; assert made(sys.argv[1]) == ['hip']"
        root = HERE.parents[2]
        subprocess.run([sys.executable, "-c", command, str(folder)], check=True, timeout=300, cwd=root)
        (folder / "done").touch()
    return str(folder)
