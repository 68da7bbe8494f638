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
        "llvm.amdgcn.wave.barrier",
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
