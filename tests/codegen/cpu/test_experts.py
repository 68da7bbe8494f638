import numpy as np

from tests.codegen.cpu import native

CASES = [  # experts, columns, depth, weight, activation, options
    (5, 40, 33, "float32", "float32", {}),
    (3, 64, 24, "bfloat16", "float32", {"bias": "bfloat16"}),
    (8, 64, 20, "float16", "float32", {"gate": "silu"}),
    (4, 34, 18, "bfloat16", "bfloat16", {"bias": "float32", "gate": "silu"}),
]


def run(target, experts, columns, depth, weight, activation, options):
    """(error over the largest output, same bits in another order and with other rows, unpicked experts unread)"""
    from llmc.codegen.cpu.experts import expert_linear
    from llmc.codegen.cpu.matmul import Epilogue
    from llmc.codegen.cpu.pack import panels

    rng = np.random.default_rng(0)
    w, x = native.normal(1, (experts, columns, depth), weight), native.normal(2, (70, depth), activation)
    bias = native.normal(3, (experts, columns), options.get("bias", "float32"))
    ids = rng.integers(0, experts - 1, 70).astype(np.int32)  # no row picks the last expert
    layout = panels(target, columns, depth, weight, halves="gate" in options)
    packed = np.zeros((experts, *layout.shape), w.dtype)
    for e in range(experts - 1):
        layout.pack(w[e], packed[e])
    packed[-1] = np.nan
    kernel = native.build(
        expert_linear(
            target, experts, columns, depth, weight=weight, activation=activation, epilogue=Epilogue(**options)
        ),
        target,
    )
    truth = np.einsum("sd,scd->sc", x.astype(np.float64), w.astype(np.float64)[ids])
    if "bias" in options:
        truth += bias.astype(np.float64)[ids]
    if "gate" in options:
        a, b = np.split(truth, 2, axis=1)
        truth = a / (1 + np.exp(-a)) * b

    def call(rows):
        y = np.full((len(rows), truth.shape[1]), np.nan, x.dtype)
        kernel(x[rows], packed, ids[rows], *([bias] if "bias" in options else []), y)
        return y.astype(np.float64)

    everything = call(np.arange(70))
    same = all(
        np.array_equal(call(rows), everything[rows])
        for rows in (rng.permutation(70), np.array([3]), np.array([], int), np.arange(9, 40), np.array([5, 5, 60]))
    )
    return np.abs(everything - truth).max() / np.abs(truth).max(), same


def run_all():
    return [(t.name, case, *run(t, *case)) for t in native.targets() for case in CASES]


def test_chosen_experts_only_and_bits_do_not_depend_on_other_rows(isolated):
    for target, case, error, same in isolated(run_all, timeout=300):
        assert error < (4e-3 if case[4] == "bfloat16" else 2e-6) and same, f"{target} {case}: {error:.1e}, {same=}"
