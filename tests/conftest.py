"""What every test may use."""

import multiprocessing
import os

import pytest

# Two cores run two test processes: one thread each, set before numpy, torch or tvm start their pools.
for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


def pytest_addoption(parser):
    parser.addoption("--bless", action="store_true", help="renew the golden files")


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
