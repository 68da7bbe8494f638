"""The order of the passes, as data: from what a door produced to the ragged form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import tvm

from llmc.ir import forms
from llmc.ir.ragged_form import check_ragged
from llmc.passes.cache_latent import CacheLatent
from llmc.passes.drop_batch_axis import DropBatchAxis
from llmc.passes.fuse_projections import FuseProjections
from llmc.passes.gather_logits import GatherLogits
from llmc.passes.goal import Goal
from llmc.passes.page_attention import PageAttention
from llmc.passes.prove_token_locality import ProveTokenLocality
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.raise_positions import RaisePositions
from llmc.passes.split_embedding import SplitEmbedding

__all__ = ["PIPELINE", "Pass", "Stage"]


class Pass(Protocol):
    """A small frozen dataclass with a name. A pass that does not apply returns the module unchanged."""

    @property
    def name(self) -> str: ...

    def run(self, module: tvm.IRModule, goal: Goal) -> tvm.IRModule: ...


@dataclass(frozen=True)
class Stage:
    """Passes that together bring a module into a form; `form` raises FormError where it is not in it."""

    name: str
    passes: tuple[Pass, ...]
    form: Callable[[tvm.IRModule], None]


PIPELINE: tuple[Stage, ...] = (
    Stage("textbook", (RaisePositions(), DropBatchAxis(), ProveTokenLocality()), forms.check_textbook),
    Stage("weights", (CacheLatent(), QuantizeWeights(), FuseProjections()), forms.check_textbook),
    Stage("ragged", (PageAttention(), SplitEmbedding(), GatherLogits(), ProveTokenLocality()), check_ragged),
)
