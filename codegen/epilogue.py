"""What a product's kernel does to its sums before it stores them."""

from dataclasses import dataclass

__all__ = ["Epilogue"]


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum before it is stored, in this order: + bias, gate, + residual; one rounding at the end.

    gate: the name of an activation f; the weight's first half of columns are gates a, its second half b, y = f(a) * b.
    """

    bias: str | None = None  # dtype
    gate: str | None = None  # "silu", "gelu_tanh"
    residual: str | None = None  # dtype
