"""A weight that its checkpoint stores in few bits: a lazy tensor of floats that gives its parts to those who ask."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmc.frontend.weights import LazyTensor, numpy_dtype
from llmc.ir.decode import decode
from llmc.ir.quantized import Format


class Computed(LazyTensor):
    """A tensor whose rows a function computes: rows(start, stop) -> [stop - start, *shape[1:]] of `dtype`."""

    def __init__(self, shape: Sequence[int], dtype: str, rows: Callable[[int, int], np.ndarray]):
        self.shape, self.dtype, self.compute = tuple(shape), dtype, rows

    def _rows(self, start, stop):
        return self.compute(start, stop)


class QuantizedTensor(LazyTensor):
    """A weight in few bits, as a tensor of what it stands for.

    parts: codes, scales and (if the format has them) zeros, as `Format` describes them, of a weight [..., o, i].
    order: int32 [i] or None. Column j of the parts belongs to input order[j]: a product takes its inputs in that order.
    turned: the parameter is [..., i, o], the transpose of what the parts say. shape: that of the parameter.
    dtype: the dtype that it stands for; read() gives its rows dequantized, rounded once to it.
    activation: the group of `round_activation` if products read their activation so, else None.

    Stacking and joining tensors of one format, and taking rows, give a QuantizedTensor, part by part. What parts
    cannot say (tensors of several formats or orders joined, rows of a transpose) gives a tensor of floats.
    ValueError: parts that do not fit the format.
    """

    def __init__(
        self,
        format: Format,
        parts: Mapping[str, LazyTensor],
        dtype: str,
        *,
        order: LazyTensor | None = None,
        activation: int | None = None,
        turned: bool = False,
    ):
        logical = tuple(parts["codes"].shape)
        found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
        if (expected := format.parts(logical)) != found:
            raise ValueError(f"expected the parts {expected}, found {found}")
        if order is not None and (order.shape, order.dtype) != (logical[-1:], "int32"):
            raise ValueError(f"expected an order int32 {list(logical[-1:])}, found {order.dtype} {list(order.shape)}")
        self.format, self.parts, self.dtype = format, dict(parts), dtype
        self.order, self.activation, self.turned = order, activation, turned
        self.shape = (*logical[:-2], logical[-1], logical[-2]) if turned else logical

    def turn(self) -> "QuantizedTensor":
        """The transpose of the last two axes; the parts stay as they are."""
        return self._with(self.parts, turned=not self.turned)

    def _with(self, parts: Mapping[str, LazyTensor], *, turned: bool | None = None) -> "QuantizedTensor":
        return QuantizedTensor(
            self.format,
            parts,
            self.dtype,
            order=self.order,
            activation=self.activation,
            turned=self.turned if turned is None else turned,
        )

    def _each(self, change: Callable[[LazyTensor], LazyTensor]) -> "QuantizedTensor":
        return self._with({name: change(part) for name, part in self.parts.items()})

    def _rows(self, start, stop):
        low, high = (0, None) if self.turned and self.ndim == 2 else (start, stop)
        weight = decode(self.format, *(part.read(low, high) for part in self.parts.values()))
        if self.order is not None:
            ordered, weight = weight, np.empty_like(weight)
            weight[..., self.order.read()] = ordered
        if self.turned:
            weight = weight.swapaxes(-1, -2)
            weight = weight[start:stop] if self.ndim == 2 else weight
        return weight.astype(numpy_dtype(self.dtype))

    def _alike(self, tensors: Sequence[LazyTensor]) -> bool:
        """Whether tensors can be put together part by part."""
        return self.order is None and all(
            isinstance(t, QuantizedTensor)
            and (t.format, t.dtype, t.activation, t.turned, t.order)
            == (self.format, self.dtype, self.activation, self.turned, None)
            for t in tensors
        )

    def _stack(self, tensors):
        if not self._alike(tensors):
            return super()._stack(tensors)
        return self._with({name: part._stack([t.parts[name] for t in tensors]) for name, part in self.parts.items()})

    def _join(self, tensors, dim):
        along = self._logical(dim)
        if along == self.ndim - 1 or not self._alike(tensors):
            return super()._join(tensors, dim)
        return self._with(
            {name: part._join([t.parts[name] for t in tensors], along) for name, part in self.parts.items()}
        )

    def _logical(self, dim: int) -> int:
        """The parts' axis for an axis of this tensor."""
        last = self.ndim - 1
        return {last: last - 1, last - 1: last}.get(dim, dim) if self.turned else dim

    def narrow(self, dim, start, stop):
        along = self._logical(dim % self.ndim)
        if along == self.ndim - 1:
            return super().narrow(dim, start, stop)
        return self._each(lambda part: part.narrow(along, start, stop))

    def _permuted(self, order):
        last = self.ndim - 1
        if order == [*range(last - 1), last, last - 1]:
            return self.turn()
        if self.turned or order[-1] != last:
            return super()._permuted(order)
        return self._each(lambda part: part._permuted(order))

    def _reshaped(self, shape):
        if self.turned or len(shape) < 2 or shape[-1] != self.shape[-1]:
            return super()._reshaped(shape)
        return self._each(lambda part: part._reshaped((*shape[:-1], part.shape[-1])))


def regroup(scales: LazyTensor, block: int, depth: int) -> tuple[LazyTensor, int]:
    """Scales [..., o, ceil(depth / block)] of blocks of columns -> (scales of groups that fill a row, their size).

    Where blocks do not fill a row, the group is the largest that divides both, and blocks' scales are repeated.
    """
    group = math.gcd(block, depth)
    if group == block:
        return scales, 0 if block == depth else block
    of_group = np.arange(depth // group) * group // block
    shape = (*scales.shape[:-1], len(of_group))
    repeated = Computed(shape, scales.dtype, lambda start, stop: scales.read(start, stop)[..., of_group])
    return repeated, 0 if group == depth else group
