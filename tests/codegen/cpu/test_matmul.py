import numpy as np

from tests.codegen.cpu import native

ROWS = (0, 1, 2, 7, 13, 64, 100)
KINDS = [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
         ("float32", "bfloat16"), ("float16", "bfloat16")]  # fmt: skip
# Small, odd, narrower than a panel, deeper than a part of a panel that stays in cache.
SHAPES = [(64, 64), (33, 7), (1, 1), (250, 333), (5, 20000)]


def gelu_tanh(a):
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


GATES = {"silu": lambda a: a / (1 + np.exp(-a)), "gelu_tanh": gelu_tanh}


def run(target, columns, depth, weight, activation, bias=None, gate=None, residual=None, out=None):
    """(largest error over the largest output, are rows the same bits whatever n) over ROWS."""
    from llmc.codegen.cpu.matmul import Epilogue, matmul
    from llmc.codegen.cpu.pack import panels

    w, x = native.normal(0, (columns, depth), weight), native.normal(1, (max(ROWS), depth), activation)
    layout = panels(target, columns, depth, weight, halves=gate is not None)
    packed = np.zeros(layout.shape, w.dtype)
    layout.pack(w, packed)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    epilogue = Epilogue(bias=bias, gate=gate, residual=residual)
    kernel = native.build(
        matmul(target, columns, depth, weight=weight, activation=activation, out=out, epilogue=epilogue), target
    )
    extra = []
    if bias:
        extra.append(native.normal(2, columns, bias))
        expected += extra[0].astype(np.float64)
    if gate:
        expected = GATES[gate](expected[:, : columns // 2]) * expected[:, columns // 2 :]
    rest = native.normal(3, expected.shape, residual) if residual else None
    if residual:
        expected += rest.astype(np.float64)
    results = {}
    for n in ROWS:
        y = np.full((n, expected.shape[1]), np.nan, native.DTYPES[out or activation])
        kernel(x[:n].copy(), packed, *extra, *([rest[:n].copy()] if residual else []), y)
        results[n] = y.astype(np.float64)
    error = max(np.abs(y - expected[:n]).max(initial=0) for n, y in results.items()) / np.abs(expected).max()
    return error, all(np.array_equal(y, results[max(ROWS)][:n]) for n, y in results.items())


def run_all(kinds):
    """The whole of SHAPES on this machine's target, two of them elsewhere."""
    cases = [(t, s) for i, t in enumerate(native.targets()) for s in (SHAPES[1:4:2] if i else SHAPES)]
    return [(kind, t.name, shape, *run(t, *shape, *kind)) for kind in kinds for t, shape in cases]


def run_epilogues():
    cases = [
        ("float32", "float32", {"bias": "float32"}),
        ("bfloat16", "float32", {"bias": "bfloat16", "residual": "float32"}),
        ("bfloat16", "float32", {"gate": "silu"}),
        ("bfloat16", "bfloat16", {"gate": "gelu_tanh", "bias": "bfloat16", "residual": "bfloat16"}),
        ("bfloat16", "bfloat16", {"out": "float32"}),
    ]
    return [
        (t.name, w, a, options, *run(t, 86, 50, w, a, **options)) for t in native.targets() for w, a, options in cases
    ]


def test_products_match_and_do_not_depend_on_n(isolated):
    for kind, target, shape, error, same in isolated(run_all, KINDS, timeout=500):
        # float32 sums of 20000 terms; bfloat16 outputs are rounded to 8 bits.
        bound = 4e-3 if kind[1] == "bfloat16" else 2e-5
        assert error < bound and same, f"{target} {kind} {shape}: error {error:.1e}, same bits whatever n: {same}"


def test_epilogues(isolated):
    for target, weight, activation, options, error, same in isolated(run_epilogues):
        rounds = activation == "bfloat16" and options.get("out") != "float32"
        assert error < (4e-3 if rounds else 1e-6) and same, f"{target} {weight} {activation} {options}: {error:.1e}"


def plant_a_swapped_pair():
    """Products with two k of the packed weight exchanged."""
    from llmc.codegen.cpu import pack

    original = pack.Panels.pack

    def wrong(self, weight, out, start=0, stop=None):
        original(self, weight, out, start, stop)
        out[:, [0, 1]] = out[:, [1, 0]]

    pack.Panels.pack = wrong
    return run(native.targets()[0], 64, 64, "float32", "float32")


def test_a_wrong_layout_is_seen(isolated):
    error, _ = isolated(plant_a_swapped_pair)
    assert error > 1e-2


def test_aarch64_compiles(isolated):
    assert "fmla" in isolated(assembly_of_aarch64)


def assembly_of_aarch64():
    import tvm

    from llmc import targets
    from llmc.codegen.cpu.matmul import matmul

    [target] = targets.parse("cpu:aarch64")
    function = matmul(target, 100, 30, weight="bfloat16")
    return tvm.compile(tvm.IRModule({"matmul": function}), tvm.target.Target(target.llvm())).mod.inspect_source("asm")
