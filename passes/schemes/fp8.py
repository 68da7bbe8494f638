"""fp8: E4M3 weights with one scale for every output channel (-g128: for every 128 weights)."""

from .scheme import Options, Scheme
from .tables import Table

NAMES = ("fp8",)
TAKES = {"group"}


def scheme(name: str, options: Options) -> Scheme:
    """The largest weight is 448: floats gain nothing by a smaller scale."""
    return Table(name, table="e4m3", group=options.group or 0, scale="float32")
