"""Schemes: what they encode against searches written down in float64, weight by weight."""

import numpy as np
import pytest

from llmc.ir.errors import CompileError
from llmc.ir.quantized import TABLES, Format
from llmc.passes import schemes
from llmc.passes.schemes import Stored
from llmc.passes.schemes.scheme import group_for

ALL = [*schemes.names(), "int8-g32", "int4-g16-zp", "int3-g128-a8", "fp8-g128", "nf4-g16"]


def rows(seed=0, shape=(6, 128)):
    """Weights as models have them: normal, a few far out, a row of zeros, a row of one sign."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype("float32") * 0.02
    w[rng.random(shape) < 0.01] *= 8
    w[1] = 0
    w[2] = np.abs(w[2]) + np.float32(1e-3)
    return w


def numbers_of(format: Format, zero: int) -> np.ndarray:
    """What each code stands for before its scale; NaN for those that stand for none."""
    if format.table:
        return np.array(TABLES[format.table])
    return np.arange(2**format.bits) - (zero if format.zeros else format.offset)


def groups_of(format: Format, w, parts):
    """(weights, codes, scale, zero) of every group, in float64."""
    size = format.group or w.shape[1]
    for r in range(len(w)):
        for g in range(w.shape[1] // size):
            at = slice(g * size, (g + 1) * size)
            scale = parts["scales"][r, g]
            scale = 2.0 ** (int(scale) - 127) if format.scale == "e8m0" else float(scale)
            yield w[r, at].astype(float), parts["codes"][r, at], scale, int(parts["zeros"][r, g]) if format.zeros else 0


def best_error(w, format, shares):
    """The least squared error of a group over fine grids of scales (and all zero points): a search of its own."""
    found = np.inf
    for zero in range(2**format.bits) if format.zeros else [0]:
        numbers = numbers_of(format, zero)
        numbers = numbers[~np.isnan(numbers)]
        reach = (w.max() - w.min()) / np.ptp(numbers) if format.zeros else np.abs(w).max() / np.abs(numbers).max()
        tried = [2.0**e for e in range(-20, 2)] if format.scale == "e8m0" else [s * reach for s in shares]
        for scale in tried:
            error = np.abs(w[:, None] - scale * numbers).min(1) if scale else np.abs(w)
            found = min(found, float((error**2).sum()))
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_weight_has_the_nearest_code(name):
    w, scheme = rows(), schemes.parse(name)
    format, parts = scheme.format(128), scheme.encode(w)
    wanted = format.parts(w.shape)
    assert {k: (p.shape, str(p.dtype)) for k, p in parts.items()} == {k: (tuple(s), d) for k, (s, d) in wanted.items()}
    for values, codes, scale, zero in groups_of(format, w, parts):
        assert scale != 0 and np.isfinite(scale)
        numbers = numbers_of(format, zero)
        assert not np.isnan(numbers[codes]).any()
        nearest = np.nanmin(np.abs(values[:, None] - scale * numbers), axis=1)
        # the nearest in float32: two codes may be as near as its last place
        np.testing.assert_allclose(np.abs(values - scale * numbers[codes]), nearest, atol=1e-6 * abs(scale) * 16)


@pytest.mark.parametrize("name", [n for n in ALL if n != "w8a8"])
def test_the_search_comes_near_the_best_there_is(name):
    w, scheme = rows(1, (3, 128)), schemes.parse(name)
    format, parts = scheme.format(128), scheme.encode(w)
    found = best = plain = 0.0
    grid = np.linspace(0.5, 1.2, 36 if format.zeros else 141)
    for values, codes, scale, zero in groups_of(format, w, parts):
        found += float(((values - scale * numbers_of(format, zero)[codes]) ** 2).sum())
        best += best_error(values, format, [*grid, *(-grid)])
        plain += best_error(values, format, [1.0])
    # 8 bits are searched coarsely: what a lucky scale would gain there is nothing beside fewer bits' errors.
    assert found <= (2.0 if format.bits == 8 else 1.06) * best + 1e-12, (found / best, plain / best)
    if format.bits < 8 and not format.zeros and format.scale != "e8m0":
        assert found < 0.99 * plain  # that the largest weight is just reached is seen


@pytest.mark.parametrize("name", ["int4", "int4-g32-zp", "nf4-g32", "mxfp4", "int3"])
def test_what_is_important_is_kept_better(name):
    w, scheme = rows(2, (64, 64)), schemes.parse(name)
    importance = np.random.default_rng(3).uniform(0.01, 1, 64) ** 4

    def error(parts):
        total = 0.0
        for i, (values, codes, scale, zero) in enumerate(groups_of(scheme.format(64), w, parts)):
            size = len(values)
            at = i * size % 64
            off = values - scale * numbers_of(scheme.format(64), zero)[codes]
            total += float((off**2 * importance[at : at + size]).sum())
        return total

    assert error(scheme.encode(w, importance)) < 0.98 * error(scheme.encode(w))
    by_row = np.broadcast_to(importance, w.shape)
    np.testing.assert_array_equal(scheme.encode(w, by_row)["codes"], scheme.encode(w, importance)["codes"])


def test_rows_that_no_group_fills():
    assert [group_for(d, 128) for d in (256, 192, 96, 48, 40)] == [128, 64, 32, 16, 0]
    assert group_for(128, 32) == 32
    assert schemes.parse("int4").format(40).group == 0
    assert schemes.parse("int4-g64-a8").rounding(96) == 32
    assert schemes.parse("w8a8").rounding(96) == 0
    assert schemes.parse("fp8-a8").rounding(96) == 0 and schemes.parse("fp8-g128-a8").rounding(256) == 128
    assert schemes.parse("int4").rounding(96) is None
    with pytest.raises(ValueError, match="e2m1 has groups of 32, which do not fill rows of 48"):
        schemes.parse("mxfp4").format(48)


@pytest.mark.parametrize("name", schemes.names())
def test_listed_names_are_schemes(name):
    scheme = schemes.parse(name)
    assert scheme.name == name
    assert {"8": 8, "4": 4, "3": 3}[next(c for c in name if c in "348")] == scheme.format(128).bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int44", "no quantization scheme is called 'int44': did you mean int4? There are: int8, int4"),
        ("gguf", "no quantization scheme is called 'gguf': There are"),
        ("int4-g48", "expected groups of 16, 32, 64, 128; found 48"),
        ("int4-g32-g64", "expected after int4: -a8, -g128 … -g16, -zp, each once; found -g64"),
        ("mxfp4-g16", "expected after mxfp4: nothing, each once; found -g16"),
    ],
)
def test_names_that_are_refused(text, message):
    with pytest.raises(CompileError) as error:
        schemes.parse(text)
    assert message in str(error.value)


def test_stored_weights_are_encoded_already():
    scheme = Stored("int4-g32", stored=Format(4, 32, offset=8))
    assert scheme.format(64) == Format(4, 32, offset=8)
    with pytest.raises(ValueError, match="whole groups of 32"):
        scheme.format(40)
    with pytest.raises(TypeError, match="encoded already"):
        scheme.encode(rows())
