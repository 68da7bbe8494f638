"""Fixtures of the codegen room."""

import pytest

from llmc import codegen, targets
from llmc.passes.goal import Goal
from llmc.runtime.artifact import WeightsWriter


class Array:
    """A checkpoint tensor that is an array."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, str(value.dtype)

    def read(self, start=0, stop=None):
        return self.value[start:stop] if self.shape else self.value


@pytest.fixture(scope="session")
def goal():
    return Goal(target=targets.detect(), page_size=4)


@pytest.fixture(scope="session")
def compiled(goal, tmp_path_factory):
    """compiled(model) -> (library, weights file, names of weights): what `machine.run` takes."""

    def build(model):
        folder = tmp_path_factory.mktemp("compiled")
        lowered = codegen.lower(model.module, goal)
        library = folder / codegen.library_name(goal.target)
        codegen.build(lowered, goal.target, library)
        sources = {k: Array(v) for k, v in model.weights.items()}
        with WeightsWriter(folder / "weights.safetensors", codegen.weight_specs(lowered.recipes)) as writer:
            codegen.write_weights(lowered.recipes, sources, writer)
        return library, folder / "weights.safetensors", lowered.weights

    return build
