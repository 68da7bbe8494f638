"""Masks are named by what they let through."""

import pytest
import torch

from llmc.frontend.masks import CELLS, LONGEST, Mask, classify, lengths, sampled_rows


def seen(kind, size, n, rows):
    i, j = rows[:, None], torch.arange(n)[None]
    return {
        "causal": j <= i,
        "window": (j <= i) & (i - j < size),
        "chunked": (j <= i) & (i // max(size, 1) == j // max(size, 1)),
        "prefix": (j <= i) | (j < size),
        "bidirectional": torch.ones(len(rows), n, dtype=torch.bool),
    }[kind]


def samples(kind, size, sizes, max_context):
    for n in lengths(sizes, max_context):
        rows = sampled_rows(n, sizes)
        yield n, rows, seen(kind, size, n, rows)


@pytest.mark.parametrize(
    "mask",
    [
        Mask("causal"),
        Mask("window", 9),
        Mask("window", 4096),
        Mask("chunked", 8),
        Mask("chunked", 8192),
        Mask("prefix", 5),
        Mask("bidirectional"),
    ],
    ids=str,
)
def test_every_class_is_named(mask):
    assert classify(samples(mask.kind, mask.size, [9, 8, 4096, 8192], 32768)) == mask


def test_a_window_as_long_as_the_context_is_causal():
    assert classify(samples("window", 512, [512], 512)) == Mask("causal")
    assert classify(samples("window", 511, [511], 512)) == Mask("window", 511)


def test_a_window_that_no_config_names_is_found_at_the_longest_context():
    assert classify(samples("window", 3000, [], 8192)) == Mask("window", 3000)


def test_what_fits_no_class_is_none():
    rows = torch.arange(64)
    i, j = rows[:, None], rows[None]
    dilated = (j <= i) & ((i - j) % 2 == 0)
    assert classify([(64, rows, dilated)]) is None
    mixed = (j <= i) & ((i - j < 9) | (i // 16 == j // 16))
    assert classify([(64, rows, mixed)]) is None
    blind = (j <= i) & (i > 0)
    assert classify([(64, rows, blind)]) is None


def test_a_long_mask_is_sampled():
    assert max(lengths([8192], 1 << 24)) == LONGEST
    for n in (16387, LONGEST):
        assert len(sampled_rows(n, [4096, 8192])) * n <= CELLS + 2 * n
