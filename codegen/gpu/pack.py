"""How weights lie on a GPU: rows as a checkpoint has them, so that every GPU shares one stored copy.

A row that does not fill whole units of 16 bytes is padded with zeros: what loads four or eight elements at once never
crosses from one row to the next.
"""

from collections.abc import Callable

from tvm import relax
from tvm.relax import op as R

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
UNIT = 16  # bytes of the widest load of one thread


def row_elements(depth: int, dtype: str) -> int:
    """Elements of a stored row of so many: depth, in whole units."""
    elements = UNIT // BYTES[dtype]
    return -(-depth // elements) * elements


def pack(
    emit: Callable[[relax.Expr], relax.Expr], rows: relax.Expr, columns: int, depth: int, dtype: str
) -> relax.Expr:
    """rows [..., columns, depth] as stored, in Relax ops: as they are, or zero-padded to row_elements."""
    padding = row_elements(depth, dtype) - depth
    if not padding:
        return rows
    lead = len(rows.ty.shape) - 1
    return emit(R.nn.pad(rows, [0, 0] * lead + [0, padding], "constant", 0.0))
