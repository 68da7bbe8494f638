"""Random weights: the same for the same seed and name, with the mean and spread that were asked for."""

import numpy as np
import pytest

from llmc.runtime.errors import ArtifactError
from llmc.runtime.random_weights import DRAWN, RandomWeights

DESCRIBED = {
    "matrix": {"shape": [300, 200], "dtype": "float32", "mean": 0.0, "spread": 0.02},
    "other": {"shape": [300, 200], "dtype": "float32", "mean": 0.0, "spread": 0.02},
    "half": {"shape": [256, 256], "dtype": "bfloat16", "mean": 1.0, "spread": 0.5},
    "norm": {"shape": [64], "dtype": "float16", "mean": 1.0, "spread": 0.0},
    "large": {"shape": [2, DRAWN], "dtype": "float16", "mean": 0.0, "spread": 1.0},
    "flags": {"shape": [3], "dtype": "int64", "mean": 0.0, "spread": 0.0},
}


def test_numbers_have_their_law():
    weights = RandomWeights(DESCRIBED, seed=0)
    assert list(weights) == list(DESCRIBED)
    matrix = weights["matrix"]
    assert matrix.shape == (300, 200) and matrix.dtype == np.float32
    # Of 60,000 numbers the mean is off by 0.4% of the spread, the spread by 0.3%: five times that.
    assert abs(matrix.mean()) < 0.02 * 0.02 and abs(matrix.std() / 0.02 - 1) < 0.015
    assert np.array_equal(weights["norm"], np.ones(64, np.float16))
    assert np.array_equal(weights["flags"], np.zeros(3, np.int64))
    half = (weights["half"].astype(np.uint32) << 16).view(np.float32)
    assert abs(half.mean() - 1) < 0.02 and abs(half.std() - 0.5) < 0.02


def test_bfloat16_is_rounded_to_nearest():
    import ml_dtypes

    bits = RandomWeights({"w": DESCRIBED["half"]}, seed=3)["w"]
    exact = RandomWeights({"w": DESCRIBED["half"] | {"dtype": "float32"}}, seed=3)["w"]
    assert np.array_equal(bits.view(ml_dtypes.bfloat16), exact.astype(ml_dtypes.bfloat16))


def test_seed_and_name_decide():
    weights, again, other = (RandomWeights(DESCRIBED, seed) for seed in (0, 0, 1))
    assert np.array_equal(weights["matrix"], again["matrix"])
    assert not np.array_equal(weights["matrix"], weights["other"])
    assert not np.array_equal(weights["matrix"], other["matrix"])


def test_rows_longer_than_what_is_drawn_go_round():
    first, second = RandomWeights(DESCRIBED, seed=0)["large"]
    assert np.array_equal(first, second)  # the one length at which rows are alike


@pytest.mark.parametrize("damage", [{"shape": None}, {"shape": [-1]}, {"dtype": "float12"}, {"mean": "a"}])
def test_a_damaged_description_is_refused(damage):
    with pytest.raises(ArtifactError, match="random tensor w: expected shape, dtype, mean and spread"):
        RandomWeights({"w": DESCRIBED["matrix"] | damage}, seed=0)


CODES = {"shape": [500, 100], "dtype": "uint8", "bytes": "f" * 31 + "e" + "0" * 32}  # 0 to 126: no NaN of 8-bit floats


def test_codes_are_uniform_over_the_bytes_that_may_occur():
    weights = RandomWeights({"codes": CODES, "other": CODES}, seed=0)
    codes = weights["codes"]
    assert codes.shape == (500, 100) and codes.dtype == np.uint8
    counts = np.bincount(codes.ravel(), minlength=256)
    assert not counts[127:].any()
    assert abs(counts[:127] / (50000 / 127) - 1).max() < 0.3  # of 394 each: five times the root
    assert not np.array_equal(codes, weights["other"])


@pytest.mark.parametrize("damage", [{"bytes": "00" * 32}, {"bytes": "ff"}, {"bytes": "x" * 64}, {"dtype": "float32"}])
def test_damaged_codes_are_refused(damage):
    with pytest.raises(ArtifactError, match="random tensor w: expected"):
        RandomWeights({"w": CODES | damage}, seed=0)
