"""w8a8: int8 weights, and activations in 8 bits with one scale a token."""

from .rounding import Integers
from .scheme import Options, Scheme

NAMES = ("w8a8",)
TAKES: set[str] = set()


def scheme(name: str, options: Options) -> Scheme:
    return Integers(name, 0, bits=8, scale="float32")
