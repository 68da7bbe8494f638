"""Generation on a terminal: streamed text on stdout, figures on stderr."""

import sys
import time
from collections.abc import Mapping
from typing import Any


def complete(model, prompt, sampling: Mapping[str, Any], *, stats: bool = False, end: str = "\n") -> str:
    """Stream one completion to stdout and return its text. `prompt` is what Model.stream takes."""
    started = time.perf_counter()
    first = None
    pieces, count, reason = [], 0, None
    for chunk in model.stream(prompt, **sampling):
        if first is None:
            first = time.perf_counter()
        count += len(chunk.token_ids)
        reason = chunk.finish_reason or reason
        pieces.append(chunk.text)
        print(chunk.text, end="", flush=True)
    print(end, end="", flush=True)
    if stats and first is not None:
        decoding = time.perf_counter() - first
        speed = f"{(count - 1) / decoding:.1f} tokens/s" if count > 1 and decoding > 0 else "-"
        print(
            f"{count} tokens, first after {1e3 * (first - started):.0f} ms, then {speed}; finished: {reason}",
            file=sys.stderr,
        )
    return "".join(pieces)


def chat_session(model, sampling: Mapping[str, Any], *, stats: bool = False) -> None:
    """A conversation on the terminal, until an empty line's end-of-file (Ctrl-D) or /exit."""
    print("chat with the model; /new starts again, /exit or Ctrl-D ends", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/new":
            messages.clear()
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": complete(model, messages, sampling, stats=stats)})
