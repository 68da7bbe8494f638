import numpy as np
import pytest

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
