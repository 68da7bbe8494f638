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
        looked_up = case.format.table and case.format.bits == 4
        return "float16" if case.activation == "float16" and not looked_up else None
    return case.activation if case.activation in target.dtypes else None


def multiplies_codes(target, case, rounded):
    """Whether a matrix unit multiplies x's codes with the weight's, as integers or as E4M3 numbers."""
    if rounded is None or rounded % 32 or case.format.group % 32:
        return False
    if case.format.table or not target.int8_run:
        return case.format.table == "e4m3" and target.fp8
    return case.format.bits == 4 or (case.format.bits, case.format.zeros) == (8, False)


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
        many = n if n > max(8, case.experts or 0) else 0
        if many and multiplies_codes(target, case, rounded):
            # Sums of integers are exact, and codes times their scale are not rounded to x's dtype.
            x = round_activation(case.x.astype(np.float32), rounded, case.format.table)
            miss = case.largest_miss(y, None, x)
        else:
            x = None if rounded is None else round_activation(case.x, rounded, case.format.table)
            miss = case.largest_miss(y, multiplied_as(target, case, many), x)
        assert miss <= 1, f"{n} rows: {miss:.2f} times as far from the product as it may be"


# Every kind of format, every executed target, every dtype of activations, all sizes of tiles, ragged shapes; experts
# and rounded activations. The formats' products with everything are slow tests.
QUICK = [
    ("cuda:sm_90", QuantizedCase("int4", 34, 96, "bfloat16"), (0, 1, 9, 200), None),
    ("cuda:sm_90", QuantizedCase("int8", 33, 44, "float16", out="float32"), (7, 64), None),
    ("cuda:sm_90", QuantizedCase("nf4", 34, 64, "float16", experts=3, bias="float32"), (2, 9), None),
    ("rocm:gfx942", QuantizedCase("int4-zp", 34, 64, "bfloat16"), (1, 64), None),
    ("rocm:gfx942", QuantizedCase("mxfp4", 33, 96, "float32", out="bfloat16"), (8, 16), None),
    ("cuda:sm_90", QuantizedCase("int8", 34, 76, "bfloat16"), (1, 9, 200), 0),
    ("rocm:gfx942", QuantizedCase("int4-zp", 34, 192, "float16", out="float32"), (9, 64), 32),
    ("metal", QuantizedCase("int8", 64, 128, "bfloat16"), (1, 16), 0),
    ("cuda:sm_90", QuantizedCase("int3", 34, 96, "float16"), (200,), None),  # more threads than a piece has runs
    ("metal", QuantizedCase("int3-zp", 34, 80, "float16"), (8, 9), None),
    ("metal", QuantizedCase("fp8", 33, 44, "float32"), (1, 9), None),
    ("metal", QuantizedCase("nf4", 33, 64, "float16"), (16,), None),
]


@pytest.mark.parametrize(("name", "case", "rows", "rounded"), QUICK, ids=lambda p: getattr(p, "label", None))
def test_products(name, case, rows, rounded):
    check(name, case, rows, rounded)


@pytest.mark.parametrize("name", ["cuda:sm_90", "metal"])
def test_activations_whose_inverse_is_infinite(name):
    """127 / max|x| is, below 4e-37: such groups are zeros, and 1e-30 has the least scale."""
    case, target = QuantizedCase("int8", 8, 64, "float32"), small(name)
    kernel = quantized.matmul(target, 8, 64, format=case.format, activation="float32", out="float32", rounded=32)
    given = case.arguments(2)
    case.x[0] *= np.float32(1e-38)
    case.x[1] *= np.float32(1e-31)
    y = check_all(kernel, target, given, timeout=500)[-1]
    assert case.largest_miss(y, x=round_activation(case.x, 32)) <= 1 and not y[0].any() and y[1].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("format", ["int8", "int4-zp", "mxfp4"])
@pytest.mark.parametrize(("activation", "rounded"), [("float32", 32), ("bfloat16", 0), ("float16", None)])
def test_all_experts(name, format, activation, rounded):
    case = QuantizedCase(format, 72, 192, activation, experts=4, bias=activation, ids="int64")
    check(name, case, (0, 1, 4, 9, 64, 200), rounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize(("group", "table"), [(0, ""), (16, ""), (32, ""), (64, ""), (0, "e4m3"), (32, "e4m3")])
def test_activations_are_rounded_to_the_codes_that_numpy_finds(name, group, table):
    """The weight is the identity: y says what x was rounded to, bit by bit; ties and groups of zeros among them."""
    format = FORMATS["fp8" if table else "int8"]
    one = np.uint8(0x38) if table else np.uint8(129)
    random = np.random.default_rng(7)
    x = random.standard_normal((16, 64)).astype(np.float32)
    x[1] = random.integers(-254, 255, 64) / 2
    x[1, ::16] = 127
    x[2, :32] = 0
    x[3, 1:] = x[3, 1:] * 2.0**-12  # for E4M3, too small to be normal
    kernel = quantized.matmul(small(name), 64, 64, format=format, activation="float32", out="float32", rounded=group)
    codes, scales = np.where(np.eye(64, dtype=bool), one, np.uint8(format.offset)), np.ones((64, 1), np.float32)
    for n in (5, 16):
        y = check_all(kernel, small(name), [x[:n], codes, scales, Unwritten((n, 64), "float32")])[-1]
        np.testing.assert_array_equal(y, round_activation(x[:n], group, table))


CODES = [
    ("int8", 0),
    ("int8", 64),
    ("int8-g64", 0),
    ("int8-g64", 32),
    ("int4", 32),
    ("int4-zp", 0),
    ("int4-g128-zp", 128),
    ("int4-row", 0),
    ("fp8", 0),
    ("fp8-g128", 128),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", (*EXECUTED, "cuda:sm_80", "rocm:gfx90a"))
@pytest.mark.parametrize(("format", "rounded"), CODES)
def test_all_products_of_codes(name, format, rounded):
    """Groups on either side, on both, of different sizes, and on none; rows of whole steps and not."""
    turn = CODES.index((format, rounded))
    columns, depth = SHAPES[turn % 3] if format == "int8" and not rounded else ((64, 128), (34, 384))[turn % 2]
    check(name, QuantizedCase(format, columns, depth, DTYPES[turn % 3]), (9, 64, 200), rounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED[:4])
def test_codes_of_the_largest_size_do_not_overflow(name):
    """All codes are -127 and all weights -128: a sum near 2**31 is still exact, and rounded once."""
    depth = 1 << 17
    x, codes = np.full((9, depth), -127, np.float32), np.zeros((2, depth), np.uint8)
    made = dict(format=FORMATS["int8"], activation="float32", out="float32", rounded=0)
    kernel = quantized.matmul(small(name), 2, depth, **made)
    given = [x, codes, np.ones((2, 1), np.float32), Unwritten((9, 2), "float32")]
    np.testing.assert_array_equal(check_all(kernel, small(name), given, timeout=500)[-1], depth * 127.0 * 128.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED[:2])
@pytest.mark.parametrize(("format", "rounded"), [("int8", 0), ("int4", 32), ("fp8", 0)])
def test_rows_that_are_not_finite(name, format, rounded):
    case = QuantizedCase(format, 34, 64, "float32")
    x, *w, y = case.arguments(12)
    x[3, 5], x[7, 9] = np.nan, np.inf
    made = dict(format=case.format, activation="float32", out="float32", rounded=rounded)
    kernel = quantized.matmul(small(name), 34, 64, **made)
    for n in (8, 12):
        found = check_all(kernel, small(name), [x[:n], *w, replace(y, shape=(n, 34))])[-1]
        assert (np.isnan(found).all(1) == np.isin(np.arange(n), (3, 7))).all()
        assert np.isfinite(np.delete(found, (3, 7), 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
def test_batch_invariant_rows_are_the_same_bits_whatever_the_batch(name):
    target = replace(small(name), multiprocessors=2)  # both sizes of tile within 200 rows
    case = QuantizedCase("int4", 72, 160, "bfloat16", out="float32")
    made = dict(format=case.format, activation="bfloat16", out="float32", batch_invariant=True)
    kernel = quantized.matmul(target, 72, 160, **made)
    x, *w, y = case.arguments(200)
    whole = check_all(kernel, target, [x, *w, y])[-1]
    for n in (1, 9, 130):
        part = check_all(kernel, target, [x[:n], *w, replace(y, shape=(n, 72))])[-1]
        assert part.tobytes() == whole[:n].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED[:2] + EXECUTED[4:])
def test_not_a_number_stays_one(name):
    """E4M3's NaN, and E8M0's, in one weight of a column each: those columns are NaN, the others are not."""
    for format, part, value in (("fp8", 0, 255), ("mxfp4", 1, 255)):
        case = QuantizedCase(format, 34, 32, "float32")
        x, *stored, y = case.arguments(9)
        stored[part][3, 0] = value
        made = dict(format=case.format, activation="float32", out="float32")
        found = check_all(quantized.matmul(small(name), 34, 32, **made), small(name), [x, *stored, y])[-1]
        assert (np.isnan(found) == (np.arange(34) == 3)).all()


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
