import itertools

import numpy as np
import pytest

from tests import quantized_cache
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


def check_codes(kind, dtype, shape, cache, token_last=False, page_size=16):
    from llmc.codegen.gpu.append import append_pages
    from llmc.codegen.software_device import check_all

    heads, width = shape
    target = emission.target(kind)
    kernel = append_pages(target, heads, width, dtype, page_size, token_last, cache)
    for batch in BATCHES[:2]:
        table = pages.tables(batch, page_size)
        spread = np.exp2(np.random.default_rng(3).integers(-30, 10, (table["qo_indptr"][-1], heads, 1)))
        x = (pages.normal(1, (table["qo_indptr"][-1], heads, width)) * spread).astype(pages.DTYPES[dtype])
        codes, scales = quantized_cache.quantize(x, cache)
        page = (width, page_size) if token_last else (page_size, width)
        pool = np.full((len(table["kv_indices"]) + 1, heads, *page), 85, codes.dtype)
        beside = np.full((len(pool), heads, page_size), 7, np.float32)
        expected, expected_beside = pool.copy(), beside.copy()
        for s, (length, new) in enumerate(batch):
            for i in range(new):
                position, row = length - new + i, table["qo_indptr"][s] + i
                number = table["kv_indices"][table["kv_indptr"][s] + position // page_size]
                to = expected[number].swapaxes(1, 2) if token_last else expected[number]
                to[:, position % page_size] = codes[row]
                expected_beside[number, :, position % page_size] = scales[row]
        padded = np.concatenate([x, x[:3]])  # rows of no sequence are left out
        found, found_beside, *_ = check_all(kernel, target, [pool, beside, padded, *table.values()])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_beside, expected_beside)


CODES_COVER = [
    ("cuda", "float16", (8, 64), "int8"),
    ("cuda", "float32", (3, 7), "fp8"),
    ("rocm", "bfloat16", (1, 576), "fp8"),
    ("rocm", "float32", (8, 64), "int8"),
    ("metal", "bfloat16", (8, 64), "fp8"),
    ("metal", "float16", (3, 7), "int8"),
]
CODES = list(itertools.product(emission.EXECUTED, pages.DTYPES, SHAPES, quantized_cache.KINDS))


@pytest.mark.parametrize(("kind", "dtype", "shape", "cache"), CODES_COVER)
def test_codes_and_scales_are_those_of_numpy(kind, dtype, shape, cache):
    check_codes(kind, dtype, shape, cache)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "shape", "cache"), [c for c in CODES if c not in CODES_COVER])
def test_codes_and_scales_are_those_of_numpy_everywhere(kind, dtype, shape, cache):
    check_codes(kind, dtype, shape, cache)


@pytest.mark.parametrize("cache", quantized_cache.KINDS)
def test_a_nan_is_kept_in_its_scale(cache):
    from llmc.codegen.gpu.append import append_pages
    from llmc.codegen.software_device import check_all

    for kind in emission.EXECUTED:
        target = emission.target(kind)
        x = pages.normal(0, (1, 2, 40))
        x[0, 1, 33] = np.nan
        codes, _ = quantized_cache.quantize(x[:, :1], cache)
        pool, beside = np.zeros((2, 2, 16, 40), codes.dtype), np.zeros((2, 2, 16), np.float32)
        table = [np.array(a, np.int32) for a in ([0, 1], [0, 1], [1], [1])]
        kernel = append_pages(target, 2, 40, "float32", 16, False, cache)
        scales = check_all(kernel, target, [pool, beside, x, *table])[1][1, :, 0]
        assert np.isfinite(scales[0]) and np.isnan(scales[1]), kind


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_codes_in_pages_with_their_tokens_last(kind):
    check_codes(kind, "float16", (3, 8), "int8", token_last=True)


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
