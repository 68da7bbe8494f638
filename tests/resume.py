"""`pytest --resume`: a run that was broken off goes on where it stopped, while no file of the repository has changed.

What has ended is noted in build/test-all/<hash of the files>.txt, a line a test; at the end of a run
build/test-all/table.md says how many tests of each file passed, failed, were skipped and are left.
"""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ASIDE = {"build", "results", "__pycache__"}
ENDS = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    parser.addoption("--resume", action="store_true", help="leave out what passed in an earlier run of the same files")


def pytest_configure(config):
    if config.getoption("resume"):
        config.pluginmanager.register(_Resumed(config), "resumed")


def fingerprint(root: Path) -> str:
    """Of every file that a test may depend on."""
    total = hashlib.sha256()
    for folder in sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.name not in ASIDE):
        for file in sorted(folder.rglob("*") if folder.is_dir() else [folder]):
            inside = file.relative_to(root)
            if file.is_file() and not ASIDE.intersection(inside.parts) and file.suffix != ".md":
                total.update(f"{inside} {file.stat().st_size}\n".encode() + file.read_bytes())
    return total.hexdigest()[:16]


class _Resumed:
    """In the process that the user started, and in each that tests run in (which xdist tells what is done)."""

    def __init__(self, config):
        self.folder = config.rootpath / "build" / "test-all"
        self.worker = getattr(config, "workerinput", None)
        if self.worker is not None:
            self.done = set(self.worker["done"])
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.folder / f"{fingerprint(config.rootpath)}.txt"
        self.done = {test for end, _, test in self.noted() if end != "failed"}

    def noted(self):
        """(how it ended, seconds, test) of all runs, the last of a test last."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else ()
        return [tuple(line.split(" ", 2)) for line in lines]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["done"] = sorted(self.done)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """After the choice by -m and -k: what is left out is no part of the run."""
        if self.worker is None or self.worker["workerid"] == "gw0":
            (self.folder / "collected.txt").write_text("".join(f"{item.nodeid}\n" for item in items))
        out = [item for item in items if item.nodeid in self.done]
        if out:
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item.nodeid not in self.done]

    def pytest_runtest_logreport(self, report):
        if self.worker is None and (report.when == "call" or report.outcome != "passed"):
            with self.journal.open("a") as file:
                file.write(f"{report.outcome} {report.duration:.1f} {report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter):
        collected = self.folder / "collected.txt"
        if self.worker is not None or not collected.exists():
            return
        last = {test: (end, float(seconds)) for end, seconds, test in self.noted()}
        files = defaultdict(list)
        for test in collected.read_text().splitlines():
            files[test.split("::")[0]].append(last.get(test, ("left", 0.0)))
        rows = ["| tests | passed | skipped | failed | left | seconds |", "|---|---|---|---|---|---|"]
        for name, ended in [*sorted(files.items()), ("all", [e for found in files.values() for e in found])]:
            counts = Counter(end for end, _ in ended)
            numbers = [counts[end] for end in (*ENDS, "left")]
            rows.append(f"| {name} | {' | '.join(map(str, numbers))} | {sum(s for _, s in ended):.0f} |")
        (self.folder / "table.md").write_text("\n".join(rows) + "\n")
        terminalreporter.write_line(f"{rows[-1]} of passed, skipped, failed, left, seconds: {self.folder / 'table.md'}")
