"""Small programs over x [1, n, 8]: some mix tokens and must be refused, the others don't and must be accepted."""

import numpy as np
from tvm import relax, tirx
from tvm.relax import op as R

from tests.textbook import embedded


def const(values, dtype="float32"):
    return relax.const(np.asarray(values, dtype), dtype)


def shifted(emit, x, p, n):
    """x of the token before, with x of token 0 in front."""
    first = emit(R.take(x, const([0], "int64"), 1))
    return R.concat([first, emit(R.strided_slice(x, [1], [0], [n - 1]))], axis=1)


def hidden_attention(emit, x, p, n):
    scores = emit(R.nn.softmax(emit(R.matmul(x, emit(R.permute_dims(x, [0, 2, 1])))), -1))
    return R.matmul(scores, x)


def float_positions(emit, p):
    return emit(R.astype(emit(R.expand_dims(p, -1)), "float32"))


def scatter(emit, x, axis):
    index = emit(R.argsort(x, axis=axis, dtype="int64"))
    return R.scatter_elements(x, index, x, axis=axis)


def conv(emit, x, p, n, w):
    channels = emit(R.permute_dims(x, [0, 2, 1]))
    mixed = emit(R.nn.conv1d(channels, w, padding=(2, 0)))
    return R.permute_dims(mixed, [0, 2, 1])


def answer_like_gather(emit, x, p, n):
    return R.take(x, emit(R.reshape(p, [n])), 1)


# name: (the op that is to blame, body(emit, x, positions, n, **weights), weights)
MIXING = {
    "softmax over tokens": ("nn.softmax", lambda emit, x, p, n: R.nn.softmax(x, 1)),
    "log softmax over tokens": ("nn.log_softmax", lambda emit, x, p, n: R.nn.log_softmax(x, 1)),
    "mean over tokens": ("mean", lambda emit, x, p, n: R.subtract(x, emit(R.mean(x, [1], keepdims=True)))),
    "variance over tokens": ("variance", lambda emit, x, p, n: R.subtract(x, emit(R.variance(x, [1], True)))),
    "norm over everything": ("sum", lambda emit, x, p, n: R.divide(x, emit(R.sum(emit(R.multiply(x, x)))))),
    "max position": ("max", lambda emit, x, p, n: R.multiply(x, emit(R.astype(emit(R.max(p)), "float32")))),
    "sum over tokens and channels": ("sum", lambda emit, x, p, n: R.add(x, emit(R.sum(x, [1, 2], True)))),
    "cumsum over tokens": ("cumsum", lambda emit, x, p, n: R.cumsum(x, 1)),
    "cumsum of everything": ("cumsum", lambda emit, x, p, n: R.reshape(emit(R.cumsum(x)), [1, n, 8])),
    "cumprod over tokens": ("cumprod", lambda emit, x, p, n: R.cumprod(x, 1)),
    "sort tokens": ("sort", lambda emit, x, p, n: R.sort(x, axis=1)),
    "argsort tokens": ("argsort", lambda emit, x, p, n: R.astype(emit(R.argsort(x, axis=1)), "float32")),
    "topk over tokens": ("topk", lambda emit, x, p, n: R.add(x, emit(R.topk(x, 1, 1, "values")))),
    "argmax over tokens": (
        "argmax",
        lambda emit, x, p, n: R.add(x, emit(R.astype(emit(R.argmax(x, 1, True)), "float32"))),
    ),
    "reversed tokens": ("flip", lambda emit, x, p, n: R.flip(x, 1)),
    "reversing slice": ("strided_slice", lambda emit, x, p, n: R.strided_slice(x, [1], [n - 1], [-n - 1], [-1])),
    "every other row of tokens tiled": (
        "strided_slice",
        lambda emit, x, p, n: R.strided_slice(emit(R.tile(x, [1, 2, 1])), [1], [0], [2 * n], [2]),
    ),
    "shifted tokens": ("take", shifted),
    "first token": ("take", lambda emit, x, p, n: R.add(x, emit(R.take(x, const([0], "int64"), 1)))),
    "last position": (
        "strided_slice",
        lambda emit, x, p, n: R.add(x, float_positions(emit, emit(R.strided_slice(p, [1], [n - 1], [n])))),
    ),
    "hidden attention": ("matmul", hidden_attention),
    "tokens contracted": (
        "matmul",
        lambda emit, x, p, n: R.matmul(x, emit(R.matmul(emit(R.permute_dims(x, [0, 2, 1])), x))),
    ),
    "einsum of tokens": ("einsum", lambda emit, x, p, n: R.matmul(emit(R.einsum((x, x), "bic,bjc->bij")), x)),
    "einsum over tokens": (
        "einsum",
        lambda emit, x, p, n: R.matmul(x, emit(R.einsum((x, x), "bic,bid->bcd"))),
    ),
    "gather by position": ("take", answer_like_gather),
    "gather over tokens": (
        "gather_elements",
        lambda emit, x, p, n: R.gather_elements(x, emit(R.astype(x, "int64")), axis=1),
    ),
    "scatter over tokens": ("argsort", lambda emit, x, p, n: scatter(emit, x, 1)),
    "write over tokens": (
        "scatter_elements",
        lambda emit, x, p, n: R.scatter_elements(x, emit(R.astype(emit(R.zeros_like(x)), "int64")), x, axis=1),
    ),
    "tokens on the channel axis": (
        "reshape",
        lambda emit, x, p, n: R.permute_dims(emit(R.reshape(x, [1, 8, n])), [0, 2, 1]),
    ),
    "reshape through tokens": (
        "reshape",
        lambda emit, x, p, n: R.reshape(emit(R.permute_dims(emit(R.reshape(x, [8, n])), [1, 0])), [1, n, 8]),
    ),
    "heads before tokens, not transposed": (
        "multiply",
        lambda emit, x, p, n: R.reshape(
            emit(
                R.multiply(
                    emit(R.reshape(emit(R.permute_dims(emit(R.reshape(x, [n, 2, 4])), [1, 0, 2])), [n * 2, 4])),
                    emit(R.reshape(x, [n * 2, 4])),
                )
            ),
            [1, n, 8],
        ),
    ),
    "tiled rows as repeated rows": (
        "add",
        lambda emit, x, p, n: R.reshape(
            emit(
                R.add(
                    emit(R.tile(emit(R.reshape(x, [n, 8])), [2, 1])), emit(R.repeat(emit(R.reshape(x, [n, 8])), 2, 0))
                )
            ),
            [1, n, 16],
        ),
    ),
    "row numbers": (
        "arange",
        lambda emit, x, p, n: R.add(x, emit(R.reshape(emit(R.arange(n, dtype="float32")), [1, n, 1]))),
    ),
    "reversed row numbers": (
        "arange",
        lambda emit, x, p, n: R.add(x, emit(R.reshape(emit(R.arange(n - 1, -1, -1, "float32")), [1, n, 1]))),
    ),
    "number of tokens": (
        "arange",
        lambda emit, x, p, n: R.divide(x, emit(R.astype(emit(R.arange(n, n + 1)), "float32"))),
    ),
    "identity": ("eye", lambda emit, x, p, n: R.matmul(emit(R.expand_dims(emit(R.eye(n, n)), 0)), x)),
    "columns as many as tokens": (
        "strided_slice",
        lambda emit, x, p, n, w: R.add(x, emit(R.sum(emit(R.strided_slice(w, [0], [0], [n])), [0]))),
        {"w": (64, 8)},
    ),
    "position in a table": (
        "strided_slice",
        lambda emit, x, p, n, w: R.add(x, emit(R.expand_dims(emit(R.strided_slice(w, [0], [0], [n])), 0))),
        {"w": (64, 8)},
    ),
    "convolution": ("nn.conv1d", conv, {"w": (8, 8, 3)}),
    "padding": ("nn.pad", lambda emit, x, p, n: R.strided_slice(emit(R.nn.pad(x, [0, 0, 1, 0, 0, 0])), [1], [0], [n])),
    "triangle": (
        "tril",
        lambda emit, x, p, n: R.tril(x),
    ),
    "tokens joined": ("concat", lambda emit, x, p, n: R.strided_slice(emit(R.concat([x, x], 1)), [1], [1], [n + 1])),
    "repeated tokens": ("strided_slice", lambda emit, x, p, n: R.strided_slice(emit(R.repeat(x, 2, 1)), [1], [0], [n])),
}

LOCAL = {
    "linear": (lambda emit, x, p, n, w: R.matmul(x, w), {"w": (8, 8)}),
    "softmax over channels": (lambda emit, x, p, n: R.nn.softmax(x, -1), {}),
    "rms norm": (
        lambda emit, x, p, n: R.multiply(x, emit(R.rsqrt(emit(R.mean(emit(R.multiply(x, x)), [-1], True))))),
        {},
    ),
    "layer norm": (lambda emit, x, p, n, w: R.nn.layer_norm(x, w, w, axes=[-1]), {"w": (8,)}),
    "position": (lambda emit, x, p, n: R.multiply(x, float_positions(emit, p)), {}),
    "position table": (
        lambda emit, x, p, n, w: R.add(x, emit(R.take(w, p, 0))),
        {"w": (64, 8)},
    ),
    "heads and back": (
        lambda emit, x, p, n: R.reshape(
            emit(R.permute_dims(emit(R.permute_dims(emit(R.reshape(x, [1, n, 2, 4])), [0, 2, 1, 3])), [0, 2, 1, 3])),
            [1, n, 8],
        ),
        {},
    ),
    "rows of experts": (
        lambda emit, x, p, n, w: R.reshape(
            emit(
                R.sum(
                    emit(R.reshape(emit(R.matmul(emit(R.repeat(emit(R.reshape(x, [n, 8])), 2, 0)), w)), [n, 2, 8])), [1]
                )
            ),
            [1, n, 8],
        ),
        {"w": (8, 8)},
    ),
    "tiled rows": (
        lambda emit, x, p, n: R.reshape(
            emit(R.sum(emit(R.reshape(emit(R.tile(emit(R.reshape(x, [n, 8])), [3, 1])), [3, n, 8])), [0])), [1, n, 8]
        ),
        {},
    ),
    "topk of channels": (lambda emit, x, p, n: R.topk(x, 2, -1, "values"), {}),
    "routing mask": (
        lambda emit, x, p, n: R.scatter_elements(
            emit(R.zeros([1, n, 8], "float32")),
            emit(R.topk(x, 2, -1, "indices", dtype="int64")),
            emit(R.topk(x, 2, -1, "values")),
            axis=2,
        ),
        {},
    ),
    "gather of channels": (
        lambda emit, x, p, n: R.gather_elements(x, emit(R.argsort(x, -1, dtype="int64")), axis=2),
        {},
    ),
    "one hot": (
        lambda emit, x, p, n: R.one_hot(
            emit(R.argmax(x, -1)), tirx.const(1.0, "float32"), tirx.const(0.0, "float32"), 8
        ),
        {},
    ),
    "cumsum of channels": (lambda emit, x, p, n: R.cumsum(x, 2), {}),
    "flipped channels": (lambda emit, x, p, n: R.flip(x, 2), {}),
    "split and join": (lambda emit, x, p, n: R.concat(list(reversed(fields(emit, R.split(x, 2, 2)))), 2), {}),
    "stack in front": (lambda emit, x, p, n: R.sum(emit(R.stack([x, x], 0)), [0]), {}),
    "stack behind": (lambda emit, x, p, n: R.reshape(emit(R.stack([x, x], -1)), [1, n, 16]), {}),
    "where": (lambda emit, x, p, n: R.where(emit(R.greater(x, relax.const(0.0))), x, emit(R.zeros_like(x))), {}),
    "mask by a table": (lambda emit, x, p, n: R.matmul(x, emit(R.triu(emit(R.ones([8, 8], "float32"))))), {}),
    "einsum with a weight": (lambda emit, x, p, n, w: R.einsum((x, w), "bic,cd->bid"), {"w": (8, 8)}),
    "vector on the right": (
        lambda emit, x, p, n, w: R.multiply(x, emit(R.expand_dims(emit(R.matmul(x, w)), -1))),
        {"w": (8,)},
    ),
    "weights batched over heads": (
        lambda emit, x, p, n, w: R.reshape(
            emit(
                R.permute_dims(
                    emit(R.matmul(emit(R.permute_dims(emit(R.reshape(x, [n, 2, 4])), [1, 0, 2])), w)), [1, 0, 2]
                )
            ),
            [1, n, 8],
        ),
        {"w": (2, 4, 4)},
    ),
    "token by token outer product": (
        lambda emit, x, p, n: R.reshape(
            emit(R.matmul(emit(R.reshape(x, [n, 8, 1])), emit(R.reshape(x, [n, 1, 8])))), [1, n, 64]
        ),
        {},
    ),
    "transposed and back": (
        lambda emit, x, p, n: R.permute_dims(emit(R.exp(emit(R.permute_dims(x, [0, 2, 1])))), [0, 2, 1]),
        {},
    ),
    "write some channels": (
        lambda emit, x, p, n: R.slice_scatter(x, emit(R.strided_slice(x, [2], [4], [8])), 0, 4, 1, axis=2),
        {},
    ),
    "padded channels": (lambda emit, x, p, n: R.nn.pad(x, [0, 0, 0, 0, 1, 1]), {}),
    "broadcast weight": (
        lambda emit, x, p, n, w: R.multiply(x, emit(R.broadcast_to(w, relax.ShapeExpr([1, n, 8])))),
        {"w": (8,)},
    ),
}


def fields(emit, value):
    value = emit(value)
    return [emit(relax.TupleGetItem(value, i)) for i in range(len(value.ty.fields))]


def mixing(name):
    """(the op to blame, the module) of a program that mixes tokens."""
    op, body, *weights = MIXING[name]
    return op, embedded(body, **(weights[0] if weights else {}))


def local(name):
    body, weights = LOCAL[name]
    return embedded(body, **weights)
