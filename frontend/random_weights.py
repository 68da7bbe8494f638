"""Weights of a model that has a config and no checkpoint: described, never stored, for benchmarks."""

import zlib

import numpy as np

from llmc.frontend.weights import LazyTensor, numpy_dtype

BLOCK = 1 << 16  # numbers that are drawn for a tensor; its rows repeat them


class Drawn(LazyTensor):
    """A tensor of normally distributed numbers, the same for the same name: mean, and spread (standard deviation)."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, mean: float, spread: float):
        self.name, self.shape, self.dtype = name, shape, dtype
        self.mean, self.spread = mean, spread

    def _rows(self, start, stop):
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        numbers = np.random.default_rng(zlib.crc32(self.name.encode())).standard_normal(BLOCK, dtype=np.float32)
        return np.resize((self.mean + self.spread * numbers).astype(numpy_dtype(self.dtype)), shape)


def draw(model, dtype: str, spread: float) -> dict[str, LazyTensor]:
    """A tensor for every parameter of a model (torch.nn.Module, without its weights), as an untrained one has them.

    Matrices are normal with standard deviation `spread` and of `dtype`; vectors are 1 where they scale (a norm's
    weight) and 0 where they are added (a bias); what holds integers is 0.
    """
    found: dict[str, LazyTensor] = {}
    for name, parameter in model.named_parameters():
        shape, floats = tuple(parameter.shape), parameter.is_floating_point()
        matrix = floats and len(shape) > 1
        scale = floats and len(shape) == 1 and name.endswith("weight")
        own = dtype if floats else str(parameter.dtype).removeprefix("torch.")
        found[name] = Drawn(name, shape, own, 1.0 if scale else 0.0, spread if matrix else 0.0)
    return found
