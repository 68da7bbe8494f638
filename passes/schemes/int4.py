"""int4: half a byte a weight in groups of 32 (-g64, -g128); -zp: a zero point a group."""

from .rounding import Integers
from .scheme import Options, Scheme

NAMES = ("int4", "int4-g32", "int4-g64", "int4-g128", "int4-g128-zp", "int4-g32-a8")
TAKES = {"group", "zeros", "activation"}


def scheme(name: str, options: Options) -> Scheme:
    group = options.group or 32
    return Integers(name, group if options.activation else None, bits=4, group=group, zeros=options.zeros)
