"""Weights of a model without a checkpoint: what an untrained model has, the same at every reading."""

import numpy as np
from torch import nn

from llmc.frontend.random_weights import draw


def test_what_is_drawn():
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48))
    drawn = draw(model, "bfloat16", 0.02)
    assert set(drawn) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    weight = drawn["0.weight"]
    assert weight.shape == (48, 32) and weight.dtype == "bfloat16" and weight.read().dtype.name == "bfloat16"
    assert abs(weight.read().astype(np.float32).std() / 0.02 - 1) < 0.1
    assert np.array_equal(weight.read(0, 4), weight.read()[:4])
    assert (drawn["1.weight"].read() == 1).all()
    assert (drawn["0.bias"].read() == 0).all() and (drawn["1.bias"].read() == 0).all()
