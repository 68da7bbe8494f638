"""One type of the sweep, quantized: compiled with a scheme, and compared with transformers over the same numbers.

The reference shares nothing with what it judges but the codes: transformers' model with every quantized weight replaced
by what its codes stand for (numpy), and, where the scheme rounds activations, rounding before each of its linear
layers. Runs in a child process of its own.

    python -m llmc.bench.quantized TYPE SCHEME
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from llmc import quantization
from llmc.ir.decode import decode

from . import checkpoints, comparison, configs

# Of the logits' spread. Kernels take activations as 16-bit fixed point in groups, 1e-5 of the largest beside it, where
# float32 has 1e-7: models whose errors in floats are 1e-5 (their attention is peaked) come to 1e-3.
TOLERANCE = {"floats": 5e-3, "rounded": 5e-2}


def judge(name, scheme, work):
    """Save, compile and compare one type with a scheme; -> its result, as of comparison.compare, and "quantized"."""
    import llmc

    # Models of the sweep are smaller than what is worth to be quantized.
    quantization.SMALLEST = quantization.NARROWEST = 1
    floats = comparison.model_folder(name, work)
    limits = {"max_context": configs.variant(name).max_context}
    path = llmc.compile(floats, quantize=scheme, output=work / f"{name}.llmc", overwrite=True, **limits)
    facts = llmc.inspect(path).to_dict()["model"]["quantization"]
    done = {weight for names in facts["formats"].values() for weight in names}
    folder = work / "stand-for" / name
    folder.mkdir(parents=True, exist_ok=True)
    rounds = write_reference(name, floats, scheme, done, folder)
    result = comparison.compare(path, folder, median_error if rounds else comparison.error)
    limit = TOLERANCE["rounded" if rounds else "floats"]
    return result | {"verdict": comparison.verdict(result["errors"], limit), "quantized": facts}


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
    """The logits of the type's model over what the codes of `done` stand for; -> are activations rounded?"""
    from llmc.frontend import huggingface

    imported = quantization.prepare(huggingface.load(floats, max_context=configs.variant(name).max_context), scheme)
    plan = quantization.plan_of(imported)
    model = checkpoints.reread(name, floats)
    own = dict(model.named_parameters(remove_duplicate=False))
    rounds = False
    for weight in done:
        chosen, turned = plan.schemes[weight], weight in plan.transposed
        rows = own[weight].transpose(-1, -2) if turned else own[weight]
        format = chosen.format(rows.shape[-1])
        parts = [imported.weights[f"{weight}:{part}"].read() for part in format.parts(tuple(rows.shape))]
        rows.copy_(torch.from_numpy(decode(format, *parts)))
        group = chosen.rounding(rows.shape[-1])
        if group is not None:
            rounds = True
            for layer in model.modules():
                if getattr(layer, "weight", None) is own[weight] and not isinstance(layer, torch.nn.Embedding):
                    layer.register_forward_pre_hook(lambda _, args, group=group: (rounded(args[0], group), *args[1:]))
    facts, ids, _ = checkpoints.read(floats)
    want = [checkpoints.logits(model, sequence) for sequence in ids]
    arrays = {f"tokens_{i}": sequence for i, sequence in enumerate(ids)}
    np.savez(folder / "reference.npz", **arrays, **{f"logits_{i}": rows for i, rows in enumerate(want)})
    (folder / "facts.json").write_text(json.dumps(facts | {"spread": checkpoints.spread(want)}))
    return rounds


def rounded(x, group):
    """Activations [..., i] in 8 bits, as `ir.quantized.round_activation` says it."""
    blocks = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
    most = blocks.abs().amax(-1, keepdim=True)
    safe = torch.where(most > 0, most, torch.ones_like(most))
    return (torch.round(blocks * (127 / safe)) * (safe * np.float32(1 / 127))).reshape(x.shape)


def child(name, scheme, work):
    """Write the result into the folder of work."""
    result = judge(name, scheme, Path(work))
    (Path(work) / "result.json").write_text(json.dumps(result))


def main(argv=None):
    name, scheme = argv or sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        child(name, scheme, work)
        result = json.loads((Path(work) / "result.json").read_text())
    print(json.dumps(result, indent=1))
    return 0 if result["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
