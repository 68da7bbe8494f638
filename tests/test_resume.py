"""A broken run of the full product goes on where it stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resume import fingerprint

TESTS = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", range(3))
def test_some(n):
    Path("ran.txt").open("a").write(f"{n} ")
    assert n != 1 or Path("build/mended").exists()

def test_other():
    pytest.skip("there is no card")
"""


@pytest.mark.parametrize("processes", [pytest.param([], marks=pytest.mark.slow), ["-n", "1"]], ids=str)
def test_what_passed_is_not_run_again(processes, tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.resume", "--resume", *processes, *options]
        path = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | path
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        ran = (tmp_path / "build" / "ran.txt").read_text().split()
        (tmp_path / "build" / "ran.txt").write_text("")
        return found.returncode, ran, (tmp_path / "build" / "test-all" / "table.md").read_text().splitlines()

    (tmp_path / "build").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ncache_dir = build/cache\n")
    (tmp_path / "test_it.py").write_text(TESTS.replace("ran.txt", "build/ran.txt"))
    code, ran, table = run("--maxfail=1")
    assert (code != 0, ran) == (True, ["0", "1"])
    assert table[2].startswith("| test_it.py | 1 | 0 | 1 | 2 |")
    (tmp_path / "build" / "mended").touch()
    code, ran, table = run()
    assert (code, ran) == (0, ["1", "2"])
    assert table[3].startswith("| all | 3 | 1 | 0 | 0 |")


def test_a_file_that_changed_makes_it_another_product(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "file.py").write_text("x = 1")
    before = fingerprint(tmp_path)
    for aside in ("build", ".git", "room/__pycache__"):
        (tmp_path / aside).mkdir()
        (tmp_path / aside / "file.py").touch()
    assert fingerprint(tmp_path) == before
    (tmp_path / "room" / "file.py").write_text("x = 2")
    assert fingerprint(tmp_path) != before
