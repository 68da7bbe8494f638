"""The perplexity that an artifact gives a text, by its own logits."""

import numpy as np

from llmc.quality.measure import windows


def perplexity(model, text, length):
    """model: of llmc.load -> (the perplexity over windows of the text of so many tokens, how many tokens count)."""
    chosen = windows(model.tokenizer.encode(text, add_special_tokens=False), length)
    surprise = count = 0
    for window, logits in zip(chosen, model.logits([w.tokens.tolist() for w in chosen]), strict=True):
        rows = logits[window.first - 1 : -1].astype("float64")
        rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
        ids = window.tokens[window.first :]
        surprise -= rows[np.arange(len(ids)), ids].sum()
        count += len(ids)
    return float(np.exp(surprise / count)), count
