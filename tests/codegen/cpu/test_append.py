import numpy as np
import pytest

from tests import quantized_cache
from tests.codegen.cpu import native

PAGE = 16
BATCH = [(1, 1), (5, 0), (40, 23), (16, 16), (33, 1)]  # (kv length, new tokens)


def append(target, token_last, dtype, heads, width):
    """(pages after, pages expected)"""
    from llmc.codegen.cpu.append import append_pages

    kernel = native.build(append_pages(target, heads, width, dtype, PAGE, token_last), target)
    counts = [-(-length // PAGE) for length, _ in BATCH]
    indices = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1
    qo, kv = (np.cumsum([0, *c]).astype(np.int32) for c in ([n for _, n in BATCH], counts))
    last = np.array([(length - 1) % PAGE + 1 for length, _ in BATCH], np.int32)
    x = native.normal(1, (qo[-1], heads, width), dtype)
    shape = (heads, width, PAGE) if token_last else (heads, PAGE, width)
    pages = native.normal(2, (len(indices) + 1, *shape), dtype)
    expected = pages.copy()
    for s, (length, new) in enumerate(BATCH):
        for i in range(new):
            position = length - new + i
            page = expected[indices[kv[s] + position // PAGE]]
            (page.swapaxes(1, 2) if token_last else page)[:, position % PAGE] = x[qo[s] + i]
    kernel(pages, x, qo, kv, indices, last)
    kernel(np.zeros_like(pages), x[:0].copy(), qo[:1] * 0, kv[:1] * 0, indices[:0].copy(), last[:0].copy())
    return pages.astype(np.float32), expected.astype(np.float32)


def append_everywhere(token_last, dtype):
    cases = [(1, 576), (3, 7), (8, 64)]
    return [append(t, token_last, dtype, *case) for t in native.targets() for case in cases]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("token_last", [True, False])
def test_rows_go_to_their_slots_and_nothing_else_changes(isolated, token_last, dtype):
    for found, expected in isolated(append_everywhere, token_last, dtype):
        np.testing.assert_array_equal(found, expected)


def append_codes(target, token_last, dtype, heads, width, kind):
    """(codes after, codes expected, scales after, scales expected)"""
    from llmc.codegen.cpu.append import append_pages

    kernel = native.build(append_pages(target, heads, width, dtype, PAGE, token_last, kind), target)
    counts = [-(-length // PAGE) for length, _ in BATCH]
    indices = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1
    qo, kv = (np.cumsum([0, *c]).astype(np.int32) for c in ([n for _, n in BATCH], counts))
    last = np.array([(length - 1) % PAGE + 1 for length, _ in BATCH], np.int32)
    spread = np.exp2(np.random.default_rng(3).integers(-40, 10, (qo[-1], heads, 1)))
    x = (native.normal(1, (qo[-1], heads, width)) * spread).astype(native.DTYPES[dtype])
    x[0] = 0
    shape = (heads, width, PAGE) if token_last else (heads, PAGE, width)
    codes, found = quantized_cache.quantize(x, kind)
    pages = np.full((len(indices) + 1, *shape), 85, codes.dtype)
    scales = np.full((len(indices) + 1, heads, PAGE), 7, np.float32)
    expected = pages.copy(), scales.copy()
    for s, (length, new) in enumerate(BATCH):
        for i in range(new):
            to, slot = indices[kv[s] + (length - new + i) // PAGE], (length - new + i) % PAGE
            page = expected[0][to]
            (page.swapaxes(1, 2) if token_last else page)[:, slot] = codes[qo[s] + i]
            expected[1][to, :, slot] = found[qo[s] + i]
    kernel(pages, scales, x, qo, kv, indices, last)
    return pages, expected[0], scales, expected[1]


def append_codes_everywhere(token_last, dtype):
    cases = [(1, 576), (3, 7), (8, 64)]
    return [
        append_codes(t, token_last, dtype, *case, kind)
        for t in native.targets()
        for case in cases
        for kind in quantized_cache.KINDS
    ]


@pytest.mark.parametrize("token_last, dtype", [(True, "float32"), (False, "bfloat16")])
def test_codes_and_scales_are_those_of_numpy(isolated, token_last, dtype):
    for codes, expected, scales, expected_scales in isolated(append_codes_everywhere, token_last, dtype):
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(scales, expected_scales)


def append_nan(kind):
    from llmc.codegen.cpu.append import append_pages

    [target, *_] = native.targets()
    kernel = native.build(append_pages(target, 2, 20, "float32", PAGE, False, kind), target)
    x = native.normal(0, (3, 2, 20))
    x[0, 1, 17], x[2, 0, 3] = np.nan, np.inf
    codes, _ = quantized_cache.quantize(x[1:2], kind)
    pages, scales = np.zeros((2, 2, PAGE, 20), codes.dtype), np.zeros((2, 2, PAGE), np.float32)
    kernel(pages, scales, x, *(np.array(a, np.int32) for a in ([0, 3], [0, 1], [1], [3])))
    return quantized_cache.dequantize(pages, scales)[1, :, :3]


@pytest.mark.parametrize("kind", quantized_cache.KINDS)
def test_what_is_no_number_stays_none(isolated, kind):
    """A head with a NaN is NaN; with an infinity no number of it is finite. The others are what they are."""
    found = isolated(append_nan, kind)
    assert np.isnan(found[1, 0]).all() and not np.isfinite(found[0, 2]).any()
    assert np.isfinite(found[0, :2]).all() and np.isfinite(found[1, 1:]).all()


def copy():
    from llmc.codegen.cpu.append import copy_pages

    [target, *_] = native.targets()
    found = []
    for dtype in ("float32", "bfloat16"):
        pages = native.normal(0, (9, 2, 5, PAGE), dtype)
        expected = pages.copy()
        expected[[3, 8]] = expected[[1, 7]]
        kernel = native.build(copy_pages(target, (2, 5, PAGE), dtype), target)
        kernel(pages, np.array([1, 7], np.int32), np.array([3, 8], np.int32))
        found.append((pages.astype(np.float32), expected.astype(np.float32)))
    return found


def test_copied_pages(isolated):
    for found, expected in isolated(copy):
        np.testing.assert_array_equal(found, expected)
