"""Products and lookups over quantized weights on the software device, strictly, against float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from llmc import targets
from llmc.codegen.gpu import quantized
from llmc.codegen.software_device import Unwritten, check_all
from llmc.codegen.weights import numpy_dtype
from tests.codegen.gpu.quantized_products import FORMATS, QuantizedCase, QuantizedWeight, round_activation

EXECUTED = ("cuda:sm_90", "rocm:gfx942", "rocm:gfx1100", "rocm:gfx1201", "metal")
DTYPES = ("float32", "float16", "bfloat16")
ROWS = (0, 1, 7, 8, 9, 16, 64, 200)
# Of tiles' sizes; ragged in columns; in runs of codes; in chunks of the matrix units and in everything.
SHAPES = [(64, 128), (200, 160), (34, 96), (33, 44)]


def small(name):
    """A machine so small that 64 rows take the middle tiles and 200 the largest."""
    (target,) = targets.parse(name)
    return replace(target, multiprocessors=3)


def multiplied_as(target, case, rows):
    """The dtype to which a matrix unit's weights are rounded; None where float32 multiplies."""
    if rows <= 8 or case.depth % 8:
        return None
    if target.matrix_unit == "simdgroup":
        return "float16" if case.activation == "float16" else None
    return case.activation if case.activation in target.dtypes else None


def check(name, case, rows=ROWS, rounded=None):
    target = small(name)
    made = dict(format=case.format, activation=case.activation, rounded=rounded)
    if case.experts:
        made |= dict(ids=case.ids, bias=case.bias_dtype)
        kernel = quantized.expert_linear(target, case.experts, case.columns, case.depth, **made)
    else:
        kernel = quantized.matmul(target, case.columns, case.depth, out=case.out, **made)
    for n in rows:
        y = check_all(kernel, target, case.arguments(n), timeout=500)[-1]
        x = None if rounded is None else round_activation(case.x, rounded)
        few = max(8, case.experts or 0)
        miss = case.largest_miss(y, multiplied_as(target, case, n if n > few else 0), x)
        assert miss <= 1, f"{n} rows: {miss:.2f} times as far from the product as it may be"


# Every format on some target, every target with its matrix unit, some sizes of tiles and some ragged shape.
QUICK = [
    ("cuda:sm_90", QuantizedCase("int4", 200, 160, "bfloat16"), (1, 9, 200)),
    ("cuda:sm_90", QuantizedCase("int8", 34, 96, "float16", out="float32"), (7, 64)),
    ("rocm:gfx942", QuantizedCase("int4", 34, 96, "float16"), (1, 64)),
    ("metal", QuantizedCase("int8", 64, 128, "bfloat16"), (1, 16)),
]


@pytest.mark.parametrize(("name", "case", "rows"), QUICK, ids=lambda p: getattr(p, "label", None))
def test_products(name, case, rows):
    check(name, case, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", DTYPES)
def test_all_products(name, format, activation):
    """Shapes and out dtypes go round."""
    turn = list(FORMATS).index(format) + DTYPES.index(activation)
    group = FORMATS[format].group
    columns, depth = SHAPES[turn % len(SHAPES)]
    depth = -(-depth // group) * group if group else depth
    check(name, QuantizedCase(format, columns, depth, activation, out=DTYPES[turn % 3]))


def rows_by_number(name, format, depth, out, ids="int32"):
    target = small(name)
    weight = QuantizedWeight(FORMATS[format], (50, depth), np.random.default_rng(3))
    kernel = quantized.take(target, 50, depth, format=weight.format, out=out, ids=ids)
    for numbers in ([7], [3, 49, 0, 3, 7], []):
        chosen = np.array(numbers, ids)
        found = check_all(kernel, target, [*weight.stored, chosen, Unwritten((len(numbers), depth), out)])[-1]
        expected = weight.float32()[chosen].astype(numpy_dtype(out))
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "format", "depth", "out"),
    [("cuda:sm_90", "int8", 44, "bfloat16"), ("rocm:gfx942", "int4-zp", 192, "float32")],
)
def test_rows_by_number(name, format, depth, out):
    rows_by_number(name, format, depth, out, ids="int64" if depth == 44 else "int32")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), list(itertools.product(EXECUTED[:2] + EXECUTED[4:], FORMATS)))
def test_all_rows_by_number(name, format):
    for depth, out in ((FORMATS[format].group or 44, "float16"), (2 * (FORMATS[format].group or 96), "float32")):
        rows_by_number(name, format, depth, out)
