"""mxfp4: half a byte a weight, 32 of them sharing a power of two (OCP Microscaling Formats v1.0: E2M1 and E8M0)."""

from .scheme import Options, Scheme
from .tables import Table

NAMES = ("mxfp4",)
TAKES: set[str] = set()


def scheme(name: str, options: Options) -> Scheme:
    return Table(name, table="e2m1", scale="e8m0", only=32)
