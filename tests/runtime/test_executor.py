"""The executor on real libraries: memory bound without copies, what compiled code must never see, refusals.

The library is small and made by hand here: step adds to the hidden rows what page kv_indices[0] holds, after it has
written the sum of all hidden rows there. What whole models compute is for tests/llmc.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.runtime import artifact
from llmc.runtime.artifact import Function, Manifest, StateGroup, StateTensor, TargetEntry, WeightsEntry, WeightsWriter
from llmc.runtime.devices.cpu import CpuExecutor, available_bytes
from llmc.runtime.errors import ArtifactError
from llmc.runtime.executor import Table, aligned, page_bytes
from llmc.runtime.libraries import cores

VOCAB, WIDTH = 8, 4

LIBRARY = """
import sys, tvm
from tvm import relax
from tvm.script import ir as I, relax as R, tirx as T

@I.ir_module
class Module:
    @T.prim_func(private=True)
    def append(pool: T.handle, x: T.handle, indices: T.handle):
        T.func_attr({"tirx.noalias": True})
        p, n, r = T.int64(), T.int64(), T.int64()
        P = T.match_buffer(pool, (p, T.int64(4)), "float32")
        X = T.match_buffer(x, (n, T.int64(4)), "float32")
        I = T.match_buffer(indices, (r,), "int32")
        for i, k in T.grid(n, 4):
            P[I[0], k] = P[I[0], k] + X[i, k]

    @T.prim_func(private=True)
    def copy(source: T.handle, target: T.handle, pool: T.handle):
        T.func_attr({"tirx.noalias": True})
        p, n = T.int64(), T.int64()
        S = T.match_buffer(source, (n,), "int32")
        D = T.match_buffer(target, (n,), "int32")
        P = T.match_buffer(pool, (p, T.int64(4)), "float32")
        for i, k in T.grid(n, 4):
            P[D[i], k] = P[S[i], k]

    @R.function
    def embed(
        tokens: R.Tensor(("n",), "int32"), w: R.Tuple(R.Tensor((8, 4), "bfloat16"))
    ) -> R.Tensor(("n", 4), "float32"):
        n = T.int64()
        with R.dataflow():
            table = R.astype(w[0], "float32")
            rows = R.take(table, tokens, axis=0)
            R.output(rows)
        return rows

    @R.function
    def step(
        h: R.Tensor(("n", 4), "float32"), positions: R.Tensor((1, "n"), "int32"), qo: R.Tensor(("b1",), "int32"),
        rows: R.Tensor(("m",), "int32"), indptr: R.Tensor(("b2",), "int32"), indices: R.Tensor(("r",), "int32"),
        last: R.Tensor(("b",), "int32"), pages: R.Tuple(R.Tensor(("p", 4), "float32")),
        w: R.Tuple(R.Tensor((8, 4), "float32")),
    ) -> R.Tensor(("m", 8), "float32"):
        p = T.int64()
        cls = Module
        with R.dataflow():
            pool = pages[0]
            written = R.call_tir_inplace(cls.append, [pool, h, indices], 0, R.Tensor((p, 4), "float32"))
            page = R.take(written, R.take(indices, R.const([0], "int32"), axis=0), axis=0)
            logits = R.matmul(R.add(R.take(h, rows, axis=0), page), R.permute_dims(w[0]))
            R.output(logits)
        return logits

    @R.function
    def copy_pages_0(
        source: R.Tensor(("n",), "int32"), target: R.Tensor(("n",), "int32"),
        pages: R.Tuple(R.Tensor(("p", 4), "float32"))
    ) -> R.Tensor(("p", 4), "float32"):
        p = T.int64()
        cls = Module
        with R.dataflow():
            pool = pages[0]
            copied = R.call_tir_inplace(cls.copy, [source, target, pool], 2, R.Tensor((p, 4), "float32"))
            R.output(copied)
        return copied

relax.build(Module, tvm.target.Target("llvm")).export_library(sys.argv[1])
"""


def make(folder):
    """The library in an artifact; its embedding is bfloat16, its other weight float32."""
    (folder / "lib").mkdir(parents=True)
    library = folder / "lib/cpu.so"
    (folder / "build.py").write_text(LIBRARY)  # TVM's parser reads its functions' source
    subprocess.run(
        [sys.executable, str(folder / "build.py"), str(library)], check=True, timeout=120, capture_output=True
    )
    with WeightsWriter(
        folder / "weights.safetensors", {"table": ((VOCAB, WIDTH), "bfloat16"), "head": ((VOCAB, WIDTH), "float32")}
    ) as writer:
        table = np.arange(VOCAB * WIDTH, dtype=np.float32).reshape(VOCAB, WIDTH)
        writer["table"][:] = table.view(np.uint32) >> 16
        writer["head"][:] = np.eye(VOCAB, WIDTH)
    group = StateGroup("paged", 1, 0, 0, (0,), (StateTensor("pages", (WIDTH,), "float32"),))
    target = TargetEntry(
        target="cpu:generic",
        kind="cpu",
        host=artifact.machine_host(),
        features=(),
        library="lib/cpu.so",
        sha256=artifact.sha256(library),
        state=(group,),
        functions={"embed": Function(("table",)), "step": Function(("head",))},
    )
    facts = {"vocab_size": VOCAB, "max_context": 64}
    manifest = Manifest("hand", facts, (target,), WeightsEntry(**writer.entry))
    artifact.write(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hand") / "hand.llmc")


def int32(*values):
    array = aligned(len(values))
    array[:] = values
    return array


def run(folder, pages=1 << 28):
    """Everything at once, in a process of its own: native code may crash it."""
    manifest = artifact.read(folder)
    executor = CpuExecutor(Path(folder), manifest, manifest.targets[0], [pages])
    found = {"heavy": sorted({"tvm", "torch", "transformers"} & set(sys.modules))}

    def step(tokens, rows, page):
        hidden = executor.embed(int32(*tokens))
        positions = int32(*range(len(tokens))).reshape(1, -1)
        table = Table(int32(0, 1), int32(page), int32(1))
        return executor.step(hidden, positions, int32(0, len(tokens)), int32(*rows), [table])

    found["logits"] = step([1, 2], [1, 0], 5).tolist()
    found["again"] = step([1], [0], 5).tolist()
    executor.copy_pages(0, [5], [pages - 1])
    found["copied"] = step([0], [0], pages - 1).tolist()
    found["none"] = step([3], [], 6).shape
    status = Path("/proc/self/status").read_text()
    found["resident"] = int(status.split("VmRSS:")[1].split()[0]) * 1024
    mapped = Path("/proc/self/maps").read_text()
    found["compiler"] = "libtvm_compiler" in mapped
    executor.close()
    return found


def test_weights_and_pages_are_bound_where_they_are(folder, isolated):
    found = isolated(run, str(folder))
    row = [np.arange(4 * t, 4 * t + 4, dtype=np.float32) for t in range(VOCAB)]
    page = row[1] + row[2]
    assert found["logits"] == [[*(row[2] + page), 0, 0, 0, 0], [*(row[1] + page), 0, 0, 0, 0]]
    page = page + row[1]
    assert found["again"] == [[*(row[1] + page), 0, 0, 0, 0]]
    assert found["copied"] == [[*(row[0] + page + row[0]), 0, 0, 0, 0]]
    assert found["none"] == (0, VOCAB)
    # The pool is 4 GB of address space, of which three pages were touched.
    assert found["resident"] < 1 << 30
    assert found["heavy"] == [] and not found["compiler"]


def changed(folder, tmp_path, change):
    """A copy of the artifact's folder with something changed; its manifest is made to agree."""
    copy = tmp_path / "copy.llmc"
    shutil.copytree(folder, copy)
    data = json.loads((copy / "manifest.json").read_text())
    change(copy, data["targets"][0])
    data["targets"][0]["sha256"] = artifact.sha256(copy / data["targets"][0]["library"])
    (copy / "manifest.json").write_text(json.dumps(data))
    return copy


def refusal(folder):
    manifest = artifact.read(folder)
    try:
        CpuExecutor(Path(folder), manifest, manifest.targets[0], [4])
    except ArtifactError as error:
        return str(error)
    return None


def test_a_library_that_is_none(folder, tmp_path, isolated):
    copy = changed(folder, tmp_path, lambda copy, _: (copy / "lib/cpu.so").write_bytes(b"not a library"))
    message = isolated(refusal, str(copy))
    assert "cpu.so: expected a library made by llmc, could not open it: " in message


def test_a_library_without_a_function(folder, tmp_path, isolated):
    def another_group(_, target):
        target["state"].append(target["state"][0])

    copy = changed(folder, tmp_path, another_group)
    manifest = artifact.read(copy)
    assert len(manifest.targets[0].state) == 2
    assert (
        isolated(refusal_of_two, str(copy))
        == "lib/cpu.so: expected a function 'copy_pages_1', found none; compile it again"
    )


def refusal_of_two(folder):
    manifest = artifact.read(folder)
    try:
        CpuExecutor(Path(folder), manifest, manifest.targets[0], [4, 4])
    except ArtifactError as error:
        return str(error)
    return None


def test_a_damaged_library_is_never_opened(folder, tmp_path):
    copy = tmp_path / "copy.llmc"
    shutil.copytree(folder, copy)
    with open(copy / "lib/cpu.so", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00" * 100)
    assert "cpu.so: damaged: expected sha256" in refusal(copy)


def test_facts_of_the_machine():
    assert cores() >= 1
    assert 1 << 26 < available_bytes() < 1 << 50
    assert aligned(5).ctypes.data % 64 == 0 and aligned(5).dtype == np.int32 and aligned(0).size == 0
    tensors = (StateTensor("k", (2, 8), "bfloat16"), StateTensor("v", (3,), "float32"))
    assert page_bytes(StateGroup("paged", 8, 0, 0, (0,), tensors)) == 2 * 8 * 2 + 12
