"""The house: imports run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "frontend": {"ir"},
    "passes": {"ir", "targets"},
    "codegen": {"ir", "targets", "runtime.artifact"},
    "targets": set(),
    "ir": set(),
    "runtime": set(),
    "quality": {"ir", "passes", "codegen", "runtime", "targets"},
}
HEAVY = {"tvm", "torch", "transformers", "onnx"}


def imported_modules(file: Path) -> set[str]:
    """Every module that a file names in an import statement, at any depth; relative imports made absolute."""
    found = set()
    room = file.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = f"llmc.{room}" if room != "llmc" else "llmc"
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(room: str, file: Path) -> list[str]:
    allowed = [f"llmc.{r}" for r in MAY_IMPORT[room] | {room}]
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for name in imported_modules(file)
        if name.split(".")[0] == "llmc" and not any(name == a or name.startswith(a + ".") for a in allowed)
    ]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    assert [v for file in sorted((ROOT / room).rglob("*.py")) for v in violations(room, file)] == []


def test_the_check_sees_a_wrong_import(monkeypatch):
    wrong = ROOT / "ir" / "errors.py"
    tree = "from llmc.passes import pipeline\n"
    monkeypatch.setattr(Path, "read_text", lambda self: tree)
    assert violations("ir", wrong) == ["ir/errors.py imports llmc.passes.pipeline"]


def test_runtime_and_front_door_stay_light():
    light = sorted((ROOT / "runtime").rglob("*.py"))
    heavy = [f"{f.name}: {m}" for f in light for m in imported_modules(f) if m.split(".")[0] in HEAVY]
    assert heavy == []
