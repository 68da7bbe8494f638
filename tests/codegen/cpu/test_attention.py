import numpy as np
import pytest

from tests import quantized_cache
from tests.codegen.cpu import native

PAGE = 16
# (kv length, new tokens): decode, prefill, a chunk, page and block boundaries, nothing new.
BATCH = [(1, 1), (16, 16), (17, 1), (5, 0), (64, 7), (65, 65), (130, 50), (200, 1), (31, 13)]
# heads, kv_heads, head_dim, v_dim, options
CASES = {
    "grouped": (8, 2, 64, 64, {}),
    "alone": (3, 3, 32, 32, {}),
    "one key head": (8, 1, 16, 16, {"softcap": 5.0}),
    "window": (4, 2, 24, 40, {"window": 20}),
    "chunk": (4, 4, 8, 8, {"chunk": 48}),
    "window in chunk": (2, 1, 48, 16, {"window": 9, "chunk": 32, "sinks": True}),
    "sinks": (6, 2, 80, 80, {"sinks": True, "window": 64}),
    "odd widths": (2, 1, 7, 5, {}),
    "one": (1, 1, 1, 1, {}),
    "many heads": (40, 2, 12, 20, {}),
    "latent": (16, 1, 72, 64, {"v_width": 64}),
    "latent, odd": (3, 1, 21, 19, {"v_width": 19, "softcap": 30.0}),
}


def tables(batch, seed=0):
    """Page tables with pages in random order; page 0 is no one's."""
    pages = [-(-length // PAGE) for length, _ in batch]
    numbers = np.random.default_rng(seed).permutation(sum(pages)).astype(np.int32) + 1
    return {
        "qo_indptr": np.cumsum([0, *(new for _, new in batch)]).astype(np.int32),
        "kv_indptr": np.cumsum([0, *pages]).astype(np.int32),
        "kv_indices": numbers,
        "kv_last_page_len": np.array([(length - 1) % PAGE + 1 for length, _ in batch], np.int32),
    }


def paged(values, table, token_last, dtype):
    """values: for each sequence [length, heads, width] -> pages; empty slots hold what others left, NaN in page 0."""
    heads, width = values[0].shape[1:]
    pages = np.full((len(table["kv_indices"]) + 1, heads, PAGE, width), 1e3, np.float32)
    pages[0] = np.nan
    for s, value in enumerate(values):
        for position, row in enumerate(value):
            number = table["kv_indices"][table["kv_indptr"][s] + position // PAGE]
            pages[number, :, position % PAGE] = row
    return np.ascontiguousarray(pages.swapaxes(2, 3) if token_last else pages).astype(native.DTYPES[dtype])


def pools(values, table, token_last, dtype, cache):
    """The tensors of pages that hold values: of a quantized cache codes and scales."""
    if not cache:
        return [paged(values, table, token_last, dtype)]
    codes, scales = zip(*(quantized_cache.quantize(value, cache) for value in values), strict=True)
    number = codes[0].dtype
    pages = np.full((len(table["kv_indices"]) + 1, values[0].shape[1], PAGE, values[0].shape[2]), 85, number)
    beside = np.full(pages.shape[:3], np.nan, np.float32)
    for s, (code, scale) in enumerate(zip(codes, scales, strict=True)):
        for position in range(len(code)):
            to = table["kv_indices"][table["kv_indptr"][s] + position // PAGE]
            pages[to, :, position % PAGE], beside[to, :, position % PAGE] = code[position], scale[position]
    return [np.ascontiguousarray(pages.swapaxes(2, 3) if token_last else pages), beside]


def expected(q, k, v, sinks, scale, softcap=0.0, window=0, chunk=0):
    """Float64 attention of one sequence: q [new, h, d] at the end of k [length, g, d], v [length, g, e]."""
    new, heads, _ = q.shape
    length, kv_heads, _ = k.shape
    k, v = (np.repeat(a.astype(np.float64), heads // kv_heads, 1) for a in (k, v))
    scores = np.einsum("nhd,thd->hnt", q.astype(np.float64), k) * scale
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    p, j = np.arange(length - new, length)[:, None], np.arange(length)
    seen = j <= p
    if window:
        seen &= p - j < window
    if chunk:
        seen &= j // chunk == p // chunk
    scores = np.where(seen, scores, -np.inf)
    peak = scores.max(-1, keepdims=True)
    e = np.exp(scores - peak)
    total = e.sum(-1, keepdims=True) + (np.exp(sinks[:, None, None] - peak) if sinks is not None else 0)
    return np.einsum("hnt,the->nhe", e / total, v)


class Case:
    """Random sequences and the kernel of one case."""

    def __init__(self, target, heads, kv_heads, head_dim, v_dim, options, dtype="float32"):
        from llmc.codegen.cpu.attention import paged_attention

        self.options, self.dtype, self.scale = options, dtype, 1.5 * head_dim**-0.5
        self.cache = options.get("cache", "")
        self.masks = {k: v for k, v in options.items() if k in ("softcap", "window", "chunk")}
        self.kernel = native.build(
            paged_attention(target, heads, kv_heads, head_dim, v_dim, dtype, PAGE, True, self.scale, **options), target
        )
        self.sequences = []
        for s, (length, new) in enumerate(BATCH):
            q = native.normal([s, 0], (new, heads, head_dim), dtype, 2)
            k = native.normal([s, 1], (length, kv_heads, head_dim), dtype)
            v = k[..., :v_dim] if options.get("v_width") else native.normal([s, 2], (length, kv_heads, v_dim), dtype)
            self.sequences.append((q, k, v))
        self.sinks = native.normal(9, heads) if options.get("sinks") else None
        self.shape = (heads, v_dim)

    def __call__(self, sequences, seed=0):
        """Outputs of a batch of sequences (q, k, v), one array a sequence."""
        batch = [(len(k), len(q)) for q, k, _ in sequences]
        table = tables(batch, seed)
        keys = pools([k for _, k, _ in sequences], table, True, self.dtype, self.cache)
        values = pools([v for *_, v in sequences], table, False, self.dtype, self.cache)
        q = np.concatenate([q for q, *_ in sequences])
        out = np.full((len(q), *self.shape), np.nan, q.dtype)
        values = [] if self.options.get("v_width") else values
        sinks = [] if self.sinks is None else [self.sinks]
        self.kernel(q, *keys, *values, *sinks, *table.values(), out)
        return np.split(out.astype(np.float64), table["qo_indptr"][1:-1])

    def check(self):
        """(largest error over the spread, same bits alone, same bits in chunks)."""
        together = self(self.sequences)
        error, alone, chunked = 0.0, True, True
        for s, (q, k, v) in enumerate(self.sequences):
            if not len(q):
                continue
            keys = quantized_cache.rounded(k, self.cache or None)
            values = (
                keys[..., : v.shape[2]]
                if self.options.get("v_width")
                else quantized_cache.rounded(v, self.cache or None)
            )
            truth = expected(q, keys, values, self.sinks, self.scale, **self.masks)
            error = max(error, np.abs(together[s] - truth).max() / np.abs(truth).max())
            alone &= np.array_equal(self([(q, k, v)], seed=s)[0], together[s])
            parts, done = [], 0
            for cut in (1, 2, 5, 17, 100):
                stop = min(done + cut, len(q))
                length = len(k) - len(q) + stop
                parts += self([(q[done:stop], k[:length], v[:length])], seed=s) if stop > done else []
                done = stop
            chunked &= np.array_equal(np.concatenate(parts), together[s])
        return error, alone, chunked


def check(cases, dtype):
    """For every case and target: (case, target, largest error, same bits alone, same bits in chunks)."""
    return [(c, t.name, *Case(t, *CASES[c], dtype).check()) for c in cases for t in native.targets()]


def test_matches_float64_and_bits_do_not_depend_on_the_batch(isolated):
    for case, target, error, alone, chunked in isolated(check, list(CASES), "float32", timeout=500):
        assert error < 3e-6 and alone and chunked, f"{case}, {target}: {error:.1e}, {alone=}, {chunked=}"


def check_quantized(cases, dtype):
    found = []
    for case, kind in cases:
        *shape, options = CASES[case]
        for target in native.targets():
            found.append((case, kind, target.name, *Case(target, *shape, {**options, "cache": kind}, dtype).check()))
    return found


QUANTIZED = ["grouped", "window in chunk", "sinks", "odd widths", "one", "latent, odd"]


@pytest.mark.parametrize("kind", quantized_cache.KINDS)
def test_quantized_cache(isolated, kind):
    """Against float64 attention over what numpy reads from the codes, as near as over a cache of float32."""
    for case, _, target, error, alone, chunked in isolated(
        check_quantized, [(case, kind) for case in QUANTIZED], "float32", timeout=500
    ):
        assert error < 3e-6 and alone and chunked, f"{case}, {target}: {error:.1e}, {alone=}, {chunked=}"


def test_quantized_cache_of_bfloat16(isolated):
    for case, kind, target, error, alone, chunked in isolated(
        check_quantized, [("grouped", "int8"), ("latent", "fp8")], "bfloat16", timeout=300
    ):
        assert error < 4e-3 and alone and chunked, f"{case}, {kind}, {target}: {error:.1e}, {alone=}, {chunked=}"


def test_bfloat16(isolated):
    cases = ["grouped", "odd widths", "latent"]
    for case, target, error, alone, chunked in isolated(check, cases, "bfloat16", timeout=300):
        assert error < 4e-3 and alone and chunked, f"{case}, {target}: {error:.1e}, {alone=}, {chunked=}"


FAULTS = [{"window": 10}, {"chunk": 0}, {"softcap": 0.0}]


def plant():
    """The errors of a kernel against references that have one option wrong."""
    heads, kv_heads, head_dim, v_dim, options = CASES["window in chunk"]
    [target, *_] = native.targets()
    case = Case(target, heads, kv_heads, head_dim, v_dim, options | {"softcap": 10.0})
    masks, found = case.masks, [case.check()[0]]
    for fault in FAULTS:
        case.masks = masks | fault
        found.append(case.check()[0])
    return found


def test_a_dropped_option_is_seen(isolated):
    right, *wrong = isolated(plant)
    assert right < 3e-6 and min(wrong) > 1e-3


def many_threads():
    """With four threads, twenty times: the same bits."""
    import os

    os.environ["TVM_NUM_THREADS"] = "4"
    case = Case(native.targets()[0], *CASES["grouped"])
    first = case(case.sequences)
    return all(np.array_equal(a, b) for _ in range(20) for a, b in zip(first, case(case.sequences), strict=True))


def test_threads_do_not_change_bits(isolated):
    assert isolated(many_threads)


def test_keys_with_tokens_first_are_refused():
    from llmc import targets
    from llmc.codegen.cpu.attention import paged_attention

    with pytest.raises(ValueError, match=r"expected keys with tokens last.*found keys_token_last=False"):
        paged_attention(targets.detect(), 2, 1, 8, 8, "float32", 16, False, 1.0)


def assembly_of_aarch64():
    import tvm

    from llmc import targets
    from llmc.codegen.cpu.attention import paged_attention

    [target] = targets.parse("cpu:aarch64")
    found = []
    for v_width in (0, 16):
        function = paged_attention(target, 4, 1, 24, 16, "bfloat16", 16, True, 1.0, v_width=v_width)
        module = tvm.compile(tvm.IRModule({"attend": function}), tvm.target.Target(target.llvm()))
        found.append(module.mod.inspect_source("asm"))
    return found


def test_aarch64_compiles(isolated):
    assert all("fmla" in text for text in isolated(assembly_of_aarch64))
