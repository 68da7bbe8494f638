"""The executor of a GPU: what is predicted at load, and what it refuses. What it computes is for tests/llmc."""

from dataclasses import replace

import pytest

from llmc.runtime import libraries
from llmc.runtime.artifact import Manifest, StateGroup, StateTensor, TargetEntry, WeightsEntry
from llmc.runtime.devices import gpu, pages_of, token_bytes
from llmc.runtime.errors import ArtifactError, RequestError

# Two tensors of 8 KB a page of 16 tokens: 1 KB a token.
PAGES = tuple(StateTensor(name, (16, 256), "float16") for name in "kv")
GROUP = StateGroup("paged", 16, 0, 0, (0, 1), PAGES)
TARGET = TargetEntry("cuda:sm_90", "cuda", "linux-x86_64", (), "lib/x.so", "", (GROUP,), {})
MANIFEST = Manifest("llama", {}, (TARGET,), WeightsEntry("weights.safetensors", "", {}))


class Device:
    def __init__(self, free, total=80 * 10**9):
        self.told = free, total

    def memory(self):
        return self.told


def fit(free, cache_tokens=None, weights=10**9, **more):
    executor = gpu.GpuExecutor.__new__(gpu.GpuExecutor)
    executor._runtime = Device(free)
    return executor._fit(MANIFEST, TARGET, {"weights": weights, "a step": 10**8} | more, cache_tokens)


def test_a_cache_of_what_nine_tenths_of_the_memory_leave():
    [pages] = fit(2 * 10**9)
    left = 0.9 * 2 * 10**9 - 10**9 - 10**8
    assert 0.99 * left < (pages - 1) * 16 * token_bytes((GROUP,)) <= left


def test_a_cache_as_large_as_asked_for():
    assert fit(2 * 10**9, cache_tokens=100) == [8] == pages_of((GROUP,), 100)


def test_a_model_that_is_too_large_is_refused_with_the_arithmetic():
    message = (
        r"llama does not fit the device's memory: 90.00 GB for weights \+ 0.10 GB for a step \+ 0.00 GB for a cache of "
        r"16 tokens = 90.10 GB, free: 79.00 GB of 80.00 GB; lower cache_tokens, or use a smaller model"
    )
    with pytest.raises(ArtifactError, match=message):
        fit(79 * 10**9, weights=90 * 10**9)
    with pytest.raises(ArtifactError, match=r"1.00 GB for weights .* 2.05 GB for a cache of 2000000 tokens = 3.15 GB"):
        fit(2 * 10**9, cache_tokens=2 * 10**6)


def test_graphs_take_their_part():
    [without], [beside] = fit(2 * 10**9), fit(2 * 10**9, graphs=10**8)
    assert (without - beside) * 16 * token_bytes((GROUP,)) == pytest.approx(10**8, rel=0.01)


def test_a_driver_that_does_not_tell_its_memory():
    assert fit(None, cache_tokens=16) == [2]
    with pytest.raises(ArtifactError, match="the driver does not tell how much memory is free: give cache_tokens"):
        fit(None)


def backend_error(kind):
    try:
        gpu.open_backend(kind)
    except ArtifactError as error:
        return str(error)
    return ""


def test_amd_cards_have_a_plugin(isolated):
    found = isolated(backend_error, "rocm")
    assert found == "" or "expected the runtime of AMD's cards at" in found


def test_a_runtime_library_that_is_not_there(isolated):
    assert "TVM's metal runtime can't be opened" in isolated(backend_error, "metal")


def test_the_runtime_is_found_without_importing_tvm():
    assert (libraries._runtime_folder() / "libtvm_runtime.so").exists()


def entry(*functions):
    from llmc.runtime.artifact import Function

    return replace(TARGET, functions={name: Function(()) for name in functions})


def test_invariant_functions_run_where_they_are_asked_for():
    plain, both = entry("embed", "step"), entry("embed", "step", "step_invariant")
    assert [gpu.chosen(both, f, False) for f in ("embed", "step")] == ["embed", "step"]
    assert [gpu.chosen(both, f, True) for f in ("embed", "step")] == ["embed", "step_invariant"]
    with_products = entry("embed", "step", "embed_invariant", "step_invariant")
    assert gpu.chosen(with_products, "embed", True) == "embed_invariant"
    assert gpu.chosen(plain, "step", False) == "step"
    with pytest.raises(
        RequestError, match=r"batch_invariant: cuda:sm_90 has kernels that sum in an order .* and no ot"
    ):
        gpu.chosen(plain, "step", True)
