"""int3: three bits a weight in groups of 32 (-g16, -g64, -g128), or with a zero point a group (-zp)."""

from .rounding import Integers
from .scheme import Options, Scheme

NAMES = ("int3", "int3-g32-zp", "int3-g64")
TAKES = {"group", "zeros", "activation"}


def scheme(name: str, options: Options) -> Scheme:
    group = options.group or 32
    return Integers(name, group if options.activation else None, bits=3, group=group, zeros=options.zeros)
