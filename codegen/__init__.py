"""Emission: from the ragged form to kernels, to a shared library, and the weights that go with it.

lowered = codegen.lower(ragged, goal)
codegen.build(lowered, goal.target, folder / "lib" / codegen.library_name(goal.target))
with WeightsWriter(path, codegen.weight_specs(lowered.recipes)) as writer:
    codegen.write_weights(lowered.recipes, imported.weights, writer)
"""

from .library import build, library_name, sources_name
from .pipeline import KERNELS, Lowered, lower, lowered
from .plain import reference
from .weights import weight_specs, write_weights

__all__ = [
    "KERNELS",
    "Lowered",
    "build",
    "library_name",
    "lower",
    "lowered",
    "reference",
    "sources_name",
    "weight_specs",
    "write_weights",
]
