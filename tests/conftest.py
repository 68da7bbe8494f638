"""What every test may use."""

import difflib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

pytest_plugins = ["tests.resume"]

# Two cores run two test processes: one thread each, set before numpy, torch or tvm start their pools.
for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


def pytest_addoption(parser):
    parser.addoption("--bless", action="store_true", help="renew the golden files")


@pytest.fixture
def golden(request):
    """golden(name, text): the text is what golden/<name> beside the test file says; --bless writes it there."""

    def check(name, text):
        file = Path(request.path).parent / "golden" / name
        command = f"pytest {os.path.relpath(request.path, request.config.rootpath)} --bless"
        if request.config.getoption("bless"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif not file.exists():
            pytest.fail(f"there is no {file.name}; write it with: {command}", pytrace=False)
        elif file.read_text() != text:
            lines = difflib.unified_diff(
                file.read_text().splitlines(), text.splitlines(), "golden", "found", lineterm=""
            )
            pytest.fail("\n".join([*lines, "", f"If that is meant, renew it with: {command}"]), pytrace=False)

    return check


def _call(queue, function, args):
    queue.put(function(*args))


@pytest.fixture
def isolated():
    """isolated(function, *args, timeout=120): the function's result, computed in a child process.

    Native code can crash or hang; then the test fails and the test run goes on. The function must be
    importable (top level).
    """

    def run(function, *args, timeout=120):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=_call, args=(queue, function, args))
        child.start()
        try:
            while child.is_alive() and queue.empty() and timeout > 0:
                child.join(0.05)
                timeout -= 0.05
            if queue.empty():
                child.join(1)
                assert not queue.empty(), f"{function.__name__} ended with exit code {child.exitcode} and no result"
            return queue.get()
        finally:
            child.kill()
            child.join()

    return run


TINY_PYTHON = Path(__file__).parent / "data" / "tiny-python"


@pytest.fixture(scope="session")
def tiny_python(tmp_path_factory):
    """The artifact of tests/data/tiny-python for this machine, compiled once for all test processes."""
    import llmc

    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    artifact, lock = root / "tiny-python.llmc", root / "tiny-python.lock"
    try:
        lock.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 300
        while not artifact.exists():
            assert time.monotonic() < deadline, "the other test process did not compile tiny-python in 300 s"
            time.sleep(0.2)
    else:
        llmc.compile(TINY_PYTHON, output=artifact)
    return artifact
