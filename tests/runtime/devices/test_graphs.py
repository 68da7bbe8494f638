"""CUDA graphs: recorded and started by a stand-in of NVIDIA's driver, which runs launches on the software device."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import llmc
from llmc.runtime.artifact import StateGroup
from llmc.runtime.devices import graphs
from llmc.runtime.executor import Table
from tests.configs import TINY_LLAMA

CONFIG = TINY_LLAMA | {"max_position_embeddings": 64, "initializer_range": 0.1}
PROMPTS = [[5, 9, 77, 3], [100, 2], list(range(20, 40))]


def models(path, **changes):
    """The artifact on the software device, by plain launches and by graphs; and what the graphs' driver was asked."""
    import ctypes
    import zipfile
    from pathlib import Path

    import tvm

    from llmc import targets
    from llmc.codegen.library import machine_code
    from llmc.codegen.software_device import build, device
    from llmc.runtime import artifact
    from llmc.runtime.devices.gpu import GpuExecutor
    from llmc.runtime.engine import Engine
    from llmc.runtime.model import Model

    manifest = artifact.read(path)
    [entry] = manifest.targets
    [facts] = targets.parse(entry.target)
    with zipfile.ZipFile(Path(path) / entry.sources.file) as sources:
        module = tvm.ir.load_json(sources.read("module.json").decode())
    device.install(entry.kind, strict=False)  # a page that is copied may be half written
    executable, _ = machine_code(module, tvm.target.Target(facts.tvm(), host={"kind": "llvm"}))
    machine = ctypes.CDLL(str(build.machine_library()))
    machine.device_pool_workspaces(True)
    asked = []

    class Driver(graphs.CudaDriver):
        def _call(self, name, *arguments):
            asked.append(name)
            changes.get(name, lambda *_: None)(machine, *arguments)
            super()._call(name, *arguments)

    for driver in (None, Driver(machine)):
        made = executable.mod["vm_load_executable"]()
        executor = GpuExecutor(Path(path), manifest, entry, cache_tokens=256, machine=made, driver=driver)
        yield Model(manifest, Engine(executor), target=entry.target), executor, asked


def decode(path, changes=None):
    """-> of plain launches and of graphs, tokens of a few requests and logits after them; what the driver was asked;
    why there are no graphs in the end; warnings."""
    graphs.BUCKETS = (1, 2, 4)
    found = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for model, executor, calls in models(path, **CHANGES[changes]):
            asked = calls
            with model:
                alone = model.generate(PROMPTS[0], max_tokens=3, ignore_eos=True).token_ids
                together = [c.token_ids for c in model.generate(PROMPTS, max_tokens=4, ignore_eos=True)]
                found.append((alone, together, model.logits([PROMPTS[2]])[0].tolist()))
                refused = executor._graphs.refused if executor._graphs else ""
    return found, asked, refused, [str(w.message) for w in warned if w.category is RuntimeWarning]


def skewed(machine, out, graph, flags):
    """A graph that leaves a launch out."""
    machine.device_forget_launch(graph)


def allocates(machine, to, source, size, stream):
    """Something in the recorded step asks for memory."""
    import ctypes

    machine.graphs_forbid(ctypes.c_char_p(b"memory was allocated"))


CHANGES = {
    None: {},
    "skewed": {"cuGraphInstantiateWithFlags": skewed},
    "allocates": {"cuMemcpyDtoDAsync_v2": allocates},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return llmc.compile(folder, "cuda:sm_90", weights="random", dtype="float32", output=folder / "model.llmc")


def test_graphs_decode_as_plain_launches_do(compiled, isolated):
    (plain, by_graph), asked, refused, warned = isolated(decode, str(compiled), timeout=500)
    assert by_graph == plain
    assert not refused and not warned
    assert asked.count("cuStreamBeginCapture_v2") == asked.count("cuStreamEndCapture") == 3
    assert asked.count("cuGraphLaunch") == 2 + 3  # what the prompts' own steps give is no decoding
    assert asked[-3:] == ["cuGraphExecDestroy"] * 3
    assert np.isfinite(plain[2]).all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [("skewed", "the graph of 1 sequences gives other logits than plain launches"),
     ("allocates", "GraphError: cuStreamEndCapture: memory was allocated")],
)  # fmt: skip
def test_decoding_goes_on_without_graphs(compiled, isolated, changes, why):
    (plain, by_graph), asked, refused, warned = isolated(decode, str(compiled), changes, timeout=500)
    assert by_graph == plain
    assert refused.startswith(why)
    assert len(warned) == 1 and warned[0].startswith(f"decoding goes on without CUDA graphs: {why}")
    assert asked.count("cuGraphLaunch") <= 1


def test_a_switch(monkeypatch):
    monkeypatch.delenv("LLMC_CUDA_GRAPHS", raising=False)
    assert graphs.wanted()
    monkeypatch.setenv("LLMC_CUDA_GRAPHS", "0")
    assert not graphs.wanted()


class Memory:
    """A device whose memory is this process's."""

    device = (1, 0)

    def __init__(self):
        self.piece = np.full(1 << 16, -1, np.int32)

    def write(self, tensor, start, array):
        self.piece[start : start + len(array)] = array


def test_what_graphs_set_aside_is_known_before_they_are_made():
    groups = [StateGroup("paged", 4, 0, 0, (0,), ())]
    fixed = 128 + 128 + 192 + 128 + 192 + 128  # of 128 sequences, each array to a multiple of 64 numbers
    assert graphs.needed_bytes(groups, 20, 99) == 4 * (fixed + 128 * 5 + 128 * 99)
    assert len(graphs.Graphs(Memory(), None, groups, 20, None)._tables) == fixed + 128 * 5


@pytest.mark.parametrize("count", [1, 3, 4])
def test_tables_are_filled_up_with_sequences_on_the_scratch_page(count):
    groups = [StateGroup("paged", 4, 0, 0, (0,), ()), StateGroup("paged", 8, 16, 0, (1,), ())]
    one, memory = graphs.Graphs(Memory(), None, groups, 20, None), None
    rng = np.random.default_rng(count)
    tables = []
    for pages in (5, 3):
        each = rng.integers(1, pages + 1, count)
        tables.append(Table(np.cumsum([0, *each]).astype("int32"), rng.integers(1, 9, each.sum()).astype("int32"),
                            rng.integers(1, 5, count).astype("int32")))  # fmt: skip
    tokens, positions = rng.integers(0, 99, count).astype("int32"), rng.integers(0, 20, (1, count)).astype("int32")
    one._send(4, tokens, positions, tables)
    memory, start, sent = one._runtime.piece, 0, []
    for shape, end in one._places[4]:
        sent.append(memory[start : start + int(np.prod(shape))])
        start = end
    pads = [0] * (4 - count)
    assert sent[0].tolist() == [*tokens, *pads] and sent[1].tolist() == [*positions[0], *pads]
    assert sent[2].tolist() == [0, 1, 2, 3, 4] and sent[3].tolist() == [0, 1, 2, 3]
    for g, table in enumerate(tables):
        indptr, last, indices = sent[4 + 2 * g], sent[5 + 2 * g], sent[8 + g]
        for s in range(count):
            expected = table.kv_indices[table.kv_indptr[s] : table.kv_indptr[s + 1]]
            assert indices[indptr[s] : indptr[s + 1]].tolist() == expected.tolist()
        for s in range(count, 4):
            assert indices[indptr[s] : indptr[s + 1]].tolist() == [0]  # the scratch page
        assert last.tolist() == [*table.kv_last_page_len, *(1 for _ in pads)]


@pytest.mark.parametrize(
    ("qo_indptr", "logit_rows"),
    [([0, 2], [1]), ([0, 1, 3], [0, 2]), ([0, 1, 2], [1]), (range(131), range(130))],
    ids=["a prompt", "a prompt beside decoding", "a row that is not asked for", "more than the largest graph"],
)
def test_other_steps_are_plain_launches(qo_indptr, logit_rows):
    one = graphs.Graphs(Memory(), None, [StateGroup("paged", 4, 0, 0, (0,), ())], 20, None)
    qo_indptr, rows = np.array(qo_indptr, "int32"), np.array(logit_rows, "int32")
    tokens = np.zeros(qo_indptr[-1], "int32")
    table = Table(np.arange(len(qo_indptr)), tokens[: len(qo_indptr) - 1], tokens)
    assert one.step(tokens, tokens[None], qo_indptr, rows, [table]) is None
    assert not one.refused


def test_an_interpreter_that_ends_takes_no_more_work():
    """A process may end with its model open: pools of threads are shut down before the engine's thread is told."""
    one = graphs.Graphs(Memory(), None, [StateGroup("paged", 4, 0, 0, (0,), ())], 20, None)
    one._thread, one._stream = ThreadPoolExecutor(1), 1
    one._thread.shutdown()
    one.close()
