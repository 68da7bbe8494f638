"""Kernels over quantized weights against float64 numpy, and their packing against a second account of it."""

from dataclasses import replace

import numpy as np
import pytest

from tests.codegen.cpu import native

ROWS = (0, 1, 2, 5, 13, 40)
DTYPES = native.DTYPES | {"uint8": np.uint8}
E4M3_NAN = (0x7F, 0xFF)
INT8 = {"bits": 8, "group": 0, "scale": "float32", "offset": 128}
INT4 = {"bits": 4, "group": 32, "offset": 8}
# options of Format, rounded, activation, (columns, depth)
PRODUCTS = [
    (INT8, None, "float32", (64, 256)),
    (INT8, 0, "float32", (33, 203)),
    (INT8, 0, "bfloat16", (7, 5000)),
    (INT8, 16, "float32", (40, 96)),
    (INT8 | {"scale": "float16"}, None, "bfloat16", (5, 1333)),
    (INT8 | {"group": 160, "zeros": True, "scale": "bfloat16"}, None, "float32", (3, 480)),
    (INT4, None, "float32", (250, 320)),
    (INT4, 32, "float32", (250, 320)),
    (INT4, 0, "bfloat16", (96, 64)),
    (INT4 | {"group": 128}, None, "bfloat16", (32, 384)),
    (INT4 | {"group": 16, "zeros": True}, None, "float32", (40, 48)),
    (INT4 | {"group": 64, "zeros": True, "scale": "bfloat16"}, 128, "float32", (40, 256)),
    (INT4 | {"group": 0, "scale": "float32"}, None, "float32", (1, 7)),
    (INT4 | {"group": 12}, None, "float32", (20, 36)),
    ({"bits": 3, "group": 32, "offset": 4}, None, "float32", (40, 96)),
    ({"bits": 3, "group": 16, "zeros": True}, 16, "float32", (40, 80)),
    ({"bits": 3, "group": 0, "scale": "float32", "offset": 4}, 0, "bfloat16", (64, 1000)),
    ({"bits": 4, "group": 32, "table": "e2m1", "scale": "e8m0"}, None, "bfloat16", (40, 96)),
    ({"bits": 4, "group": 32, "table": "e2m1", "scale": "e8m0"}, 32, "float32", (40, 96)),
    ({"bits": 4, "group": 64, "table": "nf4"}, None, "float32", (40, 192)),
    ({"bits": 4, "group": 64, "table": "nf4"}, 0, "bfloat16", (40, 192)),
    ({"bits": 8, "group": 0, "table": "e4m3", "scale": "float32"}, None, "bfloat16", (40, 130)),
    ({"bits": 8, "group": 128, "table": "e4m3", "scale": "float32"}, 128, "float32", (40, 256)),
]


def random_parts(options, shape, seed=0):
    """Parts of a random weight of a format, as numpy arrays in the format's order."""
    from llmc.ir.quantized import Format

    random = np.random.default_rng(seed)
    parts = {}
    for name, (size, dtype) in Format(**options).parts(shape).items():
        if name == "scales" and dtype != "uint8":
            parts[name] = random.uniform(0.5, 1.5, size).astype(DTYPES[dtype])
        elif name == "scales":
            parts[name] = random.integers(120, 134, size).astype(np.uint8)
        else:
            parts[name] = random.integers(0, 2 ** options["bits"], size).astype(np.uint8)
            if options.get("table") == "e4m3":
                parts[name][np.isin(parts[name], E4M3_NAN)] = 0
    return parts


def meaning(options, parts):
    """The weight that parts stand for, float64: written down a second time."""
    from llmc.ir.quantized import TABLES

    codes = parts["codes"]
    each = lambda x: np.repeat(x, codes.shape[-1] // x.shape[-1], -1).astype(np.float64)  # noqa: E731
    if options.get("table"):
        numbers = np.array(TABLES[options["table"]])[codes]
    else:
        numbers = codes - (each(parts["zeros"]) if "zeros" in parts else float(options["offset"]))
    scales = each(parts["scales"])
    return numbers * (2.0 ** (scales - 127) if options.get("scale") == "e8m0" else scales)


def packed(target, options, parts):
    """What pack's Relax ops make of parts [..., columns, depth], one array a stored tensor."""
    from tvm import relax

    from llmc.codegen.cpu import quantized
    from llmc.ir.evaluate import evaluate
    from llmc.ir.quantized import Format

    builder = relax.BlockBuilder()
    variables = [relax.Var(name, relax.TensorType(x.shape, x.dtype.name)) for name, x in parts.items()]
    with builder.function("main", variables):
        columns, depth = parts["codes"].shape[-2:]
        stored = quantized.pack(target, builder.emit, variables, columns, depth, Format(**options))
        builder.emit_func_output(relax.Tuple(stored))
    return [np.asarray(x) for x in evaluate(builder.get(), list(parts.values()))]


def rounded_rows(x, group, table=""):
    """round_activation in float32, as its docstring has it; table: of the weight."""
    import ml_dtypes

    largest = 448 if table == "e4m3" else 127
    rows = x.astype(np.float32).reshape(len(x), -1, group or x.shape[1])
    most = np.abs(rows).max(-1, keepdims=True)
    most = np.maximum(most, np.float32(1e-30))
    near = rows * (np.float32(largest) / most)
    near = near.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if table == "e4m3" else np.rint(near)
    return (near * (most * np.float32(1 / largest))).reshape(x.shape)


def bound(options, x, w, rounded, out):
    """What each output may be off: what activations may be off by in 16 bits, and float32's rounding of a sum."""
    error = 2e-6 * np.abs(x) @ np.abs(w).T
    if rounded is None:
        size = np.gcd(options["group"], 128) if options["group"] else 128
        for start in range(0, x.shape[1], size):
            most = np.abs(x[:, start : start + size]).max(1, keepdims=True)
            error = error + most / 65024 * np.abs(w[:, start : start + size]).sum(1)
    return error + (np.abs(x @ w.T) * 2**-8 if out == "bfloat16" else 0)


def run(target, options, rounded, activation, shape, seed=0):
    """(the worst error over what is allowed, are rows the same bits whatever n) over ROWS."""
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    parts = random_parts(options, shape, seed)
    w = meaning(options, parts)
    made = quantized.matmul(target, *shape, format=Format(**options), activation=activation, rounded=rounded)
    kernel = native.build(made, target)
    stored = packed(target, options, parts)
    x = native.normal(seed + 1, (max(ROWS), shape[1]), activation)
    x[1, : shape[1] // 2] = 0  # groups of zeros
    results = {}
    for n in ROWS:
        y = np.full((n, shape[0]), np.nan, DTYPES[activation])
        kernel(x[:n].copy(), *stored, y)
        results[n] = y.astype(np.float64)
    seen = x if rounded is None else rounded_rows(x, rounded, options.get("table", ""))
    seen = seen.astype(np.float64)
    excess = np.abs(results[max(ROWS)] - seen @ w.T) / (bound(options, seen, w, rounded, activation) + 1e-30)
    return float(excess.max()), all(np.array_equal(y, results[max(ROWS)][:n]) for n, y in results.items())


def targets():
    """The native targets, and what this machine can run of others' widths: vectors of 8 with integer dots, of 4."""
    here, *others = native.targets()
    known = [here, *others]
    if here.lanes == 16:
        known.append(replace(here, name="256 bits", vector_bits=256))
    return [*known, replace(known[-1], name="128 bits", vector_bits=128, features=())]


def run_all(cases):
    known = targets()
    chosen = [(known[0], i) for i in range(len(cases))]
    chosen += [(known[1 + i % (len(known) - 1)], i) for i in range(len(cases))]
    return [(target.name, *cases[i], *run(target, *cases[i], i)) for target, i in chosen]


@pytest.mark.parametrize("half", [0, 1])
def test_products_match_and_do_not_depend_on_n(isolated, half):
    for *case, excess, same in isolated(run_all, PRODUCTS[half::2], timeout=300):
        assert excess <= 1 and same, f"{case}: error {excess:.2f} of what is allowed, same bits whatever n: {same}"


def run_codes():
    """Products with the identity: (what the kernel makes of activations, what round_activation means) by group."""
    from tvm import relax

    from llmc.codegen.cpu import quantized
    from llmc.ir.evaluate import evaluate
    from llmc.ir.quantized import Format, round_activation

    depth, found = 96, []
    for target in native.targets():
        for group, kind in [(0, "int8"), (16, "int8"), (32, "int8"), (0, "fp8"), (32, "fp8")]:
            x = native.normal(3, (50, depth)) * 10.0 ** np.arange(-45, 55, 2).clip(max=36)[:, None]
            x = x.astype(np.float32)
            x[7] = 0
            x[8, :8] = np.arange(8) * 0.5  # ties, where the largest is 127
            x[8, 8:] = 127 if kind == "int8" else 448
            x[9:30] = native.normal(4, (21, depth), "bfloat16").astype(np.float32)  # products close to ties
            x[30] = x[8] * 2.0**-10 * (np.arange(depth) % 16 > 0) + x[8] * (np.arange(depth) % 16 == 0)  # small ones
            options = INT8 | ({"offset": 0} if kind == "int8" else {"table": "e4m3"})
            one = np.uint8(1 if kind == "int8" else 0x38)
            parts = {"codes": np.eye(depth, dtype=np.uint8) * one, "scales": np.ones((depth, 1), np.float32)}
            made = quantized.matmul(target, depth, depth, format=Format(**options), rounded=group)
            y = np.full((50, depth), np.nan, np.float32)
            native.build(made, target)(x, *packed(target, options, parts), y)
            builder = relax.BlockBuilder()
            row = relax.Var("x", relax.TensorType(x.shape, "float32"))
            with builder.function("main", [row]):
                builder.emit_func_output(round_activation(builder, row, group=group, kind=kind))
            found.append((f"{target.name} {kind}", group, y, np.asarray(evaluate(builder.get(), [x]))))
    return found


def test_rounded_activations_are_those_of_round_activation_bit_for_bit(isolated):
    for target, group, got, want in isolated(run_codes):
        assert np.array_equal(got, want), f"{target}, groups of {group}: {(got != want).sum()} numbers differ"


def run_not_finite():
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    found = []
    for target in native.targets():
        for options, rounded in ((INT8, None), (INT4, None), (INT4, 32), (INT8, 0)):
            parts = random_parts(options, (8, 64))
            kernel = native.build(quantized.matmul(target, 8, 64, format=Format(**options), rounded=rounded), target)
            x = native.normal(1, (4, 64))
            x[1, 40], x[2, 3] = np.nan, np.inf
            x[3] *= 1e-38  # so small that the inverse of the largest is infinite
            y = np.zeros((4, 8), np.float32)
            kernel(x, *packed(target, options, parts), y)
            found.append((target.name, options, np.isfinite(y).all(1).tolist()))
    return found


def test_what_is_no_number_never_becomes_one(isolated):
    for target, options, finite in isolated(run_not_finite):
        assert finite == [True, False, False, True], f"{target} {options}"


def run_codes_of_none():
    """Which outputs are numbers where codes of E4M3 in some columns are none, also where activations are zeros."""
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    found = []
    for target, group in zip(native.targets() * 2, (0, 32), strict=False):
        options = {"bits": 8, "group": group, "table": "e4m3", "scale": "float32"}
        parts = random_parts(options, (40, 64))
        parts["codes"][3, 62], parts["codes"][37, 1] = E4M3_NAN
        kernel = native.build(quantized.matmul(target, 40, 64, format=Format(**options)), target)
        y = np.zeros((2, 40), np.float32)
        kernel(np.stack([np.zeros(64), np.ones(64)]).astype(np.float32), *packed(target, options, parts), y)
        found.append((target.name, group, np.flatnonzero(~np.isfinite(y)).tolist()))
    return found


def test_codes_that_are_no_numbers_make_their_columns_none(isolated):
    for target, group, none in isolated(run_codes_of_none):
        assert none == [3, 37, 43, 77], f"{target}, groups of {group}"


def code_at(options, stored, target, row, k):
    """A code read from the packed bytes by the layout's description."""
    vectors = 4 if target.lanes == 4 else 2
    panel, at = divmod(row, vectors * target.lanes)
    step, byte = divmod(k, 4)
    read = lambda word: int(stored[panel, word, at // target.lanes, at % target.lanes, byte])  # noqa: E731
    if options["bits"] == 8:
        return read(step)
    if options["bits"] == 4:
        return read(step // 2) >> 4 * (step % 2) & 15
    low = read(step // 8 * 3 + step % 8 // 4) >> 2 * (step % 4) & 3
    return low | (read(step // 8 * 3 + 2) >> step % 8 & 1) << 2


def run_packing():
    wrong = []
    for target in native.targets():
        for options in (INT8, INT4 | {"zeros": True, "group": 4}, {"bits": 3, "group": 0, "offset": 4}):
            parts = random_parts(options, (70, 44))
            codes, *rest = packed(target, options, parts)
            places = [(row, k) for row in range(70) for k in range(44)]
            if any(code_at(options, codes, target, *place) != parts["codes"][place] for place in places):
                wrong.append((target.name, options, "codes"))
            for stored, part in zip(rest, list(parts.values())[1:], strict=True):
                rows = stored.transpose(0, 2, 3, 1).reshape(-1, stored.shape[1])[:70]
                if not np.array_equal(rows, part):
                    wrong.append((target.name, options, "scales or zeros"))
    return wrong


def test_packing_is_what_its_description_says(isolated):
    assert isolated(run_packing) == []


EXPERTS = [(INT4, None, "float32"), (INT4 | {"table": "e2m1", "scale": "e8m0"}, 32, "bfloat16"),
           (INT4 | {"table": "nf4"}, None, "float32")]  # fmt: skip


def run_experts():
    """(error over what is allowed, same bits alone) of expert products whose unread experts are all NaN."""
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    found, (experts, columns, depth) = [], (6, 40, 64)
    for target in native.targets():
        for options, rounded, activation in EXPERTS:
            parts = random_parts(options, (experts, columns, depth))
            w = meaning(options, parts)
            ids = np.random.default_rng(2).choice([0, 2, 3, 5], 30).astype(np.int32)
            for unread in (1, 4):
                parts["scales"][unread] = 255 if options.get("scale") == "e8m0" else np.nan
            made = quantized.expert_linear(
                target, experts, columns, depth, format=Format(**options), activation=activation, rounded=rounded,
                bias="float32",
            )  # fmt: skip
            kernel, stored = native.build(made, target), packed(target, options, parts)
            x, bias = native.normal(3, (30, depth), activation), native.normal(4, (experts, columns))
            results = []
            for n in (30, 1, 0):
                y = np.full((n, columns), np.nan, DTYPES[activation])
                kernel(x[:n].copy(), *stored, ids[:n].copy(), bias, y)
                results.append(y.astype(np.float64))
            seen = (x if rounded is None else rounded_rows(x, rounded)).astype(np.float64)
            excess = 0.0
            for s in range(30):
                want = seen[s] @ w[ids[s]].T + bias[ids[s]]
                allowed = bound(options, seen[s : s + 1], w[ids[s]], rounded, "float32")[0]
                allowed = allowed + 1e-6 + (np.abs(want) * 2**-8 if activation == "bfloat16" else 0)
                excess = max(excess, float((np.abs(results[0][s] - want) / allowed).max()))
            found.append((target.name, options, excess, np.array_equal(results[0][:1], results[1])))
    return found


def test_experts_match_and_only_the_chosen_are_read(isolated):
    for target, options, excess, same in isolated(run_experts):
        assert excess <= 1 and same, f"{target} {options}: {excess:.2f} of what is allowed, same bits alone: {same}"


TAKEN = [(INT8, (70, 203), "float32"), (INT4, (70, 64), "bfloat16"), ({"bits": 3, "group": 8, "zeros": True},
         (70, 40), "float32"), ({"bits": 4, "group": 32, "table": "e2m1", "scale": "e8m0"}, (70, 64), "float32"),
         ({"bits": 4, "group": 0, "table": "nf4"}, (70, 50), "float32"),
         ({"bits": 8, "group": 0, "table": "e4m3", "scale": "bfloat16"}, (70, 50), "float32")]  # fmt: skip


def run_take():
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    found = []
    for target in native.targets():
        for options, shape, out in TAKEN:
            parts = random_parts(options, shape)
            if options.get("table") == "e4m3":
                parts["codes"][:, :50] = np.resize(np.setdiff1d(np.arange(256), E4M3_NAN), (70, 50))
            kernel = native.build(quantized.take(target, *shape, format=Format(**options), out=out), target)
            ids = np.array([3, 69, 0, 33, 33, 64, 1], np.int32)
            y = np.full((7, shape[1]), np.nan, DTYPES[out])
            kernel(*packed(target, options, parts), ids, y)
            kernel(*packed(target, options, parts), ids[:0].copy(), y[:0].copy())
            want = meaning(options, parts)[ids].astype(np.float32).astype(DTYPES[out])
            found.append((target.name, options, np.array_equal(y, want)))
    return found


def test_taken_rows_are_dequantized_to_the_last_bit(isolated):
    for target, options, same in isolated(run_take):
        assert same, f"{target} {options}"


def refusals():
    from llmc import targets
    from llmc.codegen.cpu import quantized
    from llmc.ir.errors import CompileError
    from llmc.ir.quantized import Format

    [target] = targets.parse("cpu:x86-64-v3")
    found = []
    for options, rounded in (({"bits": 5, "group": 32}, None), (INT4 | {"group": 6}, None), (INT4, 6), (INT4, 40)):
        try:
            quantized.matmul(target, 64, 96, format=Format(**options), rounded=rounded)
        except CompileError as error:
            found.append(str(error))
    return found


def test_what_has_no_kernel_is_refused_by_name(isolated):
    bits, group, odd, partial = isolated(refusals)
    assert "cpu:x86-64-v3 has no kernels for weights of 5 bits: expected one of 3, 4, 8 bits" in bits
    assert (
        "cpu:x86-64-v3 has no kernels for groups of 6 in rows of 96: expected whole groups of a multiple of 4" in group
    )
    assert "groups of a multiple of 4 that fill a row, found groups of 6" in odd
    assert "found groups of 40 in rows of 96" in partial


def assembly(name, options, rounded):
    import tvm

    from llmc import targets
    from llmc.codegen.cpu import quantized
    from llmc.ir.quantized import Format

    [target] = targets.parse(name)
    function = quantized.matmul(target, 100, 64, format=Format(**options), rounded=rounded)
    take = quantized.take(target, 100, 64, format=Format(**options))
    module = tvm.IRModule({"matmul": function, "take": take})
    return tvm.compile(module, tvm.target.Target(target.llvm())).mod.inspect_source("asm")


@pytest.mark.parametrize("target, instruction", [("cpu:aarch64", "fmla"), ("cpu:x86-64-v4", "vfmadd")])
def test_targets_without_integer_dots_compile(isolated, target, instruction):
    for options in (INT4, INT4 | {"table": "nf4"}):
        assert instruction in isolated(assembly, target, options, None)


def plant_a_swapped_pair_of_steps():
    from llmc.codegen.cpu import quantized_layout

    original = quantized_layout.QuantizedPanels.pack

    def wrong(self, emit, parts):
        from tvm.relax import op as R

        codes, *rest = original(self, emit, parts)
        return [emit(R.flip(codes, axis=1)), *rest]

    quantized_layout.QuantizedPanels.pack = wrong
    return run(native.targets()[0], INT4, None, "float32", (64, 64))


def test_a_wrong_layout_is_seen(isolated):
    excess, _ = isolated(plant_a_swapped_pair_of_steps)
    assert excess > 100
