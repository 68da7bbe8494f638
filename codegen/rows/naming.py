"""Kernels are named after what they do."""

from __future__ import annotations

from llmc.ir.rewrite import op_name

__all__ = ["region_name"]

SILENT = frozenset(
    """
    reshape expand_dims squeeze permute_dims astype broadcast_to strided_slice split concat stack negative
    multiply add subtract divide power sqrt square full zeros ones arange where cast repeat sum maximum minimum
    """.split()  # noqa: SIM905
)
NAMES = {"take": "lookup", "nn.silu": "silu", "nn.gelu": "gelu", "nn.gelu_tanh": "gelu", "nn.softmax": "softmax",
         "nn.relu": "relu", "nn.rms_norm": "rms_norm", "nn.layer_norm": "layer_norm", "topk": "top_k"}  # fmt: skip


def region_name(members) -> str:
    """A name from the ops of a region that tell, in order: add_rms_norm, rotary, silu_multiply."""
    ops = [op for b in members if (op := op_name(b.value))]
    found: list[str] = []

    def say(word: str) -> None:
        if word not in found:
            found.append(word)

    for i, op in enumerate(ops):
        if op == "rsqrt":
            say("layer_norm" if "subtract" in ops[max(0, i - 6) : i] else "rms_norm")
        elif op in ("cos", "sin"):
            say("angles")
        elif op == "negative" and "concat" in ops[i : i + 4]:
            say("rotary")
        elif op in NAMES:
            say(NAMES[op])
        elif op not in SILENT and op not in ("mean", "variance"):
            say(op.replace("nn.", ""))
    if found in (["silu"], ["gelu"], ["relu"]) and "multiply" in ops:
        say("multiply")
    if not found or (found[0].endswith("norm") and ops[0] == "add"):
        loud = [op for op in ops if op in ("add", "multiply", "subtract", "divide", "astype", "concat")]
        found = [*dict.fromkeys(loud[:2])][: 1 if found else 2] + found
    return "_".join(found[:4]) or "copy"
