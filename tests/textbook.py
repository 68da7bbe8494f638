"""Tiny models in the imported form, built by hand: what tests of passes run on."""

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir import ops
from llmc.ir.evaluate import evaluate

VOCAB = 48


def program(
    body: Callable,
    weights: dict[str, tuple] | None = None,
    *,
    dtype: str = "float32",
    batch: bool = True,
) -> tvm.IRModule:
    """main(tokens, positions, *weights) = body(builder, tokens, positions, **weights), dots in names underscores."""
    n = tirx.Var("n", "int64")
    shape = [1, n] if batch else [n]
    inputs = [relax.Var(name, relax.TensorType(shape, "int32")) for name in ("tokens", "positions")]
    params = {name: relax.Var(name, relax.TensorType(list(s), dtype)) for name, s in (weights or {}).items()}
    builder = relax.BlockBuilder()
    attrs = {"num_input": 2, "llmc.weights": list(params)}
    with builder.function("main", [*inputs, *params.values()], attrs=attrs):
        with builder.dataflow():
            named = {name.replace(".", "_"): p for name, p in params.items()}
            out = builder.emit_output(builder.normalize(body(builder, *inputs, **named)))
        builder.emit_func_output(out)
    return builder.get()


def embedded(body: Callable, **weights: tuple) -> tvm.IRModule:
    """A program over x [1, n, 8], an embedding of tokens: body(emit, x, positions, n, **weights) -> [1, n, …]."""

    def main(builder, tokens, positions, table, **others):
        x = builder.emit(R.take(table, tokens, 0))
        return body(builder.emit, x, positions, tokens.ty.shape.values[1], **others)

    return program(main, {"table": (VOCAB, 8), **weights})


def llama(
    layers: int = 2,
    *,
    hidden: int = 16,
    heads: int = 4,
    groups: int = 2,
    width: int = 8,
    vocab: int = VOCAB,
    dtype: str = "float32",
    **attention,
) -> tvm.IRModule:
    """A Llama in the imported form: rotary positions, grouped heads, SwiGLU, RMS norms, tied to nothing.

    `attention` goes to every layer's op (window, softcap, …; `sinks=True` gives each layer a weight of sinks).
    """
    sinks = attention.pop("sinks", False)
    weights: dict[str, tuple] = {
        "embed.weight": (vocab, hidden),
        "norm.weight": (hidden,),
        "head.weight": (vocab, hidden),
    }
    for i in range(layers):
        weights |= {
            f"layers.{i}.norm1.weight": (hidden,),
            f"layers.{i}.q.weight": (heads * width, hidden),
            f"layers.{i}.k.weight": (groups * width, hidden),
            f"layers.{i}.v.weight": (groups * width, hidden),
            f"layers.{i}.o.weight": (hidden, heads * width),
            f"layers.{i}.norm2.weight": (hidden,),
            f"layers.{i}.gate.weight": (2 * hidden, hidden),
            f"layers.{i}.up.weight": (2 * hidden, hidden),
            f"layers.{i}.down.weight": (hidden, 2 * hidden),
        }
        if sinks:
            weights[f"layers.{i}.sinks"] = (heads,)

    def body(builder, tokens, positions, **w):
        emit, n = builder.emit, tokens.ty.shape.values[1]

        def linear(x, weight):
            return emit(R.matmul(x, emit(R.permute_dims(weight, [1, 0]))))

        def norm(x, weight):
            mean = emit(R.mean(emit(R.multiply(x, x)), [-1], keepdims=True))
            scale = emit(R.rsqrt(emit(R.add(mean, relax.const(1e-5, dtype)))))
            return emit(R.multiply(emit(R.multiply(x, scale)), weight))

        def heads_of(x, count):
            return emit(R.permute_dims(emit(R.reshape(x, [1, n, count, width])), [0, 2, 1, 3]))

        def rotate(x):
            first, second = (emit(R.strided_slice(x, [3], [a], [a + width // 2])) for a in (0, width // 2))
            turned = emit(R.concat([emit(R.negative(second)), first], axis=-1))
            return emit(R.add(emit(R.multiply(x, cos)), emit(R.multiply(turned, sin))))

        def row(x):
            return emit(R.squeeze(emit(R.permute_dims(x, [0, 2, 1, 3])), [0]))

        frequency = relax.const((100.0 ** -(np.arange(0, width, 2) / width)).astype("float32"))
        angle = emit(R.multiply(emit(R.expand_dims(emit(R.astype(positions, "float32")), -1)), frequency))
        angle = emit(R.expand_dims(emit(R.concat([angle, angle], axis=-1)), 1))
        cos, sin = (emit(R.astype(emit(f(angle)), dtype)) for f in (R.cos, R.sin))
        x = emit(R.take(w["embed_weight"], tokens, 0))
        for i in range(layers):
            p = {k.removeprefix(f"layers_{i}_"): v for k, v in w.items() if k.startswith(f"layers_{i}_")}
            y = norm(x, p["norm1_weight"])
            q = rotate(heads_of(linear(y, p["q_weight"]), heads))
            k = rotate(heads_of(linear(y, p["k_weight"]), groups))
            v = heads_of(linear(y, p["v_weight"]), groups)
            scale = attention.get("scale", width**-0.5)
            others = {key: value for key, value in attention.items() if key != "scale"}
            seen = ops.attention(builder, row(q), row(k), row(v), p.get("sinks"), scale=scale, **others)
            seen = emit(R.reshape(emit(R.expand_dims(seen, 0)), [1, n, heads * width]))
            x = emit(R.add(x, linear(seen, p["o_weight"])))
            y = norm(x, p["norm2_weight"])
            gate = emit(R.nn.silu(linear(y, p["gate_weight"])))
            x = emit(R.add(x, linear(emit(R.multiply(gate, linear(y, p["up_weight"]))), p["down_weight"])))
        return linear(norm(x, w["norm_weight"]), w["head_weight"])

    return program(body, weights, dtype=dtype)


def arguments(module: tvm.IRModule, n: int, seed: int = 0, vocab: int = VOCAB) -> list[np.ndarray]:
    """Random tokens, positions 0 .. n-1 and random weights of unit gain, for the `main` of a module (either form)."""
    rng = np.random.default_rng(seed)
    values = []
    for index, p in enumerate(module["main"].params):
        shape = [int(d) if isinstance(d, tirx.IntImm) else n for d in p.ty.shape.values]
        if index == 0:
            values.append(rng.integers(0, vocab, shape).astype("int32"))
        elif index == 1:
            values.append(np.arange(n, dtype="int32").reshape(shape))
        elif len(shape) == 1:
            values.append((1 + 0.2 * rng.standard_normal(shape)).astype(str(p.ty.dtype)))
        else:
            values.append((rng.standard_normal(shape) * shape[-1] ** -0.5 * 2).astype(str(p.ty.dtype)))
    return values


def logits(module: tvm.IRModule, n: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """The logits [n, vocab] of a module in imported or textbook form, on `arguments` of that seed."""
    out = evaluate(module, arguments(module, n, seed, vocab)).astype("float32")
    return out.reshape(n, out.shape[-1])
