"""Products whose weight an index picks, on the software device, strictly, against float64."""

from dataclasses import replace

import pytest

from llmc import targets
from llmc.codegen.epilogue import Epilogue
from llmc.codegen.gpu.experts import expert_linear
from llmc.codegen.software_device import check_all
from tests.codegen.gpu.products import DTYPES, PAIRS, ROWS, Case
from tests.codegen.gpu.test_matmul import EXECUTED


def check(name, case, rows=ROWS):
    (target,) = targets.parse(name)
    kernel = expert_linear(target, case.experts, case.columns, case.depth, ids=case.ids, **case.options())
    for n in rows:
        miss = case.largest_miss(check_all(kernel, target, case.arguments(n), timeout=500)[-1])
        assert miss <= 1, f"{n} rows: {miss:.2f} times as far from the product as it may be"


def gated(dtype):
    return Case(72, 136, dtype, dtype, experts=5, epilogue=Epilogue(bias="float32", gate="silu"))


def test_a_call_says_whether_sums_are_in_one_order():
    (target,) = targets.parse("cuda:sm_90")
    case = Case(72, 136, "bfloat16", "bfloat16", out="float32", experts=3)
    how = case.options() | {"ids": case.ids}
    made = {of: expert_linear(target, 3, 72, 136, **how, batch_invariant=of) for of in (False, True, None)}
    *given, y = case.arguments(40)
    for asked in (False, True):
        found = check_all(made[None], target, [*given, int(asked), y])[-1]
        assert found.tobytes() == check_all(made[asked], target, [*given, y])[-1].tobytes()
    few = [a[:2] if len(a) == 40 else a for a in given]
    part = check_all(made[True], target, [*few, replace(y, shape=(2, 72))])[-1]
    assert part.tobytes() == found[:2].tobytes()


QUICK = [
    ("cuda:sm_90", gated("bfloat16")),
    ("rocm:gfx942", gated("float16")),
    ("metal", gated("bfloat16")),
    ("rocm:gfx1100", Case(34, 7, "float32", "float32", experts=3, ids="int64", epilogue=Epilogue(residual="float32"))),
]


@pytest.mark.parametrize(("name", "case"), QUICK, ids=lambda p: getattr(p, "label", None))
def test_expert_products(name, case):
    check(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize(("weight", "activation"), PAIRS)
@pytest.mark.parametrize("shape", [(64, 64), (200, 136), (34, 7)], ids=str)
def test_all_expert_products(name, weight, activation, shape):
    out = DTYPES[(PAIRS.index((weight, activation)) + shape[0]) % 3]
    check(name, Case(*shape, weight, activation, out, experts=4, epilogue=Epilogue(bias=weight)))
