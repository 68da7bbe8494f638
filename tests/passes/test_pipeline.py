"""The whole textbook stage on a whole model."""

import numpy as np
import pytest

from llmc.passes import manager
from llmc.passes.goal import Goal
from llmc.passes.pipeline import PIPELINE
from tests import textbook


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}, {"sinks": True, "chunk": 4}], ids=str)
def test_textbook_stage_keeps_the_logits(options):
    imported = textbook.llama(**options)
    result = manager.run(imported, Goal(), stages=PIPELINE[:1], check="pass")
    # The same float32 operations on the same numbers in the same order: no tolerance.
    np.testing.assert_array_equal(textbook.logits(result.module, 9), textbook.logits(imported, 9))
