"""int8: a byte a weight, one scale for every output channel."""

from .rounding import Integers
from .scheme import Options, Scheme

NAMES = ("int8",)
TAKES = {"group"}


def scheme(name: str, options: Options) -> Scheme:
    """A float32 scale a row costs nothing; -g32 and the like give groups with float16 scales."""
    return Integers(name, bits=8, group=options.group or 0, scale="float16" if options.group else "float32")
