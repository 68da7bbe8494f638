"""Translation of single operators, against PyTorch."""

import numpy as np
import pytest
import torch

from llmc.frontend.importer import import_program
from llmc.ir.evaluate import evaluate

OF_INTEGERS = {
    "division": lambda positions: positions / 4,
    "division by a tensor": lambda positions: positions / (positions + 3),
    "scaling": lambda positions: positions * 0.3,
    "shifting": lambda positions: positions + 0.25,
    "logarithm": lambda positions: torch.log(positions + 1),
    "root": lambda positions: torch.sqrt(positions),
    "power": lambda positions: torch.pow(positions, 0.5),
    "floored": lambda positions: torch.floor(positions / 4),
    "truth": lambda positions: (positions > 2) * 0.5,
}


class OfPositions(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, tokens, positions):
        return self.function(positions).unsqueeze(-1)


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_floats_of_integers(name):
    module = OfPositions(OF_INTEGERS[name])
    example = torch.zeros(1, 5, dtype=torch.int32), torch.arange(5, dtype=torch.int32)[None]
    length = {1: torch.export.Dim("n", min=1)}
    program = torch.export.export(module, example, dynamic_shapes={"tokens": length, "positions": length}, strict=False)
    tokens, positions = np.zeros((1, 9), np.int32), np.arange(9, dtype=np.int32)[None]
    got = evaluate(import_program(program, {}, {}), [tokens, positions])
    want = module(torch.tensor(tokens), torch.tensor(positions)).numpy()
    assert got.dtype == want.dtype
    assert np.abs(got - want).max() < 1e-6
