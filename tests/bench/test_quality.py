"""The table of quality; and what quantization may cost on the real model that is here."""

import pytest

from llmc.bench import quality


@pytest.fixture(scope="module")
def rows():
    """Short windows and few of them: a look at every column."""
    found, tokens = quality.table(quality.TINY, quality.TINY / "heldout.txt", ["int8", "int4:head=int4"], [], 4, 64)
    assert tokens == 4 * 63
    return {row.scheme: row for row in found}


def test_rows_say_bits_and_damage(rows):
    plain, int8, int4 = rows.values()
    assert plain.divergence == 0 and plain.agreement == 1
    # A float32 scale a row of 256 or 704; a float16 scale for 32 weights.
    assert 8 + 32 / 704 < int8.bits < 8 + 32 / 256 and int4.bits == 4.5
    assert 0 < int8.divergence < int4.divergence / 20 and int8.agreement > int4.agreement


def test_the_table_is_written_as_markdown(rows):
    page = quality.markdown(list(rows.values()), quality.TINY, quality.TINY / "heldout.txt", 252, "2026-11-22")
    line = next(line for line in page.splitlines() if line.startswith("| int4:head=int4 "))
    assert "| 4.500 |" in line and f"{rows['int4:head=int4'].perplexity:.3f}" in line


def test_a_model_with_outliers_computes_the_same():
    (plain,), _ = quality.table(quality.TINY, quality.TINY / "heldout.txt", [], [], 2, 64)
    (planted,), _ = quality.table(quality.TINY, quality.TINY / "heldout.txt", [], [], 2, 64, outliers=True)
    assert planted.perplexity == pytest.approx(plain.perplexity, rel=1e-6)


@pytest.mark.slow
def test_outliers_are_met_by_scaling():
    """int4 of a model with outliers, calibrated, costs little more than that of the model without; rounded, a lot."""
    rows, _ = quality.table(quality.TINY, quality.TINY / "heldout.txt", ["int4"], ["int4"], 6, 128, outliers=True)
    _, rounded, gptq, calibrated = rows
    assert calibrated.scaled == 24 and gptq.scaled == rounded.scaled == 0  # all but the four o_proj
    assert calibrated.divergence < 0.9 * gptq.divergence and gptq.divergence < rounded.divergence
    assert calibrated.bits < rounded.bits + 0.1


@pytest.mark.slow
def test_what_schemes_may_cost():
    """Perplexity on held-out text: int8 within 0.5%, int4 within 5%, and no worse where the bits are well spent."""
    schemes = ["int8", "int4", "int4:head=int4", "auto:4.5"]
    rows, _ = quality.table(quality.TINY, quality.TINY / "heldout.txt", schemes, ["int4"], 12)
    plain, *others = rows
    ratio = {row.scheme: row.perplexity / plain.perplexity for row in others}
    bits = {row.scheme: row.bits for row in others}
    assert abs(ratio["int8"] - 1) < 0.005
    assert ratio["int4"] < 1.05 and ratio["int4:head=int4"] < 1.05
    assert bits["auto:4.5"] <= 4.5 == bits["int4:head=int4"]
    assert ratio["auto:4.5"] <= ratio["int4:head=int4"]
    assert ratio["int4 calibrated"] < ratio["int4"]
