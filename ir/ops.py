"""The semantic ops: what a program says, in functions whose body is their meaning.

A semantic op is a private Relax function with the attribute `llmc.op` (its name) and its parameters as further
attributes; the body says in plain Relax ops what it computes. So an op that no pass or kernel knows still runs, and
every rewrite has something to be compared with. The ops here are those of the textbook form: the ones through
which a token sees another, and the few that are worth a kernel.
"""

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax import op as R

OP = "llmc.op"
MASKED = -1e30  # the score of a token that may not be seen; finite, so that a softmax over such scores alone is not NaN


def op_of(module: tvm.IRModule, call: relax.Expr) -> str | None:
    """The name of the semantic op that `call` calls, directly or through call_tir; None if it calls none."""
    function = callee(module, call)
    if function is None or not function.attrs or OP not in function.attrs:
        return None
    return str(function.attrs[OP])


def attributes_of(module: tvm.IRModule, call: relax.Expr) -> dict[str, Any]:
    """The parameters of the semantic op that `call` calls (scale, window, …), as Python numbers."""
    function = callee(module, call)
    if function is None or not function.attrs:
        return {}
    values = {str(k): getattr(v, "value", v) for k, v in function.attrs.items()}
    return {k: v for k, v in values.items() if isinstance(v, (bool, int, float)) or k == OP}


def callee(module: tvm.IRModule, call: relax.Expr) -> relax.Function | tirx.PrimFunc | None:
    """The function of `module` that `call` calls, directly or through call_tir and call_tir_inplace."""
    if not isinstance(call, relax.Call):
        return None
    target = call.op
    if isinstance(target, tvm.ir.Op) and target.name.startswith("relax.call_tir"):
        target = call.args[0]
    return module[target] if isinstance(target, tvm.ir.GlobalVar) and target in module.functions else None


def attention(
    bb: relax.BlockBuilder,
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    sinks: relax.Expr | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    chunk: int = 0,
) -> relax.Var:
    """Causal attention of one sequence: softmax(scale · q kᵀ) v, row by row.

    q [n, h, d], k [n, g, d], v [n, g, e], sinks [h] -> [n, h, e] in q's dtype; head i reads group i // (h / g); float32
    inside. `softcap` c > 0 replaces a score s by c · tanh(s / c). Token i sees j ≤ i; of those, with `window` w > 0
    only i - j < w, with `chunk` c > 0 only i // c = j // c. A sink is one more score of its head, which takes
    weight and gives no value.
    """

    def meaning(emit, q, k, v, sinks=None):
        n, h = q.ty.shape[0], int(q.ty.shape[1])
        repeats = h // int(k.ty.shape[1])
        if repeats > 1:
            k, v = emit(R.repeat(k, repeats, axis=1)), emit(R.repeat(v, repeats, axis=1))
        q, k, v = (emit(R.permute_dims(_cast(emit, x, "float32"), [1, 0, 2])) for x in (q, k, v))
        scores = emit(R.matmul(q, emit(R.permute_dims(k, [0, 2, 1]))))
        scores = emit(R.multiply(scores, _f32(scale)))
        if softcap:
            scores = emit(R.multiply(emit(R.tanh(emit(R.divide(scores, _f32(softcap))))), _f32(softcap)))
        token = emit(R.arange(0, n, 1, "int64"))
        i, j = emit(R.expand_dims(token, 1)), emit(R.expand_dims(token, 0))
        seen = emit(R.less_equal(j, i))
        if window:
            near = emit(R.less(emit(R.subtract(i, j)), relax.const(window, "int64")))
            seen = emit(R.logical_and(seen, near))
        if chunk:
            i, j = (emit(R.floor_divide(x, relax.const(chunk, "int64"))) for x in (i, j))
            seen = emit(R.logical_and(seen, emit(R.equal(i, j))))
        scores = emit(R.where(seen, scores, _f32(MASKED)))
        if sinks is not None:
            sink = emit(R.reshape(_cast(emit, sinks, "float32"), [h, 1, 1]))
            scores = emit(R.concat([scores, emit(R.broadcast_to(sink, [h, n, 1]))], axis=-1))
        weights = emit(R.nn.softmax(scores, -1))
        if sinks is not None:
            weights = emit(R.strided_slice(weights, [2], [0], [n], assume_inbound=True))
        out = emit(R.permute_dims(emit(R.matmul(weights, v)), [1, 0, 2]))
        return _cast(emit, out, dtype)

    dtype = q.ty.dtype
    operands = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    parameters = {"scale": float(scale), "softcap": float(softcap), "window": int(window), "chunk": int(chunk)}
    return emit_op(bb, "attention", operands, meaning, **parameters)


def expert_linear(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    w: relax.Expr,
    ids: relax.Expr,
    bias: relax.Expr | None = None,
    *,
    transposed: bool = False,
) -> relax.Var:
    """A linear layer whose weight is picked by an index, row by row: x[s] w[ids[s]]ᵀ + bias[ids[s]].

    x [s, i], w [e, o, i] (or [e, i, o] if `transposed`), ids [s] int, bias [e, o] -> [s, o] in x's dtype; summed in
    float32 and rounded once.
    """

    def meaning(emit, x, w, ids, bias=None):
        picked = emit(R.take(w, ids, axis=0))
        if not transposed:
            picked = emit(R.permute_dims(picked, [0, 2, 1]))
        y = emit(R.matmul(emit(R.expand_dims(x, 1)), picked, out_dtype="float32"))
        y = emit(R.squeeze(y, [1]))
        if bias is not None:
            y = emit(R.add(y, _cast(emit, emit(R.take(bias, ids, axis=0)), "float32")))
        return _cast(emit, y, dtype)

    dtype = x.ty.dtype
    operands = {"x": x, "w": w, "ids": ids} | ({} if bias is None else {"bias": bias})
    return emit_op(bb, "expert_linear", operands, meaning, transposed=bool(transposed))


def emit_op(
    bb: relax.BlockBuilder,
    name: str,
    operands: dict[str, relax.Expr],
    meaning: Callable[..., relax.Expr],
    **parameters: float,
) -> relax.Var:
    """Emit a call of the semantic op `name` on `operands`; equal ops of a module share one function.

    meaning(emit, **operands) is called with fresh variables and returns the result. Every symbolic dimension of an
    operand becomes a variable of the op's own: a shape such as n · 2 would define none in a signature.
    """
    inner = relax.BlockBuilder()
    dimensions: list[tuple[tirx.PrimExpr, tirx.Var]] = []

    def own(dimension):
        if isinstance(dimension, tirx.IntImm):
            return dimension
        for outer, variable in dimensions:
            if tvm_ffi.structural_equal(outer, dimension):
                return variable
        dimensions.append((dimension, tirx.Var(f"n{len(dimensions)}", "int64")))
        return dimensions[-1][1]

    params = {
        key: relax.Var(key, relax.TensorType([own(d) for d in value.ty.shape], value.ty.dtype))
        for key, value in operands.items()
    }
    with inner.function(name, list(params.values()), private=True, attrs={OP: name, **parameters}):
        with inner.dataflow():
            out = inner.emit_output(inner.normalize(meaning(inner.emit, **params)))
        inner.emit_func_output(out)
    return bb.emit(relax.Call(bb.add_func(inner.get()[name], name), list(operands.values())))


def _cast(emit, x: relax.Expr, dtype: str) -> relax.Expr:
    return x if x.ty.dtype == dtype else emit(R.astype(x, dtype))


def _f32(value: float) -> relax.Expr:
    return relax.const(value, "float32")
