"""Matrix products on the software device, strictly, against float64."""

from dataclasses import replace

import pytest

from llmc import targets
from llmc.codegen.epilogue import Epilogue
from llmc.codegen.gpu.matmul import matmul
from llmc.codegen.software_device import check_all
from tests.codegen.gpu.products import DTYPES, PAIRS, ROWS, Case

EXECUTED = ("cuda:sm_90", "rocm:gfx942", "rocm:gfx1100", "rocm:gfx1201", "metal")

# Small, of tiles' sizes and their multiples; ragged in columns, in depth, in both.
SHAPES = [(64, 64), (200, 136), (33, 7), (1, 1), (72, 300), (264, 1032)]
EPILOGUES = [
    Epilogue(),
    Epilogue(bias="float32"),
    Epilogue(bias="bfloat16", residual="float32"),
    Epilogue(gate="silu"),
    Epilogue(gate="gelu_tanh", bias="float16", residual="bfloat16"),
]


def check(name, case, rows=ROWS, **options):
    """On a machine so small that 64 rows take the middle tiles and 200 the largest."""
    (target,) = targets.parse(name)
    target = replace(target, multiprocessors=3)
    kernel = matmul(target, case.columns, case.depth, **case.options(), **options)
    for n in rows:
        miss = case.largest_miss(check_all(kernel, target, case.arguments(n), timeout=500)[-1])
        assert miss <= 1, f"{n} rows: {miss:.2f} times as far from the product as it may be"


def whole(dtype):
    return Case(200, 136, dtype, dtype, epilogue=Epilogue(bias="float32", residual="bfloat16"))


def gated(dtype):
    return Case(264, 72, dtype, dtype, out="float32", epilogue=Epilogue(gate="silu"))


def mixed():
    return Case(66, 37, "float16", "float32", epilogue=Epilogue(gate="gelu_tanh", bias="float16"))


# Every target with its matrix unit and all sizes of tiles; gates, and products without matrix units, in turns.
QUICK = [
    ("cuda:sm_90", whole("bfloat16"), ROWS),
    ("cuda:sm_90", gated("float16"), (1, 9, 130)),
    ("cuda:sm_90", mixed(), ROWS),
    ("rocm:gfx942", whole("float16"), ROWS),
    ("rocm:gfx942", gated("bfloat16"), (8, 64, 130)),
    ("rocm:gfx942", mixed(), (1, 8, 200)),
    ("rocm:gfx1100", whole("bfloat16"), ROWS),
    ("rocm:gfx1201", whole("float16"), ROWS),
    ("metal", whole("bfloat16"), ROWS),
    ("metal", gated("float16"), (2, 9, 130)),
    ("metal", Case(33, 7, "bfloat16", "bfloat16"), ROWS),
]


@pytest.mark.parametrize(("name", "case", "rows"), QUICK, ids=lambda p: getattr(p, "label", None))
def test_products(name, case, rows):
    check(name, case, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_products(name, pair, shape):
    """What is done to finished sums is the same text on all targets, whatever came before: dtypes of y and epilogues
    go round, so that each meets every target, every shape, every pair of dtypes and each other.
    """
    turn = SHAPES.index(shape) + PAIRS.index(pair) + EXECUTED.index(name)
    out, epilogue = DTYPES[turn % len(DTYPES)], EPILOGUES[turn % len(EPILOGUES)]
    if epilogue.gate and shape[0] % 2:
        epilogue = replace(epilogue, gate=None)
    check(name, Case(*shape, *pair, out, epilogue))


@pytest.mark.parametrize("name", ["cuda:sm_90", *(pytest.param(n, marks=pytest.mark.slow) for n in EXECUTED[1:])])
def test_batch_invariant_rows_are_the_same_bits_whatever_the_batch(name):
    (target,) = targets.parse(name)
    target = replace(target, multiprocessors=2)  # both sizes of tile within 200 rows
    case = Case(72, 136, "bfloat16", "bfloat16", out="float32")
    kernel = matmul(target, case.columns, case.depth, **case.options(), batch_invariant=True)
    x, w, y = case.arguments(200)
    whole = check_all(kernel, target, [x, w, y])[-1]
    for n in (1, 9, 130):
        part = check_all(kernel, target, [x[:n], w, replace(y, shape=(n, 72))])[-1]
        assert part.tobytes() == whole[:n].tobytes()


def test_a_call_says_whether_sums_are_in_one_order():
    (target,) = targets.parse("cuda:sm_90")
    case = Case(72, 136, "bfloat16", "bfloat16", out="float32")
    x, w, y = case.arguments(3)
    made = {of: matmul(target, 72, 136, **case.options(), batch_invariant=of) for of in (False, True, None)}
    for asked in (False, True):
        found = check_all(made[None], target, [x, w, int(asked), y])[-1]
        assert found.tobytes() == check_all(made[asked], target, [x, w, y])[-1].tobytes()
        assert found.tobytes() != check_all(made[not asked], target, [x, w, y])[-1].tobytes()
