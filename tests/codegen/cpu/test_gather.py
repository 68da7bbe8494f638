import numpy as np

from tests.codegen.cpu import native

CASES = [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]
SHAPES = [(100, 64), (33, 37), (1, 1)]


def run_all():
    from llmc.codegen.cpu.gather import take
    from llmc.codegen.cpu.pack import panels

    found = []
    for index, target in enumerate(native.targets()):
        for weight, out in CASES[: 2 if index else None]:
            for rows, depth in SHAPES:
                w = native.normal(0, (rows, depth), weight)
                layout = panels(target, rows, depth, weight)
                packed = np.zeros(layout.shape, w.dtype)
                layout.pack(w, packed)
                ids = np.random.default_rng(0).integers(0, rows, 9).astype(np.int32)
                for is_packed, values in ((False, w), (True, packed)):
                    kernel = native.build(take(target, rows, depth, weight=weight, out=out, packed=is_packed), target)
                    for n in (0, 1, 9):
                        y = np.full((n, depth), np.nan, native.DTYPES[out])
                        kernel(values, ids[:n].copy(), y)
                        found.append(
                            (target.name, weight, out, is_packed, np.array_equal(y, w[ids[:n]].astype(y.dtype)))
                        )
    return found


def test_rows_come_exactly_from_rows_and_from_panels(isolated):
    assert [f for f in isolated(run_all, timeout=300) if not f[-1]] == []
