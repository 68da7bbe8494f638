"""Which weights are quantized and how; and their parts, encoded as they are read."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmc.ir.driver import numpy_dtype
from llmc.ir.errors import CompileError
from llmc.passes import schemes as registry
from llmc.passes.schemes import Scheme, Stored
from llmc.passes.weight_uses import Use, weight_uses
from llmc.spill import Spill

__all__ = ["Choice", "EncodedWeights", "Plan", "parse", "plan", "plan_of", "prepare", "schemes"]

# Products smaller than this stay as they are: there is nothing to gain.
SMALLEST, NARROWEST = 1 << 14, 32  # weights, and columns
CHUNK = 1 << 20  # weights that a thread encodes at a time
SLICE = 16 << 20  # weights that are encoded before they are written to a file
KEPT = 256 << 20  # bytes of scales and zero points that wait for their recipes


def schemes() -> list[str]:
    """Names of the quantization schemes that `quantize=` takes."""
    return registry.names()


@dataclass(frozen=True)
class Choice:
    """What `quantize=` says: the scheme of products, and that of embedding and output head (None: as they are).

    budget: bits a weight, to be spent by measured damage (refinement.py); until it is, all weights have one scheme.
    """

    name: str
    body: Scheme
    head: Scheme | None
    budget: float | None = None


def parse(text: str) -> Choice:
    """ "int4-g64:head=int8" -> Choice. CompileError for what is no scheme, or no such option.

    Without `:head=` the embedding and the head get int8 where the body has fewer than 8 bits, else the body's scheme.
    "auto:4.5" is a budget of bits a weight in all: scales, embedding and head included.
    """
    name, *options = text.split(":")
    if name == "auto":
        return Choice(text, registry.parse("int4"), registry.parse("int4"), _budget(text, options))
    body = registry.parse(name)
    head: Scheme | None = body if body.format(128).bits == 8 else registry.parse("int8")
    for option in options:
        key, equals, value = option.partition("=")
        if key != "head" or not equals or len(options) > 1:
            raise CompileError(
                f"quantize={text!r}: expected a scheme, or a scheme and :head=SCHEME or :head=none for embedding and "
                f"output head; found {option!r}"
            )
        head = None if value == "none" else registry.parse(value)
    return Choice(text, body, head)


def _budget(text: str, options: list[str]) -> float:
    try:
        (bits,) = map(float, options)
    except ValueError:
        bits = math.nan
    if not 1 <= bits <= 16:
        raise CompileError(f"quantize={text!r}: expected auto: and bits a weight, such as auto:4.5; found {text!r}")
    return bits


@dataclass(frozen=True)
class Plan:
    """The scheme of every weight that is quantized, and why the other matrices are not.

    name: as asked for, or how the checkpoint was quantized. transposed: weights whose parameter lies as [..., i, o].
    """

    name: str = ""
    schemes: dict[str, Scheme] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def facts(self, weights: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
        """For the manifest: bits a weight over all matrices, weights by format, what products round activations to, and
        what stays as it is, and why.

        weights: the model's, by name. used: names of the weights and parts that the compiled programs take.
        """
        bits, count, kept = 0.0, 0, dict(self.kept)
        formats: dict[str, list[str]] = {}
        rounded: set[str] = set()
        for name, weight in weights.items():
            if len(weight.shape) < 2 or "float" not in weight.dtype:
                continue
            size, own = math.prod(weight.shape), float(_BITS[weight.dtype])
            if f"{name}:codes" in used:
                depth = weight.shape[-2 if name in self.transposed else -1]
                format = self.schemes[name].format(depth)
                own = format.bits_per_weight(depth)
                bits += 32 * depth if f"{name}:inverse_scale" in used else 0
                formats.setdefault(str(format), []).append(name)
                rounded |= {format.rounds} if self.schemes[name].rounding(depth) is not None else set()
                kept.pop(name, None)
            elif name in self.schemes:
                kept[name] = "no product reads it row by row"
            bits, count = bits + size * own, count + size
        reasons: dict[str, list[str]] = {}
        for name, reason in kept.items():
            reasons.setdefault(reason, []).append(name)
        return {
            "scheme": self.name,
            "bits_per_weight": round(bits / max(count, 1), 3),
            "formats": formats,
            "activations": sorted(rounded),
            "kept": reasons,
        }


_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16}


def plan(imported: Any, choice: Choice, *, smallest: int | None = None, narrowest: int | None = None) -> Plan:
    """The plan for a model in floats: what every weight is used for decides.

    smallest, narrowest: weights and columns of the smallest product that is quantized; default: SMALLEST and NARROWEST.
    CompileError where nothing can be quantized.
    """
    smallest = SMALLEST if smallest is None else smallest
    narrowest = NARROWEST if narrowest is None else narrowest
    found: dict[str, Scheme] = {}
    kept: dict[str, str] = {}
    uses = weight_uses(imported.module)
    for name, use in uses.items():
        scheme = choice.head if use.roles & {"head", "embedding"} else choice.body
        reason = _why_not(use, smallest, narrowest) or ("asked for" if scheme is None else _misfit(use, scheme))
        if reason or scheme is None:
            kept[name] = reason
        else:
            found[name] = scheme
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3])
        raise CompileError(f"quantize={choice.name!r}: expected weights to quantize, found none ({why}, …)")
    return Plan(choice.name, found, kept, frozenset(n for n, use in uses.items() if use.transposed))


def _why_not(use: Use, smallest: int, narrowest: int) -> str:
    """Why a weight stays as it is; empty where it need not."""
    if use.other:
        return f"read by {use.other}"
    if not use.roles or "table" in use.roles:
        return "a table of positions" if use.roles else "not read by a product"
    if "router" in use.roles:
        return "picks experts"
    if use.rows[-2] < narrowest or use.rows[-1] < narrowest or math.prod(use.rows[-2:]) < smallest:
        return f"smaller than {smallest} weights or {narrowest} columns"
    return ""


def _misfit(use: Use, scheme: Scheme) -> str:
    try:
        scheme.format(use.rows[-1])
    except ValueError as error:
        return str(error)
    return ""


def stored_plan(imported: Any) -> Plan:
    """The plan for a checkpoint that is quantized already: as it is, wherever products read its rows."""
    uses = weight_uses(imported.module)
    found: dict[str, Scheme] = {}
    kept, transposed = {}, set()
    for name, weight in imported.quantized.items():
        use = uses.get(name)
        if use is None or not use.roles or use.other:
            kept[name] = f"read by {use.other}" if use and use.other else "not read by a product"
        elif use.transposed != weight.turned:
            kept[name] = "its groups run across its rows"
        elif weight.order is not None and use.roles - {"product", "head", "router"}:
            kept[name] = "its columns have an order of their own"
        else:
            own = Stored(str(weight.format), weight.activation, weight.order is not None, stored=weight.format)
            found[name] = own
            transposed |= {name} if use.transposed else set()
    names = sorted({scheme.name for scheme in found.values()})
    return Plan("checkpoint: " + ", ".join(names), found, kept, frozenset(transposed))


def prepare(imported: Any, quantize: str | None) -> Any:
    """The imported model with the weights that `quantize` asks for, or that its checkpoint has, as EncodedWeights."""
    if imported.quantized:
        if quantize is not None:
            name, weight = next(iter(imported.quantized.items()))
            raise CompileError(
                f"quantize={quantize!r}: expected a model in floats, found a checkpoint that is quantized already "
                f"({name}: {weight.format}): leave quantize out to compile it as it is, or take the model in floats"
            )
        return replace(imported, weights=EncodedWeights(imported.weights, stored_plan(imported)))
    if quantize is None:
        return imported
    return replace(imported, weights=EncodedWeights(imported.weights, plan(imported, parse(quantize))))


def plan_of(imported: Any) -> Plan:
    """The plan that `prepare` made; an empty one where nothing is quantized."""
    return getattr(imported.weights, "plan", Plan())


class EncodedWeights(Mapping):
    """A model's weights by name, and NAME:codes, NAME:scales, … of those that a plan quantizes.

    Parts are encoded when they are read, a chunk of rows at a time. Scales and zero points that come with codes are
    kept until they are read too (KEPT bytes of them at most; beyond, they are encoded again). A weight with `parts` of
    its own (a quantized checkpoint's, or one that was calibrated) gives these.

    importance: weight -> [depth], what an error of each input's weight counts.
    spill: where a weight is put, encoded, as soon as any of it is read: for who reads it more than once.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        plan: Plan,
        importance: Mapping[str, np.ndarray] | None = None,
        spill: Spill | None = None,
    ):
        self.weights, self.plan, self.importance, self.spill = weights, plan, importance or {}, spill
        self.waiting: OrderedDict[str, _Encoding | _Spilled] = OrderedDict()

    def __getitem__(self, name: str) -> Any:
        if name in self.weights:
            return self.weights[name]
        base, _, part = name.rpartition(":")
        if base not in self.plan.schemes:
            raise KeyError(name)
        weight = vars(self.weights[base])
        if isinstance(weight.get("parts"), Mapping):
            return weight[part] if part in ("order", "inverse_scale") else weight["parts"][part]
        return _Part(self.encoding(base), part)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def kinds(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """part -> (shape, dtype) of a weight that the plan quantizes."""
        *others, o, i = self.weights[name].shape
        shape = (*others, i, o) if name in self.plan.transposed else (*others, o, i)
        return self.plan.schemes[name].format(shape[-1]).parts(shape)

    def encoding(self, name: str) -> _Encoding | _Spilled:
        """The encoding of a weight; of those that were used longest ago, what they keep is dropped."""
        if name not in self.waiting:
            source = self.weights[name]
            source = _Turned(source) if name in self.plan.transposed else source
            encoding = _Encoding(source, self.plan.schemes[name], self.importance.get(name))
            self.waiting[name] = encoding if self.spill is None else _Spilled(encoding, self.spill, name)
        self.waiting.move_to_end(name)
        while len(self.waiting) > 1 and sum(e.nbytes for e in self.waiting.values()) > KEPT:
            self.waiting.popitem(last=False)
        return self.waiting[name]


class _Turned:
    """A weight with its last two axes swapped."""

    def __init__(self, whole: Any):
        self.whole, self.dtype = whole, whole.dtype
        self.shape = (*whole.shape[:-2], whole.shape[-1], whole.shape[-2])

    def read(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 3:
            return self.whole.read(start, stop).swapaxes(1, 2)
        return self.whole.read().T[start:stop]


class _Encoding:
    """One weight's parts: codes when they are read, the small ones kept from then on."""

    def __init__(self, source: Any, scheme: Scheme, importance: np.ndarray | None):
        self.source, self.scheme, self.importance = source, scheme, importance
        self.kinds = scheme.format(source.shape[-1]).parts(tuple(source.shape))
        self.small: dict[str, np.ndarray] = {}
        self.known = np.zeros(source.shape[0], bool)  # rows whose small parts are there

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.small.values())

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if name == "codes":
            codes = np.empty((stop - start, *self.source.shape[1:]), np.uint8)
            self.encode(start, stop, codes)
            return codes
        missing = np.flatnonzero(~self.known[start:stop])
        if missing.size:
            self.encode(start + int(missing[0]), start + int(missing[-1]) + 1, None)
        return self.small[name][start:stop]

    def encode(self, start: int, stop: int, codes: np.ndarray | None) -> None:
        """Rows start:stop: codes into an array, small parts into those that are kept."""
        for name, (shape, dtype) in self.kinds.items():
            if name != "codes" and name not in self.small:
                self.small[name] = np.empty(shape, numpy_dtype(dtype))
        step = max(1, CHUNK // math.prod(self.source.shape[1:]))
        starts = range(start, stop, step)

        def one(at: int) -> None:
            end = min(at + step, stop)
            rows = np.asarray(self.source.read(at, end)).astype(np.float32)
            parts = self.scheme.encode(rows.reshape(-1, rows.shape[-1]), self.importance)
            if codes is not None:
                codes[at - start : end - start] = parts["codes"].reshape(rows.shape)
            for name, kept in self.small.items():
                kept[at:end] = parts[name].reshape(kept[at:end].shape)
            self.known[at:end] = True

        if len(starts) == 1:
            one(start)
        else:
            list(_threads().map(one, starts))


class _Spilled:
    """One weight's parts in a file, encoded when the first of them is read."""

    nbytes = 0  # of memory

    def __init__(self, encoding: _Encoding, spill: Spill, name: str):
        self.encoding, self.spill, self.name, self.kinds = encoding, spill, name, encoding.kinds
        self.parts: dict[str, np.ndarray] | None = None

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if self.parts is None:
            self.parts = self.spill.find(self.name, self.kinds) or self.spill.write(
                self.name, self.kinds, self.pieces()
            )
        return self.parts[name][start:stop]

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """All of the weight: codes slice by slice, then what came with them."""
        (count, *one), _ = self.kinds["codes"]
        step = max(1, SLICE // math.prod(one))
        for start in range(0, count, step):
            yield "codes", start, self.encoding.read("codes", start, min(start + step, count))
        for name, part in self.encoding.small.items():
            yield name, 0, part
        self.encoding.small.clear()


class _Part:
    """A part as a source of recipes."""

    def __init__(self, encoding: _Encoding | _Spilled, name: str):
        self.encoding, self.name = encoding, name
        self.shape, self.dtype = encoding.kinds[name]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.encoding.read(self.name, start, self.shape[0] if stop is None else min(stop, self.shape[0]))


_POOL: list[ThreadPoolExecutor] = []


def _threads() -> ThreadPoolExecutor:
    """As many threads as there are cores (numpy lets them run side by side); OMP_NUM_THREADS says otherwise."""
    if not _POOL:
        _POOL.append(ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)))
    return _POOL[0]
