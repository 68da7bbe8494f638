"""Random products, what they must come to, and how near: for the tests of product kernels."""

import numpy as np

from llmc.codegen.epilogue import Epilogue
from llmc.codegen.gpu.pack import row_elements
from llmc.codegen.software_device import Unwritten
from llmc.codegen.weights import numpy_dtype

HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a number
SMALLEST = {"float32": 1e-30, "float16": 2.0**-25, "bfloat16": 1e-30}  # half the distance of the smallest numbers
ROWS = (0, 1, 2, 7, 8, 9, 64, 200)
DTYPES = ("float32", "float16", "bfloat16")
PAIRS = [(weight, activation) for weight in DTYPES for activation in DTYPES]


def silu(a):
    return a / (1 + np.exp(-a))


def gelu_tanh(a):
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


GATES = {"silu": silu, "gelu_tanh": gelu_tanh}


def biased_sums(x, w, bias, picked):
    """x @ w.T + bias in float64, and the sums of the terms' sizes; a row has the expert that is picked for it."""
    if picked is not None:
        w = w[picked]
        sums, sizes = (np.einsum("nd,ncd->nc", *p) for p in ((x, w), (abs(x), abs(w))))
    else:
        sums, sizes = x @ w.T, abs(x) @ abs(w).T
    if bias is None:
        return sums, sizes
    bias = bias.astype(np.float64)
    bias = bias if picked is None else bias[picked]
    return sums + bias, sizes + abs(bias)


class Case:
    """A product with operands of `seed`. `arguments(n)` are the kernel's for n rows, y unwritten.

    `largest_miss(y)`: how far y is from the product in float64, as a part of what it may be off.
    """

    def __init__(self, columns, depth, weight, activation, out=None, epilogue=None, experts=None, ids="int32", seed=0):
        self.columns, self.depth, self.experts, self.ids = columns, depth, experts, ids
        self.weight, self.activation, self.out = weight, activation, out or activation
        self.epilogue = epilogue or Epilogue()
        self.random = np.random.default_rng(seed)
        lead = (experts,) if experts else ()
        self.w = self.normal((*lead, columns, depth), weight)
        self.bias = self.normal((*lead, columns), self.epilogue.bias) if self.epilogue.bias else None

    @property
    def label(self):
        return f"{self.columns}x{self.depth}-{self.weight}-{self.activation}"

    def normal(self, shape, dtype):
        return self.random.standard_normal(shape).astype(numpy_dtype(dtype))

    @property
    def out_columns(self):
        return self.columns // 2 if self.epilogue.gate else self.columns

    def options(self):
        """Keywords of `matmul` and `expert_linear`."""
        return dict(weight=self.weight, activation=self.activation, out=self.out, epilogue=self.epilogue)

    def arguments(self, n):
        self.x = self.normal((n, self.depth), self.activation)
        self.picked = self.random.integers(0, self.experts, n).astype(self.ids) if self.experts else None
        self.residual = None
        if self.epilogue.residual:
            self.residual = self.normal((n, self.out_columns), self.epilogue.residual)
        padding = row_elements(self.depth, self.weight) - self.depth
        stored = np.pad(self.w, [(0, 0)] * (self.w.ndim - 1) + [(0, padding)])
        given = [self.x, stored, self.picked, self.bias, self.residual]
        return [a for a in given if a is not None] + [Unwritten((n, self.out_columns), self.out)]

    def expected(self):
        """y in float64, and how far float32 sums may be from it.

        A sum of k products in float32, in any order, is off by at most k half ulps of the sum of their sizes (Higham,
        Accuracy and Stability, 4.2), as is the rounding at the end by half an ulp of y's dtype. Through a gate errors
        grow as its derivative, at most 1.13, and its own: an exponential within 1e-7 · (4 + |a|) of itself.
        """
        x, w = self.x.astype(np.float64), self.w.astype(np.float64)
        sums, sizes = biased_sums(x, w, self.bias, self.picked)
        off = (self.depth + 1) * HALF_ULP["float32"] * sizes
        if self.epilogue.gate:
            half = self.columns // 2
            a, b, off_a, off_b = sums[:, :half], sums[:, half:], off[:, :half], off[:, half:]
            gate = GATES[self.epilogue.gate](a)
            sums = gate * b
            off = 1.13 * off_a * (abs(b) + off_b) + abs(gate) * off_b + 1e-7 * (8 + abs(a)) * abs(sums)
        if self.residual is not None:
            sums = sums + self.residual.astype(np.float64)
            off = off + HALF_ULP["float32"] * abs(sums)
        return sums, off + HALF_ULP[self.out] * (abs(sums) + off) + SMALLEST[self.out]

    def largest_miss(self, y):
        expected, off = self.expected()
        assert y.shape == expected.shape and y.dtype == numpy_dtype(self.out)
        return (abs(y.astype(np.float64) - expected) / off).max(initial=0)
