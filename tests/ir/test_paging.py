"""The reference of the paged cache against a dense attention in numpy."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import tvm

from llmc.ir import paging
from llmc.ir.driver import Pages, unwritten
from tests import quantized_cache

F32 = "float32"


def dense(q, k, v, *, scale, softcap=0.0, window=0, chunk=0, sinks=None):
    """Causal attention of one sequence in float64. q [n, h, d] of the last n tokens, k [m, g, d], v [m, g, e]."""
    n, m, rep = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = np.repeat(k, rep, axis=1), np.repeat(v, rep, axis=1)
    s = np.einsum("nhd,mhd->hnm", q, k, dtype="float64") * scale
    if softcap:
        s = np.tanh(s / softcap) * softcap
    i, j = np.arange(m - n, m)[:, None], np.arange(m)[None]
    seen = j <= i
    if window:
        seen &= i - j < window
    if chunk:
        seen &= i // chunk == j // chunk
    s = np.where(seen, s, -np.inf)
    if sinks is not None:
        s = np.concatenate([s, np.broadcast_to(sinks[:, None, None], (*s.shape[:2], 1))], axis=-1)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[..., :m]
    return np.einsum("hnm,mhe->nhe", p, v)


def build(func):
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm", "opt-level": 1}))["main"]


class Cache:
    """One layer's pools and the two ops over them."""

    def __init__(self, h, g, d, e, *, page=4, token_last=True, dtype=F32, v_width=0, pages=64, seed=0, cache="", **how):
        self.tables = Pages(page, pages, how.get("window", 0), how.get("chunk", 0), seed)
        widths = [(d, token_last)] if v_width else [(d, token_last), (e, False)]
        self.append = [build(paging.append_pages(g, w, dtype, page, last, cache)) for w, last in widths]
        self.attend = build(
            paging.paged_attention(h, g, d, e, dtype, page, token_last, v_width=v_width, cache=cache, **how)
        )
        self.pools = [
            [
                tvm.runtime.tensor(unwritten((pages, *t["shape"]), t["dtype"]))
                for t in paging.page_tensors("k", g, w, page, last, dtype, cache)
            ]
            for w, last in widths
        ]
        self.out = (h, e)

    def step(self, batch, sinks=None):
        """batch: {sequence: (q, k, v)} -> {sequence: output}."""
        table = [tvm.runtime.tensor(t) for t in self.tables.extend({s: len(x[0]) for s, x in batch.items()})]
        qo = np.cumsum([0, *(len(x[0]) for x in batch.values())]).astype("int32")
        q, *kv = (np.concatenate(x) for x in zip(*batch.values(), strict=True))
        qo_, kv = tvm.runtime.tensor(qo), kv[: len(self.pools)]
        for append, pools, x in zip(self.append, self.pools, kv, strict=True):
            append(*pools, tvm.runtime.tensor(x), qo_, *table)
        out = tvm.runtime.tensor(np.full((len(q), *self.out), np.nan, q.dtype))
        extra = [] if sinks is None else [tvm.runtime.tensor(sinks)]
        pools = [pool for pools in self.pools for pool in pools]
        self.attend(tvm.runtime.tensor(q), *pools, *extra, qo_, *table, out)
        return dict(zip(batch, np.split(out.numpy(), qo[1:-1]), strict=True))


def sequence(rng, n, h, g, d, e, dtype=F32):
    return tuple(rng.standard_normal(s).astype(dtype) for s in ((n, h, d), (n, g, d), (n, g, e)))


def part(x, lo, hi):
    return tuple(a[lo:hi] for a in x)


KINDS = {
    "causal": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 5},
    "window of a page": {"window": 4},
    "chunk": {"chunk": 6},
    "window and chunk": {"window": 3, "chunk": 8},
}


@pytest.mark.parametrize("token_last", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_steps_equal_dense_attention(kind, token_last):
    h, g, d, e = 4, 2, 8, 6
    how = {"scale": 0.7, **KINDS[kind]}
    rng = np.random.default_rng(0)
    whole = {name: sequence(rng, n, h, g, d, e) for name, n in {"a": 1, "b": 9, "c": 23, "d": 16}.items()}
    cache = Cache(h, g, d, e, token_last=token_last, **how)
    cuts = [{"c": 8}, {"a": 1, "b": 4, "c": 0, "d": 15}, {"b": 1, "c": 3, "d": 1}, {"d": 0, "c": 12, "b": 4}]
    done, got = dict.fromkeys(whole, 0), {name: [] for name in whole}
    for cut in cuts:
        step = cache.step({s: part(whole[s], done[s], done[s] + n) for s, n in cut.items()})
        for s, n in cut.items():
            done[s] += n
            got[s].append(step[s])
    for s, x in whole.items():
        assert done[s] == len(x[0])
        # float32 sums of at most 23 terms against float64
        np.testing.assert_allclose(np.concatenate(got[s]), dense(*x, **how), atol=5e-6)


def test_sinks_and_latent_values():
    h, g, d, r = 4, 1, 8, 5
    rng = np.random.default_rng(1)
    q, k, _ = sequence(rng, 11, h, g, d, r)
    sinks = rng.standard_normal(h).astype(F32)
    for token_last in (True, False):
        cache = Cache(h, g, d, r, token_last=token_last, v_width=r, scale=0.5, sinks=True)
        got = cache.step({"a": (q, k, k)}, sinks)["a"]
        np.testing.assert_allclose(got, dense(q, k, k[..., :r], scale=0.5, sinks=sinks), atol=5e-6)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_half_precision_rounds_once(dtype, tolerance):
    rng = np.random.default_rng(2)
    number = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = sequence(rng, 9, 2, 1, 8, 8, number)
    got = Cache(2, 1, 8, 8, dtype=dtype, scale=0.3).step({"a": x})["a"].astype("float64")
    want = dense(*(a.astype("float64") for a in x), scale=0.3)
    assert (abs(got - want) <= tolerance * abs(want) + 1e-6).all()


@pytest.mark.parametrize("token_last", [True, False])
@pytest.mark.parametrize("kind", quantized_cache.KINDS)
def test_a_quantized_cache_equals_dense_attention_over_what_numpy_rounds(kind, token_last):
    h, g, d, e = 4, 2, 8, 6
    rng = np.random.default_rng(6)
    q, k, v = sequence(rng, 23, h, g, d, e)
    k[3, 0], v[4, 1] = 0, 1e-12 * v[4, 1]
    cache = Cache(h, g, d, e, scale=0.7, token_last=token_last, cache=kind, window=9)
    got = np.concatenate([cache.step({"a": part((q, k, v), i, j)})["a"] for i, j in ((0, 14), (14, 22), (22, 23))])
    k, v = (quantized_cache.rounded(x, kind) for x in (k, v))
    np.testing.assert_allclose(got, dense(q, k, v, scale=0.7, window=9), atol=5e-6)


@pytest.mark.parametrize("kind", quantized_cache.KINDS)
def test_a_quantized_latent_and_half_precision(kind):
    rng = np.random.default_rng(7)
    q, k, _ = sequence(rng, 11, 4, 1, 8, 5)
    got = Cache(4, 1, 8, 5, v_width=5, scale=0.5, cache=kind).step({"a": (q, k, k)})["a"]
    k = quantized_cache.rounded(k, kind)
    np.testing.assert_allclose(got, dense(q, k, k[..., :5], scale=0.5), atol=5e-6)
    x = sequence(rng, 9, 2, 1, 8, 8, np.dtype(ml_dtypes.bfloat16))
    got = Cache(2, 1, 8, 8, dtype="bfloat16", scale=0.3, cache=kind).step({"a": x})["a"].astype("float64")
    want = dense(x[0].astype("float64"), *(quantized_cache.rounded(a, kind) for a in x[1:]), scale=0.3)
    assert (abs(got - want) <= 2**-7 * abs(want) + 1e-6).all()


@pytest.mark.parametrize("kind", quantized_cache.KINDS)
def test_a_nan_is_kept_in_its_scale(kind):
    q, k, v = sequence(np.random.default_rng(8), 6, 2, 2, 8, 8)
    k[2, 1, 5] = v[4, 0, 7] = np.nan
    got = Cache(2, 2, 8, 8, scale=0.3, cache=kind).step({"a": (q, k, v)})["a"]
    assert (np.isnan(got[:, 1]).all(-1) == (np.arange(6) >= 2)).all()
    assert (np.isnan(got[:, 0]).all(-1) == (np.arange(6) >= 4)).all()


def test_every_number_of_e4m3_is_coded_and_read_again():
    """All codes but the two NaN, as the vector of one head: the largest is 448, the scale 1."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    x = quantized_cache.numbers(codes).reshape(1, 1, -1)
    cache = Cache(1, 1, len(codes), len(codes), scale=1.0, cache="fp8")
    cache.step({"a": (x, x, x)})
    pages, scales = (pool.numpy() for pool in cache.pools[1])
    page = cache.tables.held["a"][0]
    assert scales[page, 0, 0] == 1
    np.testing.assert_array_equal(pages[page, 0, 0], codes)


@pytest.mark.parametrize("kind", ["", *quantized_cache.KINDS])
def test_alone_equals_batch_equals_chunks_bit_for_bit(kind):
    h, g, d, e = 2, 1, 8, 8
    rng = np.random.default_rng(3)
    a, b = sequence(rng, 13, h, g, d, e), sequence(rng, 7, h, g, d, e)
    make = lambda seed: Cache(h, g, d, e, scale=0.4, window=6, seed=seed, cache=kind)  # noqa: E731
    alone = make(0).step({"a": a})["a"]
    together = make(1).step({"b": b, "a": a})["a"]
    chunks = make(2)
    cut = [chunks.step({"b": part(b, i, i + 1), "a": part(a, 4 * i, 4 * i + 4)})["a"] for i in range(4)]
    assert (alone == together).all()
    assert (alone == np.concatenate(cut)).all()


def test_other_sequences_stay_untouched():
    h, g, d, e = 2, 2, 4, 4
    rng = np.random.default_rng(4)
    x, y, z = (sequence(rng, n, h, g, d, e) for n in (10, 9, 9))
    results = []
    for other in (y, z):
        cache = Cache(h, g, d, e, scale=1.0)
        results.append(cache.step({"o": other, "x": part(x, 0, 9)})["x"])
        results.append(cache.step({"o": part(other, 0, 1), "x": part(x, 9, 10)})["x"])
    assert (results[0] == results[2]).all()
    assert (results[1] == results[3]).all()


MUTATIONS = {"scale": {"scale": 0.71}, "softcap": {"softcap": 0.0}, "window": {"window": 0}, "chunk": {"chunk": 0}}


@pytest.mark.parametrize("lost", MUTATIONS)
def test_a_lost_parameter_shows(lost):
    h, g, d, e = 2, 1, 4, 4
    how = {"scale": 0.7, "softcap": 1.0, "window": 6, "chunk": 8}
    x = sequence(np.random.default_rng(5), 20, h, g, d, e)
    got = Cache(h, g, d, e, **{**how, **MUTATIONS[lost]}).step({"a": x})["a"]
    assert abs(got - dense(*x, **how)).max() > 1e-3


def test_functions_are_made_once_and_know_their_parameters():
    args = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "v_dim": 6,
        "dtype": F32,
        "page_size": 16,
        "keys_token_last": True,
        "scale": 0.088388,
    }
    func = paging.paged_attention(**args)
    assert paging.paged_attention(**args) is func
    assert str(func.attrs[paging.OP]) == paging.PAGED_ATTENTION
    full = dict(args, softcap=0.0, window=0, chunk=0, sinks=False, v_width=0)
    assert paging.parameters(func) == full
    assert [type(v) for v in paging.parameters(func).values()] == [type(v) for v in full.values()]
    append = paging.append_pages(2, 8, "bfloat16", 16, False)
    assert paging.parameters(append) == {
        "kv_heads": 2,
        "width": 8,
        "dtype": "bfloat16",
        "page_size": 16,
        "token_last": False,
    }


def test_functions_of_a_quantized_cache_know_their_parameters():
    made = {"kv_heads": 2, "width": 8, "dtype": "bfloat16", "page_size": 16, "token_last": False, "cache": "fp8"}
    assert paging.parameters(paging.append_pages(**made)) == made
    attend = paging.paged_attention(4, 2, 8, 6, F32, 16, True, 0.5, cache="int8")
    assert paging.parameters(attend)["cache"] == "int8"
    assert paging.append_pages(2, 8, "bfloat16", 16, False).attrs.get("cache") is None


def test_tensors_of_a_page():
    assert paging.page_tensors("k", 2, 8, 4, True, "bfloat16") == [
        {"name": "k_pages", "shape": [2, 8, 4], "dtype": "bfloat16"}
    ]
    assert paging.page_tensors("v", 2, 8, 4, False, "bfloat16", "fp8") == [
        {"name": "v_pages", "shape": [2, 4, 8], "dtype": "uint8"},
        {"name": "v_scales", "shape": [2, 4], "dtype": "float32"},
    ]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 heads over 2"):
        paging.paged_attention(3, 2, 8, 8, F32, 16, True, 1.0)


def test_pages_below_a_window_are_returned():
    pages = Pages(page_size=4, count=4, window=5)
    for total in itertools.count(1):
        indices = pages.extend({"a": 1})[1]
        assert len(indices) == -(-total // 4)
        # the token at total - 1 sees total - 5 and later
        assert (indices[: max(0, total - 5) // 4] == 0).all()
        assert (indices[max(0, total - 5) // 4 :] > 0).all()
        if total == 40:
            break
