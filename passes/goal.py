"""What a compilation is for: the one thing beside the module that a pass may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal:
    """The facts and choices that passes and codegen work toward.

    target       facts of the machine (a dataclass of `llmc.targets`); None: nothing is known, and passes that need a
                 fact take the plainest choice
    dtype        compute dtype of activations
    page_size    tokens in a page of the cache
    max_context  longest sequence, in tokens; None: the model's own limit
    schemes      weight -> the scheme (passes/schemes) that it is to be stored in; all others stay as they are
    kv_cache     "int8" or "fp8": keys and values are cached in 8 bits (ir.quantized_cache); None: as they are
    """

    target: Any = None
    dtype: str = "float32"
    page_size: int = 16
    max_context: int | None = None
    schemes: Mapping[str, Any] = field(default_factory=dict)
    kv_cache: str | None = None

    def fact(self, name: str, default: Any) -> Any:
        """A fact of the target, or `default` where the target (or the fact) is unknown."""
        return getattr(self.target, name, default)
