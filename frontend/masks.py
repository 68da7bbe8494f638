"""What a layer's attention mask is: evaluated at real lengths and named, never taken on trust.

transformers hands every layer a mask function, not a class. The exported graph therefore computes the mask as a
tensor program of the length and the positions; here that program is run on sampled rows, at lengths past the largest
window or chunk of the config and up to the longest context, and what comes out is compared with the known classes.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmc.ir.errors import SourceError

torch.library.define("llmc::query_rows", "(SymInt n) -> Tensor")
CELLS = 1 << 22  # of a sampled mask: rows x keys; bounds the memory of an evaluation
HIDDEN = -1e4  # an additive mask hides a score by this much or more
FULL, LONGEST = 72, 1 << 18  # up to here all rows are looked at; no length beyond this one is


@torch.library.impl("llmc::query_rows", "CompositeExplicitAutograd")
def _all_rows(n: int) -> torch.Tensor:
    return torch.arange(n)


@torch.library.register_fake("llmc::query_rows")
def _fake_rows(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.int64)


@dataclass(frozen=True)
class Mask:
    """A class of mask. kind: causal, window (of `size` tokens), chunked, prefix (of `size` tokens), bidirectional."""

    kind: str
    size: int = 0

    def first_and_last(self, rows: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the last token that each of `rows` sees in a sequence of n."""
        zero, end = torch.zeros_like(rows), torch.full_like(rows, n - 1)
        if self.kind == "window":
            return (rows - self.size + 1).clamp(min=0), rows
        if self.kind == "chunked":
            return rows // self.size * self.size, rows
        if self.kind == "prefix":
            return zero, rows.clamp(min=self.size - 1).minimum(end)
        return zero, end if self.kind == "bidirectional" else rows


def classify(samples: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> Mask | None:
    """The class that fits all samples (n, rows [r], seen [r, n] bool), or None.

    A class fits if every row sees exactly the tokens that the class says.
    """
    spans = []
    for n, rows, seen in samples:
        first, count = seen.int().argmax(dim=1), seen.sum(dim=1)
        last = first + count - 1
        inside = torch.arange(n)
        gapless = (inside >= first[:, None]) & (inside <= last[:, None])
        if bool((count == 0).any()) or not torch.equal(gapless, seen):
            return None
        spans.append((n, rows, first, last))
    for mask in _candidates(spans):
        if all(
            torch.equal(first, want_first) and torch.equal(last, want_last)
            for n, rows, first, last in spans
            for want_first, want_last in [mask.first_and_last(rows, n)]
        ):
            return mask
    return None


def _candidates(spans) -> Iterable[Mask]:
    yield Mask("causal")
    yield Mask("bidirectional")
    for _, rows, first, last in spans:
        cut = first > 0
        if bool(cut.any()):
            yield Mask("window", int((rows - first + 1)[cut][0]))
            yield Mask("chunked", int(first[cut].min()))
        ahead = last > rows
        if bool(ahead.any()):
            yield Mask("prefix", int(last[ahead].max()) + 1)


def lengths(sizes: Iterable[int], max_context: int) -> list[int]:
    """The lengths at which a mask is looked at: short ones, one past two of each size, the longest context."""
    longest = min(max_context, LONGEST)
    wanted = {1, 2, 17, 64, FULL, *(2 * s + 3 for s in sizes), longest}
    return sorted(n for n in wanted if n <= longest)


def sampled_rows(n: int, sizes: Iterable[int]) -> torch.Tensor:
    """Rows of a mask of length n that tell the classes apart: all if they are few, else those around every edge."""
    if n <= FULL:
        return torch.arange(n)
    edges = {0, n, *(m * s for s in sizes for m in (1, 2)), n // 2, n // 3}
    wanted = {e + d for e in edges for d in (-2, -1, 0, 1)} | set(range(0, n, max(1, n // 16)))
    rows = sorted(r for r in wanted if 0 <= r < n)
    step = max(1, -(-len(rows) * n // CELLS))
    return torch.tensor(sorted({*rows[::step], n - 1}))


def mask_of(program: torch.export.ExportedProgram, node: fx.Node, sizes: Iterable[int], max_context: int) -> Mask:
    """The class of the mask that `node` of an exported program computes. SourceError if it has none."""
    sizes = sorted({s for s in sizes if s > 0})
    samples = []
    for n in lengths(sizes, max_context):
        rows = sampled_rows(n, sizes)
        value = _evaluate(program, node, n, rows)
        if value.device.type == "meta":
            raise SourceError(
                "expected an attention mask that depends on length and positions only, found one that depends on the "
                "tokens or on weights (sparse or learned attention): not supported"
            )
        samples.append((n, rows, _seen(value, len(rows), n)))
    mask = classify(samples)
    if mask is None:
        raise SourceError(
            "expected a causal, window, chunked, prefix or bidirectional attention mask, found one that fits none: "
            f"of {samples[-1][0]} tokens, the last sees {int(samples[-1][2][-1].sum())}"
        )
    return mask


def _seen(value: torch.Tensor, rows: int, n: int) -> torch.Tensor:
    """A mask as it comes, boolean or additive, [..., rows or 1, n], equal in all heads, as booleans [rows, n]."""
    if value.dtype != torch.bool:
        shown, hidden = value == 0, value <= HIDDEN
        if not bool((shown | hidden).all()):
            raise SourceError(
                "expected an attention mask that only hides scores, found one that adds to them (ALiBi or a learned "
                "bias): not supported"
            )
        value = shown
    value = value.expand(*value.shape[:-2], rows, n).reshape(-1, rows, n)
    if not bool((value == value[:1]).all()):
        raise SourceError("expected one attention mask for all heads, found heads with masks of their own")
    return value[0]


def _evaluate(program: torch.export.ExportedProgram, node: fx.Node, n: int, rows: torch.Tensor) -> torch.Tensor:
    """The value of a node at length n and positions 0 … n-1, its query rows cut down to `rows`.

    Tokens and parameters are tensors without data: what depends on them comes out as one.
    """
    inputs = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    constants = {**program.constants, **dict(program.named_buffers())}
    values: dict[fx.Node, Any] = {}

    def placeholder(x: fx.Node):
        if x.name == "position_ids":
            return torch.arange(n, dtype=torch.int32)[None]
        if inputs.get(x.name) in constants:
            return constants[inputs[x.name]]
        example = x.meta["val"]
        shape = [n if isinstance(d, torch.SymInt) else d for d in example.shape]
        return torch.empty(shape, dtype=example.dtype, device="meta")

    order, stack = [], [node]
    needed = set()
    while stack:
        x = stack.pop()
        if x not in needed:
            needed.add(x)
            stack.extend(x.all_input_nodes)
    order = [x for x in program.graph.nodes if x in needed]
    for x in order:
        if x.op == "placeholder":
            values[x] = placeholder(x)
        elif x.op == "get_attr":
            values[x] = operator.attrgetter(x.target)(program.graph_module)
        elif x.target is torch.ops.llmc.query_rows.default:
            values[x] = rows
        else:
            args, kwargs = fx.map_arg((x.args, x.kwargs), values.__getitem__)
            values[x] = x.target(*args, **kwargs)
    return values[node]
