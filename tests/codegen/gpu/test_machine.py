import numpy as np
import pytest

from tests.codegen.gpu import emission


def everything(kind):
    """A kernel that says each word of the vocabulary once."""
    from tvm.tirx.script import builder as T

    from llmc.codegen.gpu.machine import Machine, flat, kernel, loop, when

    m = Machine(emission.target(kind))

    def body(symbols, x, y):
        words, halves, wide = flat(x, "uint32"), flat(y), flat(y, "uint32")
        with when(symbols["n"] > 0), m.launch([symbols["n"]], 128) as [block]:
            shared = m.shared(4)
            four = m.registers(4, "uint32")
            m.fetch(words, block * 1024 + m.thread * 8, "bfloat16", four, 0, 8)
            values = m.unpack(four, 0, "bfloat16", 8)
            value = m.keep(m.tanh(m.sin(values[0])) + m.cos(values[1]) + m.exp(values[2]), "float32")
            value = m.block_reduce(T.max, m.fma(value, values[3], values[4]), shared)
            m.warp_barrier()
            value = m.shuffle(value, T.int32(3))
            m.pack([value] * 8, "bfloat16", four, 0)
            with loop(m.thread, start=3, step=2) as i:
                m.store(halves, [i], m.load_f32(halves, [i + 1]))
            m.put(wide, block * 1024 + m.thread * 8, "bfloat16", four, 0, 8)

    return kernel("words", [("x", ("n", 1024), "bfloat16"), ("y", ("n", 1024), "bfloat16")], body)


def source(kind):
    return emission.source(everything(kind), kind)


SPELLED = {
    "cuda": ["__syncthreads()", "__syncwarp()", "__shfl_xor_sync", "__shfl_sync", "fmaf(", "exp2f(", "*(uint4*)"],
    "rocm": [
        "llvm.amdgcn.s.barrier",
        "call void @llmc_wave_release()",
        "llvm.amdgcn.wave.barrier",
        "call void @llmc_wave_acquire()",
        "llvm.amdgcn.ds.bpermute",
        "llvm.fma.f32",
        "llvm.exp2.f32",
        "<4 x i32>",
    ],
    "metal": [
        "threadgroup_barrier(",
        "simd_shuffle_xor(",
        "simd_shuffle(",
        "fma(",
        "exp2(",
        "uint4*)",
        "simdgroup_barrier(",
    ],
}


@pytest.mark.parametrize("kind", SPELLED)
def test_every_word_is_spelled_in_every_language(isolated, kind):
    text = isolated(source, kind)
    assert [word for word in SPELLED[kind] if word not in text] == []
    kernel = text[text.index("words_kernel") :]
    assert "bfloat" not in kernel and "INFINITY" not in kernel


def test_masks_that_no_lane_has_are_refused():
    from llmc.codegen.gpu.machine import Machine

    with pytest.raises(ValueError, match=r"expected a mask of 1 … 31, found 32"):
        Machine(emission.target("metal")).shuffle_xor(None, 32)


def test_odd_accesses_are_refused():
    from llmc.codegen.gpu.machine import Machine

    with pytest.raises(ValueError, match=r"4, 8 or 16 bytes, found 1 elements of float16"):
        Machine(emission.target("cuda")).fetch(None, 0, "float16", None, 0, 1)


@pytest.mark.parametrize(
    ("width", "dtype", "count"), [(128, "float16", 8), (12, "bfloat16", 4), (7, "float32", 1), (7, "float16", 1)]
)
def test_the_widest_access_that_rows_allow(width, dtype, count):
    from llmc.codegen.gpu.machine import whole

    assert whole(width, dtype) == count


@pytest.mark.parametrize("kind", emission.EXECUTED)
def test_angles_of_far_positions(kind):
    """Against float64: zero and its neighbours, multiples of a quarter turn, up to the largest position."""
    from tvm.tirx.script import builder as T

    from llmc.codegen.gpu.machine import Machine, kernel, when
    from llmc.codegen.software_device import Unwritten, check_all

    m = Machine(emission.target(kind))

    def body(symbols, x, sine, cosine):
        with when(symbols["n"] > 0), m.launch([symbols["n"]], 64) as [block]:
            T.buffer_store(sine, m.sin(x[block, m.thread]), [block, m.thread])
            T.buffer_store(cosine, m.cos(x[block, m.thread]), [block, m.thread])

    rng = np.random.default_rng(0)
    turns = rng.integers(0, 2**22 / (np.pi / 2), 512) * (np.pi / 2)
    x = np.concatenate(
        [
            [0, 1e-38, 1e-8, 1e-3, np.pi / 4, np.pi / 2, 1e6, 2**22, -1, -1e6],
            np.nextafter(turns.astype("float32"), np.float32(0)),
            turns,
            rng.integers(0, 10**6, 512),  # the fastest pair turns by the position itself
            rng.integers(0, 10**6, 512) * 10000.0 ** -rng.random(512),
            rng.uniform(-100, 100, 502),
        ]
    )
    x = x.astype("float32").reshape(-1, 64)
    function = kernel("angles", [(name, ("n", 64), "float32") for name in ("x", "sine", "cosine")], body)
    _, sine, cosine = check_all(function, m.target, [x, *2 * (Unwritten(x.shape, "float32"),)])
    exact = x.astype("float64")
    assert np.abs(sine - np.sin(exact)).max() <= 2e-7
    assert np.abs(cosine - np.cos(exact)).max() <= 2e-7
    assert sine.reshape(-1)[0] == 0 and abs(sine.reshape(-1)[1] / 1e-38 - 1) < 1e-6  # small angles keep their digits
