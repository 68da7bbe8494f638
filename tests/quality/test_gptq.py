"""Second-order rounding, against the plain one and on inputs that it was not fitted to."""

from collections import Counter

import numpy as np
import pytest

from llmc.ir.decode import decode
from llmc.passes import schemes
from llmc.quality.gptq import DAMPINGS, WAYS, Hessian, error_of, gptq, nearest, second_order


def correlated(count, depth, seed):
    """Inputs of which a few directions carry most, as activations are."""
    mix = np.random.default_rng(0).standard_normal((depth, depth)) * np.exp(-np.arange(depth) / 8)[:, None]
    return (np.random.default_rng(seed).standard_normal((count, depth)) @ mix).astype("float32")


def hessian(x):
    found = Hessian(x.shape[1])
    for part in np.array_split(x, 3):
        found.add(part)
    return found


NAMES = ["int8", "int4", "int4-g64", "int4-g128-zp"]


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_products_is_smaller(name):
    scheme, rows = schemes.parse(name), np.random.default_rng(1).standard_normal((24, 128)).astype("float32")
    fit, check = hessian(correlated(600, 128, 2)), hessian(correlated(300, 128, 3))
    format = scheme.format(128)
    plain = decode(format, *scheme.encode(rows).values())
    counts = Counter()
    found = decode(format, *gptq(rows, fit, check, scheme, counts).values())
    assert set(counts) <= set(WAYS) and sum(counts.values()) == 24 and counts["second order"] > 12
    own, rounded = error_of(rows, found, check), error_of(rows, plain, check)
    assert (own <= rounded).all(), "no row is worse"
    assert own.sum() < 0.7 * rounded.sum()
    x = correlated(300, 128, 3).astype("float64")
    np.testing.assert_allclose(own, (((found - rows) @ x.T) ** 2).sum(axis=1), rtol=1e-3)


def test_columns_are_rounded_as_gptq_says():
    """Against the algorithm as it is usually written, column by column, for one scale a row."""
    scheme, rows = schemes.parse("int8"), np.random.default_rng(4).standard_normal((5, 24)).astype("float32")
    fit = hessian(correlated(200, 24, 5))
    factor = fit.inverse_factor(DAMPINGS[0])
    parts = second_order(rows, fit, factor, scheme, scheme.format(24))
    scale = parts["scales"][:, 0].astype("float64")
    damped = fit.matrix + DAMPINGS[0] * np.diag(fit.matrix).mean() * np.eye(24)
    w = rows.astype("float64")
    for j in range(24):
        inverse = np.linalg.inv(damped[j:, j:])
        q = np.clip(np.rint(w[:, j] / scale), -128, 127) * scale
        w[:, j:] -= ((w[:, j] - q) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = q
    np.testing.assert_allclose(decode(scheme.format(24), *parts.values()), w, atol=2e-2 * np.abs(scale).max())


def test_inputs_that_say_nothing_leave_the_plain_rounding():
    scheme, rows = schemes.parse("int4"), np.random.default_rng(6).standard_normal((3, 64)).astype("float32")
    parts = gptq(rows, Hessian(64), Hessian(64), scheme)
    for name, part in scheme.encode(rows).items():
        np.testing.assert_array_equal(parts[name], part)


@pytest.mark.parametrize("table", ["nf4", "e2m1", "e4m3"])
def test_the_nearest_value_of_a_table(table):
    from llmc.ir.quantized import TABLES, Format

    format = Format(8 if table == "e4m3" else 4, 0, "float32", table=table)
    w = np.random.default_rng(7).standard_normal(50) * 3
    codes = nearest(w, format, np.full((50, 1), 0.5, "float32"))
    values = np.asarray(TABLES[table]) * 0.5
    best = np.nanmin(np.abs(w[:, None] - values), axis=1)
    np.testing.assert_allclose(np.abs(w - values[codes]), best, atol=1e-12)
