"""Texts as tokens: what quality is measured on and weights are calibrated with, and how much of it can be afforded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.ir.errors import CompileError

__all__ = ["BUNDLED", "Tokens", "bundled", "calibration", "read_text", "spread", "work"]

BUNDLED = "the bundled text"
UNKNOWN = 0.02  # share of unknown tokens above which a tokenizer cannot read a text
SHORTEST = 32  # tokens of a text that says anything


class Tokens(NamedTuple):
    """A text as a model reads it: its name, its tokens, and those that stand before any text."""

    name: str
    ids: np.ndarray
    prefix: tuple[int, ...]


def bundled() -> str:
    """Prose, code and lists in a page and a half, written for this project."""
    return Path(__file__).with_name("text.txt").read_text(encoding="utf-8")


def read_text(files: Mapping[str, bytes], name: str, text: str) -> Tokens:
    """`text` as tokens of the tokenizer among a model's files.

    CompileError: no tokenizer, or one that does not know what the text is made of, or a text too short.
    """
    import tokenizers

    if "tokenizer.json" not in files:
        raise CompileError(f"{name}: expected a model with a tokenizer to read it, found none")
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    tokenizer.no_truncation()
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, "int32")
    if len(ids) < SHORTEST:
        raise CompileError(f"{name}: expected a text of at least {SHORTEST} tokens, found {len(ids)}")
    unknown = getattr(tokenizer.model, "unk_token", None)
    count = int((ids == tokenizer.token_to_id(unknown)).sum()) if unknown else 0
    if count > UNKNOWN * len(ids):
        raise CompileError(
            f"{name}: expected a text that the tokenizer reads, found {count} of {len(ids)} tokens unknown"
        )
    with_special = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ahead = next((i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain), 0)
    return Tokens(name, ids, tuple(with_special[:ahead]))


def spread(tokens: Tokens, length: int, count: int) -> list[np.ndarray]:
    """At most `count` sequences of `length` tokens, the prefix included, evenly over a text, none overlapping."""
    room = length - len(tokens.prefix)
    blocks = len(tokens.ids) // room
    chosen = np.unique(np.linspace(0, blocks - 1, min(count, blocks)).round().astype(int))
    head = np.asarray(tokens.prefix, "int32")
    return [np.concatenate([head, tokens.ids[b * room : (b + 1) * room]]) for b in chosen]


def calibration(tokens: Tokens, context: int, most: int = 64, longest: int = 512) -> list[np.ndarray]:
    """The sequences to calibrate with: as long as the context (at most `longest`), at most `most` of them.

    CompileError for a text that does not fill one.
    """
    length = min(context, longest, len(tokens.ids) // 2)
    found = spread(tokens, length, most)
    if not found:
        raise CompileError(f"{tokens.name}: expected text for calibration, found {len(tokens.ids)} tokens")
    return found


def work(weights: Mapping[str, Any], uses: Sequence[Any]) -> float:
    """Floating-point operations a token of a program, about: those of its products; of experts, as of four."""
    total = 0.0
    for use in uses:
        if use.product.kind != "rows":
            shape = weights[use.weight].shape
            total += 2.0 * shape[-1] * shape[-2] * (4 if len(shape) == 3 else 1)
    return total
