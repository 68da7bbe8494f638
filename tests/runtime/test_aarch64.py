"""Code for aarch64, run by an aarch64 Python: qemu-user's or a real one.

LLMC_AARCH64 is a command that runs such a Python with numpy, jinja2, tokenizers, apache-tvm and apache-tvm-ffi, as
"env PYTHONPATH=site qemu-aarch64-static -L root root/usr/bin/python3.11", where root holds Debian's libc6, libstdc++6,
libgcc-s1, zlib1g, libexpat1, libffi8, libssl3 and python3.11 for arm64 (apt-get download, dpkg -x), and site what is in
the wheels (pip download --no-deps --platform manylinux_2_28_aarch64 --only-binary :all:). llmc comes from here.
"""

import json
import os
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest

import llmc
import llmc.ir
import llmc.runtime
from tests.conftest import TINY_PYTHON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LLMC_AARCH64" not in os.environ, reason="LLMC_AARCH64 names no aarch64 Python"),
]
PROMPT = [5, 9, 77, 3]
SEQUENCES = [list(range(1, 40)), PROMPT]
# What answers for the processor's features under qemu-user is the machine that emulates.
RUN = textwrap.dedent("""
    import json, platform, sys
    sys.path.insert(0, sys.argv[3])
    import llmc
    from llmc.runtime import artifact

    artifact.machine_features = lambda: frozenset(["asimd", "fp"])
    with llmc.load(sys.argv[1]) as model:
        logits = [rows.tolist() for rows in model.logits(json.loads(sys.argv[2]))]
        alone = model.generate(json.loads(sys.argv[2])[1], max_tokens=8, ignore_eos=True).token_ids
        beside = [c.token_ids for c in model.generate(json.loads(sys.argv[2]), max_tokens=8, ignore_eos=True)]
    print(json.dumps([platform.machine(), logits, alone, beside]))
""")


def test_a_model_for_aarch64_computes_what_it_computes_here(tiny_python, tmp_path):
    path = llmc.compile(TINY_PYTHON, "cpu:aarch64", output=tmp_path / "arm.llmc")
    site = tmp_path / "site"
    for room in (llmc, llmc.ir, llmc.runtime):  # as they are where llmc is installed
        shutil.copytree(Path(room.__file__).parent, site / room.__name__.replace(".", "/"))
    (site / "llmc.dist-info").mkdir()
    (site / "llmc.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llmc\nVersion: {llmc.__version__}\n"
    )
    command = [*shlex.split(os.environ["LLMC_AARCH64"]), "-c", RUN, str(path), json.dumps(SEQUENCES), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    machine, logits, alone, beside = json.loads(done.stdout.splitlines()[-1])
    assert machine == "aarch64"
    with llmc.load(tiny_python) as model:
        expected = model.logits(SEQUENCES)
        tokens = model.generate(PROMPT, max_tokens=8, ignore_eos=True).token_ids
    for found, exact in zip(logits, expected, strict=True):
        assert np.abs(np.array(found) - exact).max() <= 1e-5 * np.ptp(exact)  # other orders of sums
    assert alone == beside[1] == tokens
