"""What the last stage asks of a kind of machine: its kernels, how weights lie for them, and the rules for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tvm
from tvm import relax

from llmc.ir.quantized import Format

from .rows.program import Program

__all__ = ["Backend", "Params", "Weight", "backend", "label"]

Weight = str | Format  # how a weight is stored: a dtype of floats, or the format of a quantized one

Params = Sequence[tuple[str, Sequence[int | str], str]]  # of a kernel: name, shape (a str is symbolic), dtype


class Backend(Protocol):
    """The kernels of one target. Each is one PrimFunc that is scheduled; its arguments are those of its module's
    docstring (codegen/cpu/…), in that order, whatever the machine.

    `weight` is a dtype of floats, or the Format of a quantized weight: CompileError where the machine has no kernel
    for it. `packed` are the tensors that `pack` gives: one for floats, what the kernel reads for a format. Kernels over
    formats are those of each room's quantized.py, which take `format=` for `weight=`.
    """

    @property
    def activations(self) -> tuple[str, ...]:
        """Dtypes that products take and give, float32 first."""

    @property
    def mixes(self) -> bool:
        """Whether products read a weight of any dtype as well as one of the activations' dtype."""

    @property
    def invariant(self) -> bool:
        """Whether every kernel takes its sums in one order, whatever else is in the step; else each says, see
        `invariance`."""

    def pack(
        self, emit: Callable, parts: Sequence[relax.Expr], columns: int, depth: int, weight: Weight
    ) -> list[relax.Expr]:
        """A weight [..., columns, depth] as the kernels of this machine read it, in plain Relax ops.

        parts: the weight itself, or what its format says that it is made of. -> the tensors that are stored.
        """

    def matmul(
        self, columns: int, depth: int, *, weight: Weight, activation: str, out: str, rounded: int | None = None
    ) -> tvm.tirx.PrimFunc:
        """y [n, columns] out = x [n, depth] activation @ W^T, W packed: matmul(x, *packed, y).

        rounded: the kernel rounds x itself, as round_activation(x, group=rounded) does; None: x is taken as it is.
        """

    def expert_linear(
        self,
        experts: int,
        columns: int,
        depth: int,
        *,
        weight: Weight,
        activation: str,
        ids: str,
        bias: str | None,
        rounded: int | None = None,
    ) -> tvm.tirx.PrimFunc:
        """y[s] = x[s] @ W[ids[s]]^T + bias[ids[s]]: expert_linear(x, *packed, ids, (bias,) y); rounded as of matmul."""

    def take(self, rows: int, depth: int, *, weight: Weight, out: str, ids: str) -> tvm.tirx.PrimFunc:
        """y[i] = W[ids[i]] of a packed weight [rows, depth]: take(*packed, ids, y)."""

    def append_pages(self, **made: Any) -> tvm.tirx.PrimFunc:
        """The kernel of llmc.ir.paging.append_pages(**made)."""

    def paged_attention(self, **made: Any) -> tvm.tirx.PrimFunc | None:
        """The kernel of llmc.ir.paging.paged_attention(**made); None: its loops may run as they stand."""

    def copy_pages(self, page: tuple[int, ...], dtype: str) -> tvm.tirx.PrimFunc:
        """Page to[i] becomes a copy of page from[i], in place: copy_pages(pages, from, to)."""

    def sample(self, vocab: int) -> tvm.tirx.PrimFunc | None:
        """tokens [m] drawn from logits [m, vocab]; None where the runtime draws them from its own memory:
        sample(logits, temperature, top_k, top_p, min_p, uniforms, tokens)."""

    def row_kernel(self, program: Program, name: str, params: Params) -> tvm.tirx.PrimFunc:
        """The kernel of a program of one token's values; params: its inputs, then its outputs."""

    def fits(self, program: Program, tensors: int) -> bool:
        """Whether a row kernel of this program may take so many tensors, inputs and outputs together."""

    def legalize_target(self) -> tvm.target.Target:
        """TVM's name of the machine, under which ops that are left are lowered."""

    def schedule(self, module: tvm.IRModule) -> tvm.IRModule:
        """Kernels that TVM's rules made, ready to be built for this machine."""


def activation_dtype(machine: Backend, dtype: str) -> str:
    """The dtype in which a product takes or gives what the program says is `dtype`."""
    return dtype if dtype in machine.activations else machine.activations[0]


def label(weight: Weight, rounded: int | None = None) -> str:
    """How a weight is stored, as it stands in a kernel's name: "bfloat16", "int4_g32", "int8_a8"."""
    return str(weight).replace("-", "_") + ("" if rounded is None else "_a8")


def backend(target: Any) -> Backend:
    """The kernels for a target of `llmc.targets`."""
    if target.kind == "cpu":
        from .cpu.backend import CpuBackend

        return CpuBackend(target)
    if target.kind == "plain":
        from .plain.reference import PlainBackend

        return PlainBackend(target)  # type: ignore[return-value]  # a part of it: see there
    from .gpu.backend import GpuBackend

    return GpuBackend(target)
