import itertools

import numpy as np
import pytest

from tests.codegen.gpu import emission, pages

DEPTHS = [64, 12, 7, 576]
EVERYTHING = list(itertools.product(emission.EXECUTED, pages.DTYPES, pages.DTYPES, DEPTHS))
COVER = [c for i, c in enumerate(EVERYTHING) if (i + i // 4) % 4 == 0]


def check(kind, weight, out, depth, packed=False, ids="int32"):
    from llmc.codegen.gpu.gather import take
    from llmc.codegen.gpu.pack import row_elements
    from llmc.codegen.software_device import Unwritten, check_all

    target = emission.target(kind)
    kernel = take(target, 50, depth, weight=weight, out=out, packed=packed, ids=ids)
    w = pages.normal(3, (50, row_elements(depth, weight) if packed else depth), weight)
    for numbers in ([7], [3, 49, 0, 3, 7]):
        ids_ = np.array(numbers, ids)
        found = check_all(kernel, target, [w, ids_, Unwritten((len(numbers), depth), out)])[-1]
        expected = w[ids_, :depth].astype(np.float32).astype(pages.DTYPES[out])
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(("kind", "weight", "out", "depth"), COVER)
def test_rows_by_number(kind, weight, out, depth):
    check(kind, weight, out, depth)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "weight", "out", "depth"), [c for c in EVERYTHING if c not in COVER])
def test_rows_by_number_everywhere(kind, weight, out, depth):
    check(kind, weight, out, depth)


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_rows_of_a_packed_weight(kind):
    check(kind, "bfloat16", "float32", 12, packed=True, ids="int64")
