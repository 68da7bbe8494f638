"""fp8: E4M3 weights with one scale for every output channel (-g128: for every 128 weights).

There is no -a8: kernels exist that round activations to E4M3 (round_activation's kind "fp8"), but whole models with
them are 0.06 to 0.15 of the logits' spread away from transformers with the same rounding, where int8's are 1e-6.
"""

from .scheme import Options, Scheme
from .tables import Table

NAMES = ("fp8",)
TAKES = {"group"}


def scheme(name: str, options: Options) -> Scheme:
    """The largest weight is 448: floats gain nothing by a smaller scale."""
    return Table(name, table="e4m3", group=options.group or 0, scale="float32")
