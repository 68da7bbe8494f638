"""Small models in the ragged form, built by hand: what the tests of code generation lower."""

import json

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.paging import append_pages, page_tensors, paged_attention

PAGE = 4


class Llama:
    """A llama of random weights in the ragged form.

    module: embed and step; weights: name -> array of the checkpoint's dtype. `tied`: the head is the embedding;
    `cache`: keys and values are cached in 8 bits.
    """

    def __init__(self, layers=2, width=32, heads=4, kv_heads=2, dim=8, inner=48, vocab=96, dtype="float32",
                 checkpoint="float32", tied=True, token_last=True, window=0, cache=""):  # fmt: skip
        self.layers, self.width, self.heads, self.kv_heads, self.dim = layers, width, heads, kv_heads, dim
        self.inner, self.vocab, self.dtype, self.checkpoint = inner, vocab, dtype, checkpoint
        self.tied, self.token_last, self.window, self.cache = tied, token_last, window, cache
        self.shapes = {"embed.weight": (vocab, width), "norm.weight": (width,)}
        for i in range(layers):
            self.shapes |= {
                f"layers.{i}.norm1.weight": (width,),
                f"layers.{i}.qkv.weight": ((heads + 2 * kv_heads) * dim, width),
                f"layers.{i}.o.weight": (width, heads * dim),
                f"layers.{i}.norm2.weight": (width,),
                f"layers.{i}.gate.weight": (inner, width),
                f"layers.{i}.up.weight": (inner, width),
                f"layers.{i}.down.weight": (width, inner),
            }
        if not tied:
            self.shapes["head.weight"] = (vocab, width)
        rng = np.random.default_rng(0)
        self.weights = {}
        for name, shape in self.shapes.items():
            scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            value = rng.standard_normal(shape).astype("float32") * scale
            self.weights[name] = value.astype(_numpy_dtype(checkpoint))
        self.module = self._module()

    def _module(self):
        bb = relax.BlockBuilder()
        self._embed(bb)
        self._step(bb)
        return bb.get()

    def _weight_params(self, names):
        return [relax.Var(n.replace(".", "_"), relax.TensorType(self.shapes[n], self.checkpoint)) for n in names]

    def _embed(self, bb):
        n = tirx.Var("n", "int64")
        names = ["embed.weight"]
        tokens, weights = relax.Var("tokens", relax.TensorType([n], "int32")), self._weight_params(names)
        with bb.function("embed", [tokens, *weights], attrs={"num_input": 1, "llmc.weights": names}):
            with bb.dataflow():
                x = bb.emit(R.take(self._cast(bb, weights[0]), tokens, axis=0))
                out = bb.emit_output(x)
            bb.emit_func_output(out)

    def _cast(self, bb, x, dtype=None):
        dtype = dtype or self.dtype
        return x if x.ty.dtype == dtype else bb.emit(R.astype(x, dtype))

    def _linear(self, bb, x, w):
        y = bb.emit(R.matmul(x, bb.emit(R.permute_dims(self._cast(bb, w), [1, 0])), out_dtype="float32"))
        return self._cast(bb, y)

    def _norm(self, bb, x, w):
        x32 = self._cast(bb, x, "float32")
        square = bb.emit(R.power(x32, relax.const(2.0, "float32")))
        mean = bb.emit(R.mean(square, [-1], keepdims=True))
        root = bb.emit(R.rsqrt(bb.emit(R.add(mean, relax.const(1e-5, "float32")))))
        return bb.emit(R.multiply(self._cast(bb, w), self._cast(bb, bb.emit(R.multiply(x32, root)))))

    def _rotate(self, bb, x, cos, sin):
        half = self.dim // 2
        left, right = (
            bb.emit(R.strided_slice(x, [2], [0], [half])),
            bb.emit(R.strided_slice(x, [2], [half], [self.dim])),
        )
        turned = bb.emit(R.concat([bb.emit(R.negative(right)), left], axis=-1))
        return bb.emit(R.add(bb.emit(R.multiply(x, cos)), bb.emit(R.multiply(turned, sin))))

    def _step(self, bb):
        n, b1, b, r, m, p = (tirx.Var(s, "int64") for s in ("n", "b1", "b", "r_0", "m", "p_0"))
        h, g, d = self.heads, self.kv_heads, self.dim

        def table(name, *shape):
            return relax.Var(name, relax.TensorType(shape, "int32"))

        hidden = relax.Var("hidden", relax.TensorType([n, self.width], self.dtype))
        positions, rows = table("positions", 1, n), table("logit_rows", m)
        tables = [
            table("qo_indptr", b1),
            table("kv_indptr_0", b1),
            table("kv_indices_0", r),
            table("kv_last_page_len_0", b),
        ]
        tensors = self.tensors()
        pages = [relax.Var(t["name"], relax.TensorType([p, *t["shape"]], t["dtype"])) for t in tensors]
        names = [k for k in self.shapes if k != "embed.weight" or self.tied]
        weights = dict(zip(names, self._weight_params(names), strict=True))
        state = [{"kind": "paged", "page_size": PAGE, "window": self.window, "chunk": 0,
                  "layers": list(range(self.layers)), "tensors": tensors}]  # fmt: skip
        params = [hidden, positions, tables[0], rows, *tables[1:], *pages, *weights.values()]
        attrs = {"num_input": len(params) - len(weights), "llmc.weights": names, "llmc.state": json.dumps(state)}
        append = bb.add_func(append_pages(g, d, self.dtype, PAGE, self.token_last, self.cache), "append_pages_k")
        append_v = bb.add_func(append_pages(g, d, self.dtype, PAGE, False, self.cache), "append_pages_v")
        how = {"window": self.window, "cache": self.cache}
        attend = paged_attention(h, g, d, d, self.dtype, PAGE, self.token_last, d**-0.5, **how)
        attend = bb.add_func(attend, "paged_attention")
        with bb.function("step", params, attrs=attrs):
            with bb.dataflow():
                x = hidden
                frequency = relax.const(10000.0 ** (-np.arange(0, d, 2, dtype="float32") / d), "float32")
                position = bb.emit(R.astype(bb.emit(R.reshape(positions, [n, 1])), "float32"))
                angle = bb.emit(R.multiply(position, frequency))
                angle = bb.emit(R.expand_dims(bb.emit(R.concat([angle, angle], axis=-1)), 1))
                cos, sin = (self._cast(bb, bb.emit(f(angle))) for f in (R.cos, R.sin))
                for i in range(self.layers):
                    w = {k.split(".")[-2]: v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
                    qkv = self._linear(bb, self._norm(bb, x, w["norm1"]), w["qkv"])
                    qkv = bb.emit(R.reshape(qkv, [n, h + 2 * g, d]))
                    q, k, v = (
                        bb.emit(R.strided_slice(qkv, [1], [lo], [hi]))
                        for lo, hi in ((0, h), (h, h + g), (h + g, h + 2 * g))
                    )
                    q, k = self._rotate(bb, q, cos, sin), self._rotate(bb, k, cos, sin)
                    each = len(pages) // self.layers // 2
                    own = [pages[at : at + each] for at in (2 * each * i, (2 * i + 1) * each)]
                    pools = [
                        pool
                        for f, into, new in ((append, own[0], k), (append_v, own[1], v))
                        for pool in self._append(bb, f, into, new, tables)
                    ]
                    a = bb.emit(R.call_tir(attend, [q, *pools, *tables], relax.TensorType([n, h, d], self.dtype)))
                    a = self._linear(bb, bb.emit(R.reshape(a, [n, h * d])), w["o"])
                    x = bb.emit(R.add(x, a))
                    y = self._norm(bb, x, w["norm2"])
                    gate = bb.emit(R.nn.silu(self._linear(bb, y, w["gate"])))
                    y = bb.emit(R.multiply(gate, self._linear(bb, y, w["up"])))
                    x = bb.emit(R.add(x, self._linear(bb, y, w["down"])))
                x = self._norm(bb, bb.emit(R.take(x, rows, axis=0)), weights["norm.weight"])
                logits = self._linear(bb, x, weights["embed.weight" if self.tied else "head.weight"])
                out = bb.emit_output(self._cast(bb, logits, "float32"))
            bb.emit_func_output(out)

    def _append(self, bb, function, into, new, tables):
        if len(into) == 1:
            return [bb.emit(R.call_tir_inplace(function, [*into, new, *tables], 0, into[0].ty))]
        both = bb.emit(R.call_tir_inplace(function, [*into, new, *tables], [0, 1], [x.ty for x in into]))
        return [bb.emit(relax.TupleGetItem(both, i)) for i in range(2)]

    def tensors(self):
        """The tensors of a page, layer by layer, as the state says it."""
        return [
            {**t, "name": f"{t['name']}_{i}"}
            for i in range(self.layers)
            for name, last in (("k", self.token_last), ("v", False))
            for t in page_tensors(name, self.kv_heads, self.dim, PAGE, last, self.dtype, self.cache)
        ]

    def pools(self, count=32, dtype=None):
        """Fresh pages of noise: what a sequence did not write must never matter."""
        rng = np.random.default_rng(5)
        noise = [rng.integers(-100, 100, (count, *t["shape"])) for t in self.tensors()]
        dtypes = [_numpy_dtype(t["dtype"]) for t in self.tensors()]
        return [tvm.runtime.tensor(x.astype(dtype)) for x, dtype in zip(noise, dtypes, strict=True)]


def tables(batch, count=32, seed=0):
    """Page tables of a step. batch: list of (tokens before, new tokens). -> positions, qo_indptr, kv_indptr, …"""
    free = list(np.random.default_rng(seed).permutation(np.arange(1, count)))
    positions, qo, kv, indices, last = [], [0], [0], [], []
    for before, new in batch:
        length = before + new
        pages = -(-length // PAGE)
        positions += range(before, length)
        qo.append(qo[-1] + new)
        indices += [free.pop() for _ in range(pages)]
        kv.append(kv[-1] + pages)
        last.append(length - (pages - 1) * PAGE)
    return [np.array(x, "int32") for x in ([positions], qo, kv, indices, last)]


def _numpy_dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
