"""One type of the sweep, quantized, for three families of GPUs in one artifact: each on the software device, strictly,
compared with transformers over the numbers that codes stand for, as of quantized.py.
"""

from llmc.codegen.software_device import device
from llmc.runtime import artifact
from llmc.runtime.devices.gpu import GpuExecutor

from . import checkpoints, comparison, quantized

TARGETS = "cuda:sm_90,rocm:gfx942,metal"
SEQUENCES = (1, 2, 3)  # of the sweep's: 2, 17 and 31 tokens
CACHE_TOKENS = 128
# Tokens of each sequence in each step: prefill, prefill beside decode, decode.
STEPS = ((0, 15, 28), (1, 1, 1), (1, 1, 1), (0, 0, 1))
# Of the logits' spread. float32: orders of sums, as of the sweep. In half precision single rows may be far off, for
# attention of the sweep's models is peaked, and a token near the border of two experts goes to the other: there the
# median of rows is judged.
TOLERANCE = {"float32": comparison.TOLERANCE, "float16": 0.02, "bfloat16": 0.1}


def judge(name, scheme, work, dtype="float32"):
    """-> {"verdict", "errors" by target, "quantized"}. Activations are computed in dtype."""
    for kind in ("cuda", "rocm", "metal"):  # before TVM asks, which keeps the device that is there: HIP's plugin, say
        device.register_memory(kind)
    path, folder, facts, rounds = quantized.compiled(name, scheme, work, target=TARGETS, dtype=dtype)
    read, ids, want = checkpoints.read(folder)
    ids, want = ([given[i] for i in SEQUENCES] for given in (ids, want))
    measure = comparison.error if dtype == "float32" and not rounds else quantized.median_error
    found = {entry.target: logits(path, entry, ids) for entry in artifact.read(path).targets}
    errors = {target: measure(got, want, read["spread"]) for target, got in found.items()}
    limit = max(TOLERANCE[dtype], quantized.TOLERANCE[rounds] if rounds else 0)
    return {"verdict": comparison.verdict(errors, limit), "errors": errors, "quantized": facts}


def logits(path, entry, ids):
    """The logits of every sequence, computed in STEPS by the kernels of an artifact's target."""
    from llmc.verification_worker import placed

    executable, _ = placed(path, entry)
    machine = executable.mod["vm_load_executable"]()
    executor = GpuExecutor(path, artifact.read(path), entry, cache_tokens=CACHE_TOKENS, machine=machine)
    return comparison.in_steps(comparison.Sequences(executor), ids, lambda turn, i: STEPS[turn][i])
