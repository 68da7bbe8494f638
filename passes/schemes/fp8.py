"""fp8: E4M3 weights with one scale for every output channel (-g128: for every 128 weights); -a8: activations in E4M3,
with a scale a token (or a group)."""

from .scheme import Options, Scheme
from .tables import Table

NAMES = ("fp8", "fp8-a8")
TAKES = {"group", "activation"}


def scheme(name: str, options: Options) -> Scheme:
    """The largest weight is 448: floats gain nothing by a smaller scale."""
    group = options.group or 0
    return Table(name, group if options.activation else None, table="e4m3", group=group, scale="float32")
