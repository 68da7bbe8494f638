"""Tiny decoders in the textbook form, built by hand: what the tests of passes rewrite."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir import ops


@dataclass(eq=False)
class Decoder:
    """A decoder of `layers` blocks: norm, attention with rotary positions, norm, gated MLP; `module` and `weights`.

    windows and chunks hold one number a layer (0: none). `dtype` is the compute dtype, `stored` that of the weights.
    """

    layers: int = 2
    hidden: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    v_dim: int = 8
    intermediate: int = 24
    vocab: int = 32
    windows: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.6
    bias: bool = False
    tied: bool = False
    dtype: str = "float32"
    stored: str = "float32"
    seed: int = 0
    weights: dict[str, np.ndarray] = field(init=False, repr=False)
    module: tvm.IRModule = field(init=False, repr=False)

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.weights, self.params = {}, {}
        self.bb = relax.BlockBuilder()
        n = tirx.Var("n", "int64")
        tokens, positions = (relax.Var(s, relax.TensorType([n], "int32")) for s in ("tokens", "positions"))
        with self.bb.function("main"):  # the weights are parameters as they come up
            with self.bb.dataflow():
                out = self.bb.emit_output(self.body(n, tokens, positions))
            self.bb.emit_func_output(out, [tokens, positions, *self.params.values()])
        module = self.bb.get()
        attrs = {"num_input": 2, "llmc.weights": list(self.weights)}
        module["main"] = module["main"].with_attrs(attrs)
        self.module = module

    @property
    def arrays(self) -> list[np.ndarray]:
        return list(self.weights.values())

    def emit(self, x, name=""):
        return self.bb.emit(x, name)

    def weight(self, name: str, *shape: int) -> relax.Var:
        """A weight in the compute dtype; a matrix scaled so that its outputs are about as large as its inputs."""
        if name not in self.params:
            w = self.rng.standard_normal(shape) * (1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.5)
            self.weights[name] = (w + (len(shape) == 1)).astype(np.dtype(numpy_dtype(self.stored)))
            self.params[name] = relax.Var(name.replace(".", "_"), relax.TensorType(shape, self.stored))
        w = self.params[name]
        return w if self.stored == self.dtype else self.emit(R.astype(w, self.dtype))

    def linear(self, x, name: str, outputs: int, bias: bool = False):
        inputs = int(x.ty.shape[-1])
        w = self.emit(R.permute_dims(self.weight(f"{name}.weight", outputs, inputs), [1, 0]))
        y = self.emit(R.matmul(x, w, out_dtype="float32"))
        if bias:
            b = self.weight(f"{name}.bias", outputs)
            y = self.emit(R.add(y, b if self.dtype == "float32" else self.emit(R.astype(b, "float32"))))
        return y if self.dtype == "float32" else self.emit(R.astype(y, self.dtype))

    def norm(self, x, name: str):
        w = self.weight(f"{name}.weight", int(x.ty.shape[-1]))
        return self.emit(R.nn.rms_norm(x, w, axes=[-1], epsilon=1e-5))

    def rope(self, x, positions):
        """Rotary embedding of x [n, heads, d] in the compute dtype."""
        d = int(x.ty.shape[-1])
        frequency = relax.const((1.0 / 100 ** (np.arange(0, d, 2) / d)).astype("float32"))
        angle = self.emit(R.multiply(self.emit(R.expand_dims(self.emit(R.astype(positions, "float32")), 1)), frequency))
        angle = self.emit(R.expand_dims(self.emit(R.concat([angle, angle], axis=-1)), 1))
        cos, sin = (self.cast(self.emit(f(angle))) for f in (R.cos, R.sin))
        a, b = self.emit(R.split(x, 2, axis=-1))
        turned = self.emit(R.concat([self.emit(R.negative(b)), a], axis=-1))
        return self.emit(R.add(self.emit(R.multiply(x, cos)), self.emit(R.multiply(turned, sin))))

    def cast(self, x):
        return x if self.dtype == "float32" else self.emit(R.astype(x, self.dtype))

    def body(self, n, tokens, positions):
        x = self.embedding(tokens)
        for i in range(self.layers):
            at = f"layers.{i}"
            y = self.norm(x, f"{at}.input_norm")
            x = self.emit(R.add(x, self.attention(i, y, n, positions)))
            x = self.emit(R.add(x, self.mlp(f"{at}.mlp", self.norm(x, f"{at}.post_norm"))))
        return self.head(self.norm(x, "norm"))

    def embedding(self, tokens):
        table = self.weight("embed_tokens.weight", self.vocab, self.hidden)
        return self.emit(R.take(table, tokens, axis=0))

    def head(self, x):
        if not self.tied:
            return self.linear(x, "lm_head", self.vocab)
        w = self.weight("embed_tokens.weight", self.vocab, self.hidden)
        return self.cast(self.emit(R.matmul(x, self.emit(R.permute_dims(w, [1, 0])), out_dtype="float32")))

    def attention(self, i: int, x, n, positions):
        at = f"layers.{i}.self_attn"
        shapes = {
            "q": (self.heads, self.head_dim),
            "k": (self.kv_heads, self.head_dim),
            "v": (self.kv_heads, self.v_dim),
        }
        q, k, v = (
            self.emit(R.reshape(self.linear(x, f"{at}.{s}_proj", h * d, self.bias), (n, h, d)))
            for s, (h, d) in shapes.items()
        )
        o = self.attend(i, self.rope(q, positions), self.rope(k, positions), v)
        o = self.emit(R.reshape(o, (n, self.heads * self.v_dim)))
        return self.linear(o, f"{at}.o_proj", self.hidden)

    def attend(self, i: int, q, k, v):
        sinks = self.weight(f"layers.{i}.self_attn.sinks", self.heads) if self.sinks else None
        at = lambda xs: xs[i] if xs else 0  # noqa: E731
        how = {"scale": self.scale, "softcap": self.softcap, "window": at(self.windows), "chunk": at(self.chunks)}
        return ops.attention(self.bb, q, k, v, sinks, **how)

    def mlp(self, at: str, x):
        gate, up = (self.linear(x, f"{at}.{s}_proj", self.intermediate) for s in ("gate", "up"))
        return self.linear(self.emit(R.multiply(self.emit(R.nn.silu(gate)), up)), f"{at}.down_proj", self.hidden)


def numpy_dtype(name: str):
    import ml_dtypes

    return getattr(ml_dtypes, name, name)
