"""Sampling against independent numpy: parameters, filters, penalties, draws that depend on seed and position alone."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import RequestError
from llmc.runtime.sampler import Sampler, Sampling, best, distribution, draw, highest, log_sum_exp, logprob, uniform

VOCAB = 50


def logits(seed=0, n=VOCAB):
    return (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def sampler(prompt=(1, 2, 3), hidden=(), **sampling):
    return Sampler(Sampling(**sampling), np.array(prompt, np.int32), hidden)


class TestParameters:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"max_tokens": 0}, "max_tokens: expected a whole number of at least 1, found 0"),
            ({"max_tokens": 1.5}, "max_tokens: expected a whole number of at least 1, found 1.5"),
            ({"max_tokens": True}, "max_tokens: expected a whole number of at least 1, found True"),
            ({"min_tokens": -1}, "min_tokens: expected a whole number of at least 0, found -1"),
            ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: expected at most max_tokens (8), found 9"),
            ({"temperature": -0.1}, "temperature: expected a number of at least 0, found -0.1"),
            ({"temperature": float("nan")}, "temperature: expected a number of at least 0, found nan"),
            ({"temperature": "hot"}, "temperature: expected a number of at least 0, found 'hot'"),
            ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, found 0"),
            ({"top_p": 1.1}, "top_p: expected a number above 0 and at most 1, found 1.1"),
            ({"min_p": 2}, "min_p: expected a number from 0 to 1, found 2"),
            ({"top_k": -2}, "top_k: expected a whole number of at least -1, found -2"),
            ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0, found 0"),
            ({"presence_penalty": float("inf")}, "presence_penalty: expected a number, found inf"),
            ({"frequency_penalty": None}, "frequency_penalty: expected a number, found None"),
            ({"seed": -1}, "seed: expected a whole number of at least 0 and at most 18446744073709551615, found -1"),
            ({"logprobs": -1}, "logprobs: expected a whole number of at least 0, found -1"),
            ({"stop": 3}, "stop: expected a list of strings, found 3"),
            ({"stop": [""]}, "stop: expected a string or a list of strings, none empty, found ['']"),
            ({"stop_token_ids": "12"}, "stop_token_ids: expected a list of token ids, found '12'"),
            ({"stop_token_ids": [1.0]}, "stop_token_ids: expected a whole number of at least 0, found 1.0"),
        ],
    )
    def test_a_value_that_cant_be(self, given, message):
        with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
            Sampling.of(**given)

    def test_a_name_that_is_none(self):
        with pytest.raises(TypeError, match=r"unknown sampling parameter 'temprature'; there are: max_tokens, .*seed"):
            Sampling.of(temprature=1)

    def test_what_users_of_other_libraries_write(self):
        one = Sampling.of(stop="a", top_k=-1, temperature=1, stop_token_ids=None, seed=np.int64(3))
        assert one.stop == ("a",) and one.top_k == 0 and one.stop_token_ids == () and one.seed == 3
        assert Sampling.of(stop=["a", "b"]).stop == ("a", "b")

    def test_which_requests_need_no_sampler(self):
        assert Sampling().plain and Sampling(top_p=0.5, seed=3).plain
        for more in ({"temperature": 1}, {"logprobs": 0}, {"presence_penalty": 1}, {"min_tokens": 1}):
            assert not Sampling(**more).plain


def test_greedy_takes_the_lowest_id_of_equals():
    row = np.zeros(VOCAB, np.float32)
    row[[7, 9, 30]] = 5
    assert best(row) == 7
    assert sampler(logprobs=0).choose(row, 3)[0] == 7


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_logits_that_are_no_numbers(value):
    with pytest.raises(FloatingPointError, match=r"the model's logits are no numbers: .* --dtype bfloat16 or fl"):
        best(np.full(VOCAB, value, np.float32))
    one = logits()
    one[4] = np.nan
    with pytest.raises(FloatingPointError, match="token 4 has nan"):
        best(one)


def oracle(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Which ids are left and with what probability: one token at a time, best first, in float64."""
    x = np.asarray(row, np.float64) / temperature
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    left = [i for i in order if not top_k or x[i] >= x[order[min(top_k, len(x)) - 1]]]
    p = dict(zip(left, softmax(x[left]), strict=True))
    if top_p < 1:
        kept, mass = [], 0.0
        for i in left:
            if mass >= top_p:
                break
            kept.append(i)
            mass += p[i]
        left = kept
    left = [i for i in left if p[i] >= min_p * p[order[0]]]
    return dict(zip(left, softmax(x[left]), strict=True))


@given(
    seed=st.integers(0, 1000),
    n=st.sampled_from([5, 50, 700, 6000]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 20, 10000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
)
@settings(max_examples=80, deadline=None)
def test_filters_leave_what_they_should(seed, n, temperature, top_k, top_p, min_p):
    row = logits(seed, n)
    ids, weights = distribution(row, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    expected = oracle(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert ids.tolist() == sorted(expected)
    found = weights / weights.sum(dtype=np.float64)
    np.testing.assert_allclose(found, [expected[i] for i in ids.tolist()], rtol=2e-5)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=900), st.integers(1, 900))
@settings(max_examples=60, deadline=None)
def test_the_k_highest_with_ties(values, k):
    values, k = np.array(values, np.float32), min(k, len(values))
    kth = np.sort(values)[-k]
    assert highest(values, k).tolist() == np.flatnonzero(values >= kth).tolist()


@pytest.mark.parametrize("n", [7, 64, 5000])
def test_a_draw_follows_the_weights(n):
    weights = np.random.default_rng(1).random(n).astype(np.float32)
    weights[::3] = 0
    ids = np.arange(n) * 2
    shares = (np.arange(200_000 if n < 100 else 50_000) + 0.5) / (200_000 if n < 100 else 50_000)
    found = np.bincount([draw((ids, weights), u) for u in shares], minlength=2 * n)[::2] / len(shares)
    np.testing.assert_allclose(found, weights / weights.sum(), atol=3e-5 if n > 100 else 1e-5)
    assert found[::3].sum() == 0
    assert weights[draw((ids, weights), 0.0) // 2] > 0 and weights[draw((ids, weights), 1 - 2**-53) // 2] > 0


def test_random_numbers_are_those_of_philox():
    for seed, position in [(0, 1), (1, 5), (2**64 - 1, 12345), (77, 2**31)]:
        # numpy raises the counter before it draws
        philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=position - 1)
        assert uniform(seed, position) == (int(philox.random_raw()) >> 11) * 2.0**-53
    many = [uniform(3, p) for p in range(20_000)]
    assert abs(np.mean(many) - 0.5) < 0.01 and abs(np.var(many) - 1 / 12) < 0.005
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.03


def test_a_draw_depends_on_seed_and_position_alone():
    row = logits()
    one, other = sampler(temperature=1, seed=5), sampler(temperature=1, seed=5)
    for position in range(7):
        other.choose(logits(9), position + 100)  # another past
    drawn = [one.choose(row, p)[0] for p in range(40)]
    assert [other.choose(row, p)[0] for p in range(40)] == drawn
    assert [sampler(temperature=1, seed=6).choose(row, p)[0] for p in range(40)] != drawn
    assert len(set(drawn)) > 3


def test_without_a_seed_every_request_has_its_own():
    assert sampler(temperature=1).seed != sampler(temperature=1).seed


def test_penalties_against_their_formulas():
    parameters = {"repetition_penalty": 1.7, "presence_penalty": 0.6, "frequency_penalty": 0.25}
    prompt, row = [3, 3, 8, 40], logits(4)
    one = sampler(prompt, temperature=0, **parameters)
    answer = []
    for position in range(25):
        x = row.astype(np.float64)
        for token in set(prompt) | set(answer):
            x[token] = x[token] / 1.7 if x[token] > 0 else x[token] * 1.7
        for token in set(answer):
            x[token] -= 0.6 + 0.25 * answer.count(token)
        token, _ = one.choose(row, position)
        assert token == int(x.argmax())
        answer.append(token)
    assert len(set(answer)) > 5
    np.testing.assert_array_equal(row, logits(4))


def test_no_stop_token_before_min_tokens():
    row = np.zeros(VOCAB, np.float32)
    row[[4, 6]] = 9, 8
    one = sampler(hidden=(4, 6), min_tokens=2)
    assert [one.choose(row, p)[0] for p in range(4)] == [0, 0, 4, 4]
    drawing = sampler(hidden=(4, 6), min_tokens=30, temperature=1, seed=1)
    assert not {4, 6} & {drawing.choose(row, p)[0] for p in range(30)}


def test_logprobs_are_the_models_own():
    row = logits(2)
    expected = np.log(softmax(row))
    token, found = sampler(temperature=0.2, seed=1, logprobs=3, repetition_penalty=2.0).choose(row, 5)
    assert found.token_id == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-6)
    order = np.argsort(-row, kind="stable")[:3]
    assert list(found.top) == order.tolist()
    assert list(found.top.values()) == pytest.approx(expected[order].tolist(), abs=1e-6)
    assert sampler(logprobs=0).choose(row, 5)[1].top == {}
    ties = np.zeros(VOCAB, np.float32)
    assert list(logprob(ties, 3, 2).top) == [0, 1]
    assert len(logprob(ties, 3, 1000).top) == VOCAB


def test_log_sum_exp_of_large_and_masked_logits():
    rows = np.array([[1000.0, 999.0, -np.inf], [-1000.0, -1000.0, -1000.0]], np.float32)
    np.testing.assert_allclose(log_sum_exp(rows), [1000 + np.log1p(np.exp(-1)), -1000 + np.log(3)])
