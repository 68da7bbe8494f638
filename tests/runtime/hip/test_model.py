"""A whole model for AMD's cards, loaded through the HIP runtime in a process without the compiler.

HIP's library is the stand-in, which runs each launch on the software device: weights, pages and tables travel
through hipMemcpy, and what is launched is read out of the arguments as a card would read them.
"""

import ctypes
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

from tests.configs import TINY_LLAMA

CONFIG = TINY_LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
SEQUENCES = [[5, 9, 77, 3], [100, 2], list(range(20, 40))]
LETTERS = {"ptr addrspace(1)": "p", "i64": "l", "i32": "i", "float": "f"}
TAGS = tuple(f"{index}.{axis}" for index in ("blockIdx", "threadIdx") for axis in "xyz")


def compiled(folder):
    """Compile the model -> its logits by PyTorch; the software device's libraries and the kernels' signatures."""
    import torch

    import llmc
    from llmc.bench.gpu_engines import load_model
    from llmc.codegen.software_device import build, device
    from llmc.codegen.software_device.entry import Kernel, Parameter
    from llmc.runtime import artifact

    source, path = Path(folder) / "source", Path(folder) / "model.llmc"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    llmc.compile(source, "rocm:gfx942", weights="random", dtype="float32", output=path)
    with zipfile.ZipFile(path / "src" / "rocm-gfx942.zip") as sources:
        text = sources.read("kernels.ll").decode()
    names = {"p": "handle", "l": "int64", "i": "int32", "f": "float32"}
    kernels, lines = [], []
    for name, parameters in re.findall(r"^define .*amdgpu_kernel void @(\w+)\((.*)\) local_unnamed_addr", text, re.M):
        letters = [LETTERS[t] for t in re.findall(r"(?:^|, )(ptr addrspace\(1\)|\w+)(?= )", parameters)]
        own = tuple(Parameter(f"p{i}", names[letter]) for i, letter in enumerate(letters))
        kernels.append(Kernel(name, own, (*TAGS, "tirx.use_dyn_shared_memory"), 64))
        lines.append(f"{name} {''.join(letters)}")
    (Path(folder) / "signatures").write_text("\n".join(lines))
    library = device.load_kernels("rocm", text, kernels, strict=False)
    manifest = artifact.read(path)
    model = load_model(str(path), manifest, manifest.targets[0], CONFIG, "cpu")
    with torch.inference_mode():
        logits = [model(torch.tensor([tokens])).logits[0].numpy() for tokens in SEQUENCES]
    return logits, str(build.machine_library()), str(library)


def loaded(files, folder, machine, library):
    """Load it as a user of a card does -> logits; a few tokens, of one batch; modules that must not be there."""
    log = Path(folder) / "log"
    os.environ |= {
        "LLMC_HIP_LIBRARY": f"{files}/libamdhip64.so",
        "HIP_STAND_IN_DEVICES": "1",
        "HIP_STAND_IN_KERNELS": library,
        "HIP_STAND_IN_SIGNATURES": f"{folder}/signatures",
        "HIP_STAND_IN_LOG": str(log),
    }
    ctypes.CDLL(machine, ctypes.RTLD_GLOBAL)
    import llmc
    from llmc.runtime.devices import drivers

    drivers.cards = lambda kind: (drivers.Card("gfx942"),) if kind == "rocm" else ()  # Linux's driver names none here
    with llmc.load(f"{folder}/model.llmc", cache_tokens=512) as model:
        logits = model.logits(SEQUENCES)
        tokens = [done.token_ids for done in model.generate(SEQUENCES[:2], max_tokens=3, ignore_eos=True)]
    return logits, tokens, [name for name in ("tvm", "torch", "llmc.codegen") if name in sys.modules], log.read_text()


def test_a_whole_model_runs_through_hip(files, isolated, tmp_path):
    expected, machine, library = isolated(compiled, str(tmp_path), timeout=400)
    logits, tokens, modules, log = isolated(loaded, files, str(tmp_path), machine, library, timeout=400)
    assert modules == []
    for found, exact in zip(logits, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * exact.std())
    assert [t[0] for t in tokens] == [int(exact[-1].argmax()) for exact in expected[:2]]
    assert [len(t) for t in tokens] == [3, 3]
    assert "hipModuleLaunchKernel paged_attention" in log and log.count("hipModuleLoadData") == 1
