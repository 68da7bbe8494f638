"""Evaluate recipes: checkpoint weights in, packed weights out, a slice of rows at a time.

A recipe is a Relax function over checkpoint weights. It is read here as a program over rows of axis 0: `rows(x, a, b)`
asks its operands for the rows it needs and no more, so that memory does not grow with the model. Whole tensors are only
asked for where an op needs them, and then a checkpoint tensor is a view of its file.

bfloat16 is carried as its bits in uint16, which numpy moves fast, and becomes ml_dtypes' where an op computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tvm
from tvm import relax

from llmc.ir.errors import CompileError
from llmc.ir.evaluate import evaluate
from llmc.ir.rewrite import bindings, op_name

__all__ = ["Recipe", "numpy_dtype", "weight_specs", "write_weights"]

SLICE_BYTES = 32 << 20  # of a result; an op in between may hold a few of these


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a tensor dtype's name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def weight_specs(recipes: Mapping[str, relax.Function]) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype) of every recipe's result: what a writer needs to know beforehand."""
    return {name: _type(function) for name, function in recipes.items()}


def write_weights(
    recipes: Mapping[str, relax.Function],
    sources: Mapping,
    writer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Evaluate every recipe into the writer's arrays.

    sources: name -> tensor with shape, dtype and read(start, stop) -> rows. writer: a runtime.artifact.WeightsWriter
    made with weight_specs(recipes). progress(bytes done, bytes in all) is called after every slice. Raises CompileError
    where a source is missing or has another shape or dtype than its recipe was made for, before anything is written.
    """
    made = {name: Recipe(function, sources) for name, function in recipes.items()}
    total, done = sum(r.nbytes for r in made.values()), 0
    for name, recipe in made.items():
        target, start = writer[name], 0
        for rows in recipe.slices():
            if rows.ndim:
                target[start : start + len(rows)] = rows.view(target.dtype)
                start += len(rows)
            else:
                target[...] = rows.view(target.dtype)
            done += rows.nbytes
            if progress is not None:
                progress(done, total)
        writer.done(name)


class Recipe:
    """A recipe over its sources: shape, dtype, and rows on demand.

    Raises CompileError where a source is missing or has another shape or dtype than the recipe was made for.
    """

    def __init__(self, function: relax.Function, sources: Mapping):
        names = [str(n) for n in function.attrs["llmc.sources"]]
        self.function = function
        self.values = {b.var: b.value for b in bindings(function)}
        self.sources = {}
        for param, name in zip(function.params, names, strict=True):
            shape, dtype = _type(param)
            if name not in sources:
                raise CompileError(f"the weight {name!r} is needed and the checkpoint has none of that name")
            found = sources[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise CompileError(
                    f"weight {name!r}: expected {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}"
                )
            self.sources[param] = found
        self.shape, self.dtype = _type(function)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize

    def slices(self, size: int = SLICE_BYTES) -> Iterator[np.ndarray]:
        """The result, as contiguous slices of rows of about `size` bytes."""
        if not self.shape:
            yield np.ascontiguousarray(self.whole(self.function.body.body))
            return
        count = max(1, size * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], count):
            rows = self.rows(self.function.body.body, start, min(start + count, self.shape[0]))
            yield np.ascontiguousarray(rows)

    def whole(self, x: relax.Expr) -> np.ndarray:
        """All of a value: of a checkpoint tensor and what only views it, a view of its file."""
        if isinstance(x, tvm.ir.GenericConst):
            return _carried(x.value.numpy())
        if x in self.sources:
            return _carried(self.sources[x].read())
        value = self._value(x)
        if op_name(value) == "permute_dims":
            return self.whole(value.args[0]).transpose(_axes(value))
        shape, _ = _type(x)
        if not shape:
            return self._fallback(value)
        return self.rows(x, 0, shape[0])

    def rows(self, x: relax.Expr, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of axis 0 of a value."""
        if isinstance(x, tvm.ir.GenericConst):
            return _carried(x.value.numpy()[start:stop])
        if x in self.sources:
            return _carried(self.sources[x].read(start, stop))
        value = self._value(x)
        rule = _RULES.get(op_name(value) or "")
        found = rule(self, x, value, start, stop) if rule else None
        if found is None:
            found = self._fallback(value)[start:stop]
        return found

    def _value(self, x):
        value = self.values[x]
        while isinstance(value, relax.Var) and value in self.values:
            value = self.values[value]
        if isinstance(value, relax.Var):  # a source under another name
            return relax.op.permute_dims(value, list(range(len(value.ty.shape))))
        return value

    def _fallback(self, value) -> np.ndarray:
        """Any op, by reference evaluation on whole operands."""
        builder = relax.BlockBuilder()
        params: list[relax.Var] = []
        args: list[np.ndarray] = []

        def open(a):
            if isinstance(a, relax.Tuple):
                return relax.Tuple([open(f) for f in a.fields])
            if isinstance(a, relax.Var) and not isinstance(a.ty, relax.TupleType):
                params.append(relax.Var(f"x{len(params)}", a.ty))
                args.append(np.asarray(_numbers(self.whole(a), _type(a)[1]), order="C"))  # keeps no axes as they are
                return params[-1]
            return a

        if isinstance(value, relax.TupleGetItem):
            inner = self._value(value.tuple_value)
            call = relax.Call(inner.op, [open(a) for a in inner.args], inner.attrs, inner.ty_args)
        else:
            call = relax.Call(value.op, [open(a) for a in value.args], value.attrs, value.ty_args)
        with builder.function("main", params):
            out = builder.emit(call)
            if isinstance(value, relax.TupleGetItem):
                out = builder.emit(relax.TupleGetItem(out, value.index))
            builder.emit_func_output(out)
        return _carried(evaluate(builder.get(), args))


def _type(x) -> tuple[tuple[int, ...], str]:
    ty = x.ret_ty if isinstance(x, relax.Function) else x.ty
    return tuple(int(d) for d in ty.shape), str(ty.dtype)


def _carried(array: np.ndarray) -> np.ndarray:
    """The array, or its bits where it holds bfloat16."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array as numbers of its dtype."""
    return array.view(numpy_dtype(dtype)) if dtype == "bfloat16" else array


def _axes(value) -> list[int]:
    rank = len(value.args[0].ty.shape)
    axes = value.attrs.axes
    return [int(a) % rank for a in axes] if axes is not None else list(range(rank))[::-1]


def _permute(recipe, x, value, start, stop):
    axes = _axes(value)
    if axes[0] == 0:
        found = recipe.rows(value.args[0], start, stop)
        together = found.dtype.itemsize * found.shape[-1]
        if axes[-1] == len(axes) - 1 and found.shape[-1] > 1 and together in (4, 8) and found.flags.c_contiguous:
            # What stays together moves as one number: a pair of bfloat16 takes a third of the time of two.
            wide = found.view(f"uint{8 * together}")[..., 0].transpose(axes[:-1])
            return np.ascontiguousarray(wide)[..., None].view(found.dtype)
        return found.transpose(axes)
    return recipe.whole(value.args[0]).transpose(axes)[start:stop]


def _reshape(recipe, x, value, start, stop):
    (old, _), (new, _) = _type(value.args[0]), _type(x)
    if old and old[0] % new[0] == 0 and old[0]:
        k = old[0] // new[0]
        return recipe.rows(value.args[0], start * k, stop * k).reshape(stop - start, *new[1:])
    if old and old[0] and new[0] % old[0] == 0:
        k = new[0] // old[0]
        first = start // k
        rows = recipe.rows(value.args[0], first, -(-stop // k))
        return rows.reshape(-1, *new[1:])[start - first * k : stop - first * k]
    return recipe.whole(value.args[0]).reshape(new)[start:stop]


def _concat(recipe, x, value, start, stop):
    axis, parts = value.attrs.axis, value.args[0].fields
    rank = len(x.ty.shape)
    if axis is None:
        return None
    if int(axis) % rank:
        return np.concatenate([recipe.rows(p, start, stop) for p in parts], int(axis))
    found, offset = [], 0
    for p in parts:
        length = int(p.ty.shape[0])
        lo, hi = max(start - offset, 0), min(stop - offset, length)
        if lo < hi:
            found.append(recipe.rows(p, lo, hi))
        offset += length
    return found[0] if len(found) == 1 else np.concatenate(found)


def _pad(recipe, x, value, start, stop):
    """nn.pad with a constant; widths as (before, after) of each axis."""
    if str(value.attrs.pad_mode) != "constant":
        return None
    widths = np.array([int(w) for w in value.attrs.pad_width]).reshape(-1, 2)
    length = int(value.args[0].ty.shape[0])
    lo, hi = (min(max(i - widths[0, 0], 0), length) for i in (start, stop))
    inner = recipe.rows(value.args[0], lo, hi)
    before = min(max(widths[0, 0] - start, 0), stop - start)
    widths[0] = before, stop - start - before - len(inner)
    fill = float(value.attrs.pad_value)
    return np.pad(inner, widths, constant_values=np.array(fill).astype(inner.dtype)) if widths.any() else inner


def _strided_slice(recipe, x, value, start, stop):
    """Slices of constant bounds that leave axis 0 whole."""
    if len(value.args) < 4 or not all(isinstance(a, relax.Tuple) for a in value.args[1:]):
        return None
    axes, begin, end, *strides = ([int(f.value) for f in a.fields] for a in value.args[1:])
    rank = len(x.ty.shape)
    cut = [slice(None)] * rank
    for i, axis in enumerate(axes):
        cut[axis % rank] = slice(begin[i], end[i], strides[0][i] if strides else 1)
    if cut[0] != slice(None):
        return None
    return recipe.rows(value.args[0], start, stop)[tuple(cut)]


def _astype(recipe, x, value, start, stop):
    numbers = _numbers(recipe.rows(value.args[0], start, stop), _type(value.args[0])[1])
    return _carried(numbers.astype(numpy_dtype(_type(x)[1])))


def _elementwise(function):
    def rule(recipe, x, value, start, stop):
        shape, dtype = _type(x)

        def operand(a):
            own, _ = _type(a)
            by_row = len(own) == len(shape) and own[0] == shape[0]
            return _numbers(recipe.rows(a, start, stop) if by_row else recipe.whole(a), dtype)

        return _carried(function(*map(operand, value.args)).astype(numpy_dtype(dtype), copy=False))

    return rule


_RULES = {
    "permute_dims": _permute,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "concat": _concat,
    "strided_slice": _strided_slice,
    "nn.pad": _pad,
    "astype": _astype,
    "add": _elementwise(np.add),
    "subtract": _elementwise(np.subtract),
    "multiply": _elementwise(np.multiply),
    "negative": _elementwise(np.negative),
    "bitwise_and": _elementwise(np.bitwise_and),
    "bitwise_or": _elementwise(np.bitwise_or),
    "left_shift": _elementwise(np.left_shift),
    "right_shift": _elementwise(np.right_shift),
}
