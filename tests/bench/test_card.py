"""The archive on a machine with a card, as far as that goes without one: everything but the kernels themselves.

NVIDIA's driver and CUDA's runtime are stand-ins (card/*.c): memory is this machine's, launches do nothing, so that all
logits are zeros. TVM's own CUDA runtime, llmc's executor, CUDA graphs and the benchmark are what a card would meet.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.bench import bundle
from tests.configs import TINY_LLAMA

CARD = Path(__file__).parent / "card"
SCRIPT = """
import json, sys
from llmc.bench import gpu
from llmc.bench.gpu_engines import LlmcOnCard

TASKS = {"decode-1": {"context": 64, "batch": 1, "steps": 4}, "decode-3": {"context": 64, "batch": 3, "steps": 4},
         "prefill-64": {"tokens": 64}}
if __name__ == "__main__":
    with gpu.worker(LlmcOnCard, sys.argv[1], "cuda:sm_90") as ask:
        found, logits = gpu.run(ask, TASKS, 1), ask("logits", tokens=[1, 2, 3])
    print(json.dumps([found, logits.shape, float(abs(logits).max())]))
"""


@pytest.mark.slow
def test_the_archive_beside_a_card(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    made = llmc.compile(tmp_path, "cuda:sm_90", weights="random", dtype="bfloat16", output=tmp_path / "model.llmc")
    with tarfile.open(bundle.bundle(tmp_path / "gpu.tar.gz", [made])) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked, packages = tmp_path / bundle.NAME, tmp_path / "packages"
    compile_c("cuda", tmp_path / "libcuda.so.1")
    version = tmp_path / "version"
    version.write_text("libcudart.so.13 { global: *; };")
    cudart = unpacked / "site" / "tvm" / "lib" / "libcudart.so.13"
    cudart.unlink()
    compile_c("cudart", cudart, f"-Wl,--version-script={version}")
    packages.mkdir()
    for name in ("numpy", "numpy.libs", "typing_extensions.py"):
        if (Path(np.__file__).parents[1] / name).exists():
            (packages / name).symlink_to(Path(np.__file__).parents[1] / name)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": f"{unpacked / 'site'}:{packages}",
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-S", str(script), str(unpacked / "artifacts" / "model.llmc")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, shape, largest = json.loads(done.stdout)
    assert [sorted(each) for each in found.values()] == 3 * [["context", "seconds"]], found
    assert (shape, largest) == ([3, 128], 0)
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


def compile_c(name, library, *options):
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", *options]
    subprocess.run([*command, str(CARD / f"{name}.c"), "-o", str(library)], check=True, timeout=120)
