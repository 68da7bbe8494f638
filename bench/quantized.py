"""One type of the sweep, quantized: compiled with a scheme, and compared with transformers over the same numbers.

The reference shares nothing with what it judges but the codes: transformers' model with every quantized weight replaced
by what its codes stand for (numpy), and, where the scheme rounds activations, rounding before each of its linear
layers. Runs in a child process of its own.

    python -m llmc.bench.quantized TYPE SCHEME [SCHEME ...]
"""

import functools
import json
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

from llmc import quantization
from llmc.ir.decode import decode

from . import checkpoints, comparison, configs

# Of the logits' spread. Kernels take activations as 16-bit fixed point in groups, 1e-5 of the largest beside it, where
# float32 has 1e-7: models whose errors in floats are 1e-5 (their attention is peaked) come to 1e-3. By what activations
# are rounded to: a code that becomes the next one is followed by more, but not in pairs of tokens, which judge E4M3.
TOLERANCE = {None: 5e-3, "int8": 5e-2, "fp8": 5e-3}


def judge(name, scheme, work):
    """Save, compile and compare one type with a scheme; -> its result, as of comparison.compare, and "quantized"."""
    path, folder, facts, rounds = compiled(name, scheme, work)
    result = comparison.compare(path, folder, median_error if rounds else comparison.error)
    return result | {"verdict": comparison.verdict(result["errors"], TOLERANCE[rounds]), "quantized": facts}


def compiled(name, scheme, work, **how):
    """-> the artifact of a type with a scheme, the folder of the logits to compare with, what inspect tells of it, and
    what activations are rounded to ("int8", "fp8" or None). how: what else llmc.compile is told.
    """
    import llmc

    # Models of the sweep are smaller than what is worth to be quantized.
    quantization.SMALLEST = quantization.NARROWEST = 1
    floats = comparison.model_folder(name, work)
    how = {"max_context": configs.variant(name).max_context} | how
    path = llmc.compile(floats, quantize=scheme, output=work / f"{name}.llmc", overwrite=True, **how)
    facts = llmc.inspect(path).to_dict()["model"]["quantization"]
    done = {weight for names in facts["formats"].values() for weight in names}
    folder = work / "stand-for" / name
    folder.mkdir(parents=True, exist_ok=True)
    return path, folder, facts, write_reference(name, floats, scheme, done, folder)


@functools.cache
def imported(name, floats):
    """What the door makes of a type's model: the same for every scheme."""
    from llmc.frontend import huggingface

    return huggingface.load(floats, max_context=configs.variant(name).max_context)


def median_error(got, want, unit):
    """The median over rows of the largest error of a row, in `unit`; None as of comparison.error.

    Sums that differ in their last places make a code of an activation here and there the next one, and what comes
    after such a row differs by as much as rounding does: the rows before show whether it is the same computation.
    """
    if comparison.error(got, want, unit) is None:
        return None
    return float(np.median(np.concatenate([np.abs(a - b).max(-1) for a, b in zip(got, want, strict=True)]))) / unit


@torch.no_grad()
def write_reference(name, floats, scheme, done, folder):
    """The logits of the type's model over what the codes of `done` stand for; -> what activations are rounded to."""
    encoded = quantization.prepare(imported(name, floats), scheme)
    plan = quantization.plan_of(encoded)
    model = checkpoints.reread(name, floats)
    own = dict(model.named_parameters(remove_duplicate=False))
    kinds = set()
    for weight in done:
        chosen, turned = plan.schemes[weight], weight in plan.transposed
        rows = own[weight].transpose(-1, -2) if turned else own[weight]
        format = chosen.format(rows.shape[-1])
        parts = [encoded.weights[f"{weight}:{part}"].read() for part in format.parts(tuple(rows.shape))]
        rows.copy_(torch.from_numpy(decode(format, *parts)))
        group = chosen.rounding(rows.shape[-1])
        if group is not None:
            kinds.add(format.rounds)
            for layer in model.modules():
                if getattr(layer, "weight", None) is own[weight] and not isinstance(layer, torch.nn.Embedding):
                    layer.register_forward_pre_hook(
                        lambda _, args, how=(group, format.rounds): (rounded(args[0], *how), *args[1:])
                    )
    facts, ids, _ = checkpoints.read(floats)
    rounds = "fp8" if "fp8" in kinds else "int8" if kinds else None
    if rounds == "fp8":
        ids = pairs(ids)
    want = [checkpoints.logits(model, sequence) for sequence in ids]
    arrays = {f"tokens_{i}": sequence for i, sequence in enumerate(ids)}
    np.savez(folder / "reference.npz", **arrays, **{f"logits_{i}": rows for i, rows in enumerate(want)})
    (folder / "facts.json").write_text(json.dumps(facts | {"spread": checkpoints.spread(want)}))
    return rounds


def pairs(ids, count=32):
    """The tokens of sequences, two by two.

    E4M3 numbers are a sixteenth apart: once a sum in another order has made one the next, small models magnify it, and
    later tokens attend to it. transformers moves by 0.3 of the spread then (llama+yarn, every linear layer's inputs off
    by a share of 1e-7), where of tokens with at most one before them nine in ten stay where they are, within 1e-6.
    """
    return [sequence[i : i + 2] for sequence in ids for i in range(0, len(sequence), 2)][:count]


def rounded(x, group, kind):
    """Activations [..., i] in 8 bits, as `ir.quantized.round_activation` says it."""
    largest = {"int8": 127, "fp8": 448}[kind]
    blocks = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    most = blocks.abs().amax(-1, keepdim=True)
    safe = torch.where(most > 0, most, torch.ones_like(most))
    scaled = blocks * (largest / safe)
    numbers = torch.round(scaled) if kind == "int8" else scaled.to(torch.float8_e4m3fn).to(x.dtype)
    return (numbers * (safe * np.float32(1 / largest))).reshape(x.shape)


def result_path(work, scheme):
    return Path(work) / f"{scheme}.json"


def child(name, schemes, work, judged=judge):
    """Write the result of every scheme into the folder of work, one after another; what is raised is its error.

    judged: what judges.
    """
    for scheme in schemes:
        try:
            result = judged(name, scheme, Path(work))
        except Exception:
            result = {"verdict": "error", "reason": traceback.format_exc()}
        result_path(work, scheme).write_text(json.dumps(result))


def main(argv=None):
    name, *schemes = argv or sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        child(name, schemes, work)
        results = {scheme: json.loads(result_path(work, scheme).read_text()) for scheme in schemes}
    print(json.dumps(results, indent=1))
    return 0 if all(result["verdict"] == "pass" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
