"""nf4: half a byte a weight in groups of 64, the 16 values being quantiles of a normal distribution."""

from .scheme import Options, Scheme
from .tables import Table

NAMES = ("nf4", "nf4-g32")
TAKES = {"group"}


def scheme(name: str, options: Options) -> Scheme:
    return Table(name, table="nf4", group=options.group or 64, shares=(0.8, 0.85, 0.9, 0.95, 1.0, 1.05))
