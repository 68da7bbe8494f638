import itertools

import numpy as np
import pytest

from tests import quantized_cache
from tests.codegen.gpu import emission, pages
from tests.decoders import numpy_dtype

# (kv length, new tokens). n of 1, 7, 64 and 200; one page, page boundaries, many pages, nothing new, all decoding.
BATCHES = [
    [(1, 1)],
    [(16, 1), (17, 1), (5, 0), (300, 5)],
    [(64, 64)],
    [(200, 1), (33, 1), (130, 50), (148, 148), (31, 0)],
    [(1, 1), (700, 1), (16, 1), (9, 0), (30, 2), (5, 0)],
]
# heads, kv_heads, head_dim, v_dim, page_size, options
CASES = {
    "grouped": (8, 2, 64, 64, 16, {}),
    "alone": (3, 3, 32, 32, 16, {}),
    "one key head": (8, 1, 16, 16, 8, {"softcap": 5.0}),
    "window": (4, 2, 24, 40, 16, {"window": 20}),
    "chunk": (4, 4, 8, 8, 16, {"chunk": 48}),
    "window in chunk": (8, 2, 48, 16, 32, {"window": 9, "chunk": 32, "sinks": True}),
    "sinks": (6, 2, 80, 96, 16, {"sinks": True, "window": 64}),
    "odd widths": (2, 1, 7, 5, 16, {}),
    "wide": (4, 1, 256, 256, 16, {"softcap": 30.0}),
    "many heads": (40, 2, 16, 24, 16, {}),
    "latent": (4, 1, 576, 512, 16, {"v_width": 512}),
    "latent, many heads": (40, 1, 72, 64, 16, {"v_width": 64, "window": 100}),
    "latent, odd": (3, 1, 21, 19, 16, {"v_width": 19, "softcap": 30.0}),
}
# Rows of tiles are tokens of every head, and a latent's are as wide as all of it: fewer tokens fill as many tiles.
LATENT_BATCHES = [*BATCHES[:3], [(200, 1), (33, 1), (110, 20), (70, 70), (31, 0)], *BATCHES[4:]]
# Of the spread. float32: sums of a few hundred products, and exponentials within 2 ulp. The others round the answer
# once (2**-9 of it in bfloat16, 2**-12 in float16) and, on matrix units, the weights by as much.
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}
EVERYTHING = list(itertools.product(emission.EXECUTED, TOLERANCE, CASES))
# Every case on the first machine and half of them on each of the others; dtypes in turn.
COVER = [
    (kind, dtype, case)
    for kind, dtype, case in EVERYTHING
    for k, i in [(emission.EXECUTED.index(kind), list(CASES).index(case))]
    if list(TOLERANCE).index(dtype) == (i + k) % 3 and (not k or (i + k) % 2)
]


class Case:
    """Random sequences of one case, and its kernel's answers on the software device."""

    def __init__(self, kind, dtype, case, cache=None, **how):
        from llmc.codegen.gpu.attention import paged_attention

        self.heads, self.kv_heads, self.head_dim, self.v_dim, self.page_size, self.options = CASES[case]
        self.dtype, self.scale, self.target = dtype, 1.5 * self.head_dim**-0.5, emission.target(kind)
        self.cache, how = cache, how | ({"cache": cache} if cache else {})
        shape = (self.heads, self.kv_heads, self.head_dim, self.v_dim)
        self.kernel = paged_attention(
            self.target, *shape, dtype, self.page_size, False, self.scale, **self.options, **how
        )
        self.sinks = pages.normal(9, self.heads) if self.options.get("sinks") else None

    def sequences(self, batch, first=0):
        for s, (length, new) in enumerate(batch, first):
            k = pages.normal([s, 1], (length, self.kv_heads, self.head_dim), self.dtype)
            v = pages.normal([s, 2], (length, self.kv_heads, self.v_dim), self.dtype)
            q = pages.normal([s, 0], (new, self.heads, self.head_dim), self.dtype, 2)
            yield q, k, k[..., : self.v_dim] if self.options.get("v_width") else v

    def answers(self, batch, first=0):
        from llmc.codegen.software_device import Unwritten, check_all

        table = pages.tables(batch, self.page_size)
        queries, keys, values = zip(*self.sequences(batch, first), strict=True)
        stored = (keys,) if "v_width" in self.options else (keys, values)
        pools = [pool for x in stored for pool in pages.pools(x, table, self.page_size, self.cache)]
        q = np.concatenate(queries)
        out = Unwritten((len(q), self.heads, self.v_dim), self.dtype)
        arguments = [q, *pools, *([] if self.sinks is None else [self.sinks]), *table.values(), out]
        found = check_all(self.kernel, self.target, arguments)[-1]
        return np.split(found.astype(np.float64), table["qo_indptr"][1:-1])

    def error(self, batch, **wrong):
        """The largest error over the spread."""
        masks = {k: v for k, v in self.options.items() if k in ("softcap", "window", "chunk")} | wrong
        worst = 0.0
        for found, (q, k, v) in zip(self.answers(batch), self.sequences(batch), strict=True):
            if len(q):
                k, v = (quantized_cache.rounded(x, self.cache) for x in (k, v))
                if self.cache and "v_width" in self.options:
                    v = k[..., : self.v_dim]
                worst = max(worst, min(self.miss(found, q, *kv, masks) for kv in self.multiplied(k, v)))
        return worst

    def multiplied(self, k, v):
        """Keys and values as they may be multiplied: as a cache in 8 bits says them, or rounded to the dtype once more
        for matrix units."""
        yield k, v
        if self.cache and self.dtype != "float32":
            yield tuple(x.astype(numpy_dtype(self.dtype)).astype(np.float64) for x in (k, v))

    def miss(self, found, q, k, v, masks):
        truth = pages.attention(q, k, v, self.sinks, self.scale, **masks)
        return np.abs(found - truth).max() / np.abs(truth).max()


def batches(case):
    return LATENT_BATCHES if "v_width" in CASES[case][-1] else BATCHES


def check(kind, dtype, case):
    one = Case(kind, dtype, case)
    for batch in batches(case):
        assert one.error(batch) < TOLERANCE[dtype], f"{kind}, {dtype}, {case}, {batch}"


@pytest.mark.parametrize(("kind", "dtype", "case"), COVER)
def test_matches_float64(kind, dtype, case):
    check(kind, dtype, case)


# Of a cache in 8 bits, values times their scales (of a latent: keys) are rounded once more on their way to matrix
# units, as they are where they are stored in the dtype itself: by 2**-9 in bfloat16, 2**-12 in float16.
QUANTIZED_BATCHES = (1, 3, 4)
QUANTIZED = list(itertools.product(emission.EXECUTED, TOLERANCE, CASES, quantized_cache.KINDS))
QUANTIZED_COVER = [
    ("cuda", "float16", "grouped", "int8"),
    ("cuda", "bfloat16", "many heads", "fp8"),
    ("cuda", "float32", "sinks", "fp8"),
    ("cuda", "bfloat16", "latent, many heads", "int8"),
    ("cuda", "float16", "odd widths", "int8"),
    ("rocm", "bfloat16", "grouped", "fp8"),
    ("rocm", "float16", "window in chunk", "int8"),
    ("rocm", "float32", "latent, odd", "int8"),
    ("metal", "float16", "grouped", "int8"),
    ("metal", "bfloat16", "sinks", "fp8"),
    ("metal", "float32", "alone", "int8"),
]


def check_quantized(kind, dtype, case, cache):
    one = Case(kind, dtype, case, cache)
    for batch in (batches(case)[i] for i in QUANTIZED_BATCHES):
        assert one.error(batch) < TOLERANCE[dtype], f"{kind}, {dtype}, {case}, {cache}, {batch}"


@pytest.mark.parametrize(("kind", "dtype", "case", "cache"), QUANTIZED_COVER)
def test_a_quantized_cache(kind, dtype, case, cache):
    check_quantized(kind, dtype, case, cache)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "case", "cache"), [c for c in QUANTIZED if c not in QUANTIZED_COVER])
def test_a_quantized_cache_everywhere(kind, dtype, case, cache):
    check_quantized(kind, dtype, case, cache)


@pytest.mark.parametrize(("kind", "dtype", "case"), [("rdna3", "bfloat16", "grouped"), ("rdna4", "float16", "sinks")])
def test_other_layouts_of_matrix_units(kind, dtype, case):
    check(kind, dtype, case)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "case"), [c for c in EVERYTHING if c not in COVER])
def test_matches_float64_everywhere(kind, dtype, case):
    check(kind, dtype, case)


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_a_dropped_option_is_seen(kind):
    case = Case(kind, "float16", "window in chunk")
    assert min(case.error([(130, 50), (90, 1)], **wrong) for wrong in ({"window": 10}, {"chunk": 0})) > 1e-2


@pytest.mark.parametrize(("kind", "dtype", "case"), [("cuda", "bfloat16", "sinks"), ("metal", "float32", "grouped")])
def test_batch_invariant_sequences_are_the_same_bits_alone(kind, dtype, case):
    one = Case(kind, dtype, case, batch_invariant=True)
    batch = [(700, 1), (33, 5), (130, 50), (9, 0), (64, 64)]
    together = one.answers(batch)
    for s, sequence in enumerate(batch):
        assert not sequence[1] or np.array_equal(one.answers([sequence], first=s)[0], together[s])
    assert one.error(batch) < TOLERANCE[dtype]


class Moved(Case):
    """The rows of one long sequence, as many at a time as a batch says: (length, new) is where they end."""

    def sequences(self, batch, first=0):
        longest = 130
        k = pages.normal([0, 1], (longest, self.kv_heads, self.head_dim), self.dtype)
        v = pages.normal([0, 2], (longest, self.kv_heads, self.v_dim), self.dtype)
        q = pages.normal([0, 0], (longest, self.heads, self.head_dim), self.dtype, 2)
        for length, new in batch:
            key = k[:length]
            yield q[length - new : length], key, key[..., : self.v_dim] if self.options.get("v_width") else v[:length]


@pytest.mark.parametrize(
    ("kind", "dtype", "case", "cache"),
    [("cuda", "bfloat16", "sinks", None), ("cuda", "float32", "window in chunk", None),
     ("rocm", "float16", "window", None), ("metal", "float16", "chunk", None),
     ("cuda", "float16", "latent, many heads", None), ("cuda", "bfloat16", "grouped", "int8")],
)  # fmt: skip
def test_batch_invariant_tokens_are_the_same_bits_whatever_comes_with_them(kind, dtype, case, cache):
    """Prefill in one piece, in two, and token by token: in a step, what a sequence gets depends on the others."""
    one = Moved(kind, dtype, case, cache, batch_invariant=True)
    [whole] = one.answers([(130, 130)])
    for batch in ([(71, 71), (130, 59)], [(1, 1), (64, 1), (65, 1), (100, 3), (130, 1)]):
        for (length, new), found in zip(batch, one.answers(batch), strict=True):
            assert np.array_equal(found, whole[length - new : length]), (length, new)
    assert one.error([(130, 130)]) < TOLERANCE[dtype]


def test_a_call_says_whether_sums_are_in_one_order():
    from llmc.codegen.software_device import Unwritten, check_all

    case = Moved("cuda", "float16", "alone", batch_invariant=None)
    batch = [(100, 1), (7, 1)]
    table = pages.tables(batch, case.page_size)
    queries, keys, values = zip(*case.sequences(batch), strict=True)
    q = np.concatenate(queries)
    pools = [pages.paged(x, table, case.page_size) for x in (keys, values)]
    out = Unwritten((len(q), case.heads, case.v_dim), case.dtype)
    found = [check_all(case.kernel, case.target, [q, *pools, *table.values(), asked, out])[-1] for asked in (0, 1)]
    split = Moved("cuda", "float16", "alone").answers(batch)
    invariant = Moved("cuda", "float16", "alone", batch_invariant=True).answers(batch)
    assert np.array_equal(found[0], np.concatenate(split)) and np.array_equal(found[1], np.concatenate(invariant))
    assert not np.array_equal(*found)


def without(what):
    """A copy to shared memory that lacks its wait, or its barrier."""
    from tvm.tirx.script import builder as T

    def finish(copy):
        if what != "wait":
            T.evaluate(T.ptx.cp.async_.wait_group(0))
        if what != "barrier":
            copy.m.barrier()

    return finish


@pytest.mark.parametrize(("what", "fault"), [("wait", "copy"), ("barrier", "race")])
def test_a_missing_wait_and_a_missing_barrier_are_caught(monkeypatch, what, fault):
    from llmc.codegen.gpu import attention_tiles
    from llmc.codegen.software_device import DeviceFault

    monkeypatch.setattr(attention_tiles._Copy, "finish", without(what))
    with pytest.raises(DeviceFault) as raised:
        Case("cuda", "float16", "grouped").answers([(130, 50)])
    assert raised.value.fault == fault


def test_a_missing_barrier_behind_codes_is_caught(monkeypatch):
    """Codes pass through registers, and TVM sees what is put to shared memory: it is the first to miss the barrier."""
    from llmc.codegen.gpu import attention_tiles

    finish = attention_tiles._Copy.finish

    def unfenced(copy):
        copy.m.barrier = lambda: None
        finish(copy)
        del copy.m.barrier

    monkeypatch.setattr(attention_tiles._Copy, "finish", unfenced)
    with pytest.raises(RuntimeError, match="Cannot insert syncs inside condition"):
        Case("cuda", "float16", "grouped", "int8").answers([(130, 50)])


def test_a_lost_scale_is_seen(monkeypatch):
    from llmc.codegen.gpu import attention_lanes

    monkeypatch.setattr(attention_lanes._Attend, "scale", lambda attend, scores, scales: None)
    assert not Case("cuda", "float32", "alone", "int8").error([(40, 1)]) < 1


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_nothing_to_do(kind):
    """No rows, or no sequences: nothing is launched."""
    case = Case(kind, "float32", "alone")
    case_pages = np.zeros((1, 3, 16, 32), np.float32)
    none, zero = np.zeros(0, np.int32), np.zeros(1, np.int32)
    for rows in (0, 2):
        from llmc.codegen.software_device import run

        q = np.zeros((rows, 3, 32), np.float32)
        run(case.kernel, case.target, [q, case_pages, case_pages, zero, zero, none, none, q])


def reference(options):
    """The largest difference of the reference loops of llmc.ir from `pages.attention`."""
    import tvm

    from llmc.ir.paging import paged_attention

    function = paged_attention(4, 2, 24, 16, "float32", 8, False, 0.3, **options).with_attr("global_symbol", "f")
    call = tvm.compile(tvm.IRModule({"f": function}), tvm.target.Target("llvm"))["f"]
    batch = [(40, 7), (5, 0), (17, 1), (30, 30)]
    table = pages.tables(batch, 8)
    rows = [(new, length) for length, new in batch]
    q = [pages.normal([s, 0], (new, 4, 24), scale=2) for s, (new, _) in enumerate(rows)]
    k = [pages.normal([s, 1], (length, 2, 24)) for s, (_, length) in enumerate(rows)]
    v = [pages.normal([s, 2], (length, 2, 16)) for s, (_, length) in enumerate(rows)]
    sinks = pages.normal(9, 4) if options.get("sinks") else None
    out = np.zeros((38, 4, 16), np.float32)
    arguments = [np.concatenate(q), pages.paged(k, table, 8), pages.paged(v, table, 8)]
    tensors = [tvm.runtime.tensor(a) for a in (*arguments, *([] if sinks is None else [sinks]), *table.values(), out)]
    call(*tensors)
    masks = {name: value for name, value in options.items() if name != "sinks"}
    truth = [pages.attention(*x, sinks, 0.3, **masks) for x in zip(q, k, v, strict=True) if len(x[0])]
    return np.abs(tensors[-1].numpy() - np.concatenate(truth)).max()


@pytest.mark.parametrize("options", [{}, {"window": 9, "chunk": 16, "softcap": 5.0, "sinks": True}])
def test_what_is_compared_with_is_what_the_ir_says(isolated, options):
    assert isolated(reference, options) < 1e-5


def test_keys_with_tokens_last_are_refused():
    from llmc.codegen.gpu.attention import paged_attention

    with pytest.raises(ValueError, match=r"expected keys with tokens before columns.*found keys_token_last=True"):
        paged_attention(emission.target("cuda"), 2, 1, 8, 8, "float32", 16, True, 1.0)


def shared_memory(kind):
    """Bytes of shared memory that each kernel declares."""
    import re

    from llmc.codegen.gpu.attention import paged_attention

    size, found = {"float": 4, "half": 2, "int": 4}, []
    for dtype, width in itertools.product(("float16", "bfloat16"), (64, 128, 256)):
        kernel = paged_attention(emission.target(kind), 16, 1, width, width, dtype, 16, False, 0.1)
        for text in emission.source(kernel, kind).split("kernel void ")[1:]:
            declared = re.findall(r"threadgroup (\w+) \w+\[(\d+)\]", text)
            found.append(sum(size[of] * int(count) for of, count in declared))
    return found


def test_threadgroup_memory_fits(isolated):
    """Metal's compiler would be the first to complain, at a user's."""
    assert 16 << 10 < max(isolated(shared_memory, "metal")) <= emission.target("metal").shared_bytes
