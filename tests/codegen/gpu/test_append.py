import itertools

import numpy as np
import pytest

from tests.codegen.gpu import emission, pages

BATCHES = [[(1, 1)], [(1, 1), (5, 0), (40, 23), (16, 16), (33, 1)], [(200, 200)]]  # (kv length, new tokens)
SHAPES = [(8, 64), (3, 7), (1, 576)]  # heads, width
EVERYTHING = list(itertools.product(emission.EXECUTED, pages.DTYPES, SHAPES))
COVER = [c for i, c in enumerate(EVERYTHING) if (i + i // 3) % 3 == 0]


def check(kind, dtype, shape, token_last=False, page_size=16):
    from llmc.codegen.gpu.append import append_pages
    from llmc.codegen.software_device import check_all

    heads, width = shape
    target = emission.target(kind)
    kernel = append_pages(target, heads, width, dtype, page_size, token_last)
    for batch in BATCHES:
        table = pages.tables(batch, page_size)
        x = pages.normal(1, (table["qo_indptr"][-1], heads, width), dtype)
        page = (width, page_size) if token_last else (page_size, width)
        pool = pages.normal(2, (len(table["kv_indices"]) + 1, heads, *page), dtype)
        expected = pool.copy()
        for s, (length, new) in enumerate(batch):
            for i in range(new):
                position = length - new + i
                to = expected[table["kv_indices"][table["kv_indptr"][s] + position // page_size]]
                row = x[table["qo_indptr"][s] + i]
                (to.swapaxes(1, 2) if token_last else to)[:, position % page_size] = row
        padded = np.concatenate([x, x[:3]])  # rows of no sequence are left out
        found = check_all(kernel, target, [pool, padded, *table.values()])[0]
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(("kind", "dtype", "shape"), COVER)
def test_rows_go_to_their_slots_and_nothing_else_changes(kind, dtype, shape):
    check(kind, dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "shape"), [c for c in EVERYTHING if c not in COVER])
def test_rows_go_to_their_slots_everywhere(kind, dtype, shape):
    check(kind, dtype, shape)


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_pages_with_their_tokens_last(kind):
    check(kind, "float16", (3, 7), token_last=True)


@pytest.mark.parametrize("kind", emission.EXECUTED)
@pytest.mark.parametrize(
    ("dtype", "page"), [("bfloat16", (2, 16, 24)), ("float16", (1, 3, 7)), ("float32", (2, 5, 16))]
)
def test_pages_are_copied_one_after_the_other(kind, dtype, page):
    from llmc.codegen.gpu.append import copy_pages
    from llmc.codegen.software_device import check_all

    target = emission.target(kind)
    pool = pages.normal(0, (9, *page), dtype)
    expected = pool.copy()
    for source, destination in ((1, 3), (3, 8), (7, 1)):
        expected[destination] = expected[source]
    numbers = [np.array(n, np.int32) for n in ([1, 3, 7], [3, 8, 1])]
    found = check_all(copy_pages(target, page, dtype), target, [pool, *numbers])[0]
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
