"""Everything that happens to one token between matrix products and attention becomes a few kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import op as R

from llmc.ir.errors import CompileError
from llmc.ir.rewrite import Rewriter, bindings, needed_by, op_name

from .backend import backend
from .rows import values as V
from .rows.naming import region_name
from .rows.program import Program
from .rows.rules import RULES
from .rows.types import Row, Unsupported, row_of
from .rows.values import Memory, NoView, Scalar, Value
from .weight_only import leaves, variables

__all__ = ["FuseRows"]


@dataclass(frozen=True)
class FuseRows:
    """Ops that work on one token at a time are gathered between those that don't, one kernel for each stretch.

        a = add(x, y); s = mean(multiply(a, a)); b = multiply(a, rsqrt(s)); q = matmul(b, w)
        ->
        a, b = call_tir(add_rms_norm, (x, y)); q = matmul(b, w)

    A value's level is the largest number of other ops (products, attention) on a path to it; ops of one level and one
    kind of tokens form a region, or several where a kernel of the target can't take that many tensors. Keeps: the
    values, but for the order of sums along a row and for roundings to half precision inside a region, which are left
    out. Leaves alone: ops that mix tokens, and those without a rule: they are legalized.
    """

    name: str = "fuse_rows"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        kernels: dict = {}
        for function in ("embed", "step"):
            module = _Fuse(module, function, backend(goal.target), kernels).run()
        return module


@dataclass
class _Region:
    """Bindings of one level over one kind of tokens."""

    level: int
    tokens: str
    members: list = field(default_factory=list)


class _Fuse(Rewriter):
    def __init__(self, module, function, machine, kernels):
        super().__init__(module, function)
        self.machine, self.kernels = machine, kernels
        self.order = list(bindings(self.old))
        self.defined = {b.var: b for b in self.order}
        self.rowwise_so_far: set = set()
        self.rowwise = {b.var for b in self.order if self._is_rowwise(b)}
        self._return_uniform()
        self._partition()
        self.memory: dict = {}  # variable -> the new expression that holds its elements, token by token

    # Which ops

    def _is_rowwise(self, b) -> bool:
        """The binding has a rule, and the rule takes it."""
        if isinstance(b, relax.MatchCast):
            return False
        value = b.value
        if isinstance(value, relax.TupleGetItem) or (isinstance(value, relax.Var) and row_of(value.ty)):
            found = bool(variables(value)) and all(x in self.rowwise_so_far for x in variables(value))
            return found and self._accept(b.var)
        if op_name(value) not in RULES:
            return False
        try:
            out = _rows_of(b.var.ty)
            self._check_tokens(value, out)
            program = Program()
            env: dict[relax.Var, Value | list[Memory]] = {}
            for x in variables(value):
                rows = _rows_of(x.ty)
                if isinstance(rows, list):
                    if x not in self.rowwise_so_far:
                        raise Unsupported("a tuple that another op made")
                    env[x] = [Memory.whole(program.new_input(r.dtype, r.size), r.shape) for r in rows]
                else:
                    if x not in self.rowwise_so_far and not rows.major:
                        raise Unsupported("a tensor whose tokens don't lie one after the other")
                    env[x] = Memory.whole(program.new_input(rows.dtype, rows.size), rows.shape)
            found = _interpret(program, b, env, {})
            for f, o in zip(found, out, strict=True) if isinstance(out, list) else [(found, out)]:
                if f.shape != o.shape:
                    raise Unsupported(f"{f.shape} is not {o.shape}")
        except (Unsupported, NoView, ValueError):
            return False
        return self._accept(b.var)

    def _accept(self, var) -> bool:
        self.rowwise_so_far.add(var)
        return True

    def _check_tokens(self, value, out) -> None:
        kinds = {r.tokens.name for r in (out if isinstance(out, list) else [out]) if r.tokens is not None}
        operands = list(leaves(value.args))
        if op_name(value) == "take":
            operands = operands[1:]
        for x in operands:
            row = row_of(x.ty) if isinstance(x, (relax.Var, tvm.ir.GenericConst)) else None
            if isinstance(x, relax.Var) and row is None and not isinstance(x.ty, relax.TupleType):
                raise Unsupported("a tensor of unknown or many symbolic dimensions")
            if row is not None and row.tokens is not None:
                kinds.add(row.tokens.name)
        if len(kinds) > 1:
            raise Unsupported(f"tokens of two kinds: {kinds}")

    def _return_uniform(self) -> None:
        """A value that is no token's, and that an op outside reads, is not worth a region."""
        for b in reversed(self.order):
            if b.var not in self.rowwise:
                for x in variables(b.value):
                    if x in self.rowwise and _tokens(x) is None:
                        self._return(x)
        for x in leaves([self.old.body.body]):
            if x in self.rowwise and _tokens(x) is None:
                self._return(x)

    def _return(self, x) -> None:
        self.rowwise.discard(x)
        for y in variables(self.defined[x].value):
            if y in self.rowwise and _tokens(y) is None:
                self._return(y)

    # Which regions

    def _partition(self) -> None:
        self.level: dict = {}
        self.regions: dict[tuple[int, str], _Region] = {}
        self.region_of: dict = {}
        self.users: dict = {}
        for b in self.order:
            for x in variables(b.value):
                self.users.setdefault(x, []).append(b)
            inputs = [self.level.get(x, 0) for x in variables(b.value)]
            level = max(inputs, default=0)
            if b.var not in self.rowwise:
                self.level[b.var] = level + 1
                continue
            tokens = _tokens(b.var)
            if op_name(b.value) == "take":
                source = b.value.args[0]
                if source in self.rowwise and _tokens(source) is not None:
                    level = max(level, self.level[source] + 1)
            self.level[b.var] = level
            if tokens is not None:
                region = self.regions.setdefault((level, tokens), _Region(level, tokens))
                region.members.append(b)
                self.region_of[b.var] = region

    # The new function

    def run(self, into=None):
        params = list(self.old.params)
        attrs = {k: v for k, v in dict(self.old.attrs).items() if k != "global_symbol"}
        name = f"{self.function}_rewritten"
        self.memory |= {p: p for p in params}
        with self.builder.function(name, params, attrs=attrs):
            with self.builder.dataflow():
                for level in range(max(self.level.values(), default=0) + 1):
                    for b in self.order:
                        if b.var not in self.rowwise and self.level[b.var] == level:
                            self._outside(b)
                    for region in self.regions.values():
                        if region.level == level:
                            self._emit_region(region)
                out = self.builder.emit_output(self.get(self.old.body.body))
            self.builder.emit_func_output(out)
        module = self.builder.get()
        function = module[name]
        del module[name]
        module[self.function] = function.with_attr("global_symbol", self.function)
        return module

    def _outside(self, b) -> None:
        if isinstance(b, relax.MatchCast):
            self.new[b.var] = self.builder.match_cast(self.get(b.value), b.ty)
        else:
            self.new[b.var] = self.emit(self.again(b.value), b.var.name)
        self.memory[b.var] = self.new[b.var]

    def get(self, x):
        """The new expression of an old variable, in its old type."""
        if isinstance(x, relax.Var) and x not in self.new and x in self.memory:
            self.new[x] = self._typed(x, self.memory[x])
        return super().get(x)

    def _typed(self, x, held):
        if tvm_ffi.structural_equal(held.ty, x.ty):
            return held
        row = _row(x.ty)
        if row.axis is None or row.major:
            return self.emit(R.reshape(held, x.ty.shape), x.name)
        before, after = row.shape[: row.axis], row.shape[row.axis :]
        spread = self.emit(R.reshape(held, [row.tokens, *before, *after]))
        axes = [*range(1, row.axis + 1), 0, *range(row.axis + 1, len(row.shape) + 1)]
        return self.emit(R.reshape(self.emit(R.permute_dims(spread, axes)), x.ty.shape), x.name)

    def _emit_region(self, region: _Region) -> None:
        made = _Build(self, region)
        aliases, outputs = made.aliases, made.outputs
        if not self.machine.fits(made.program, len(made.inputs) + len(outputs)):
            self._emit_halves(region)
            return
        for var, source in aliases.items():
            self.memory[var] = self.memory[source] if isinstance(source, relax.Var) else source
        if not outputs:
            return
        args = [self.memory[x] if isinstance(x, relax.Var) else x for x in made.inputs]
        types = [_held_type(var.ty, row) for var, row in outputs.items()]
        kernel = self._kernel(made, args, types)
        call = R.call_tir(kernel, args, types if len(types) > 1 else types[0])
        name = next(iter(outputs)).name
        result = self.emit(call, name)
        for i, var in enumerate(outputs):
            self.memory[var] = result if len(types) == 1 else self.emit(relax.TupleGetItem(result, i), var.name)
        for var, first in made.doubles.items():
            self.memory[var] = self.memory[first]

    def _emit_halves(self, region: _Region) -> None:
        """A region with more tensors than a kernel takes: one kernel after the other, through memory."""
        members = region.members
        tensors = [i for i, b in enumerate(members) if not isinstance(b.var.ty, relax.TupleType)]
        if len(tensors) < 2:
            names = ", ".join(dict.fromkeys(op_name(b.value) or "tuple" for b in members))
            raise CompileError(f"{names}: more tensors than a kernel of this target takes; compile for cpu", op=names)
        cut = tensors[len(tensors) // 2]
        first, second = members[:cut], members[cut:]
        # Tuples don't lie in memory: who reads one makes it again.
        needed = needed_by([b.var for b in second], {b.var: b.value for b in second})
        again = [b for b in first if isinstance(b.var.ty, relax.TupleType) and b.var in needed]
        for part in (first, again + second):
            self._emit_region(_Region(region.level, region.tokens, part))

    def _kernel(self, made, args, types):
        params = []
        for i, a in enumerate(args):
            params.append((f"x{i}", _symbolic(a.ty, made.tokens), str(a.ty.dtype)))
        for i, ty in enumerate(types):
            params.append((f"y{i}", _symbolic(ty, made.tokens), str(ty.dtype)))
        key = (made.program.key(), tuple(params))
        if key not in self.kernels:
            name = region_name(made.bindings)
            kernel = self.machine.row_kernel(made.program, name, params).without_attr("global_symbol")
            self.kernels[key] = self.builder.add_func(kernel.with_attr("op_pattern", 8), name)
        return self.kernels[key]


class _Build:
    """A region's program: inputs (variables and constants), outputs (variable -> Row), and what is only a name."""

    def __init__(self, fuse: _Fuse, region: _Region):
        self.fuse, self.program = fuse, Program()
        self.inputs: list = []
        self.slots: dict = {}
        self.outputs: dict = {}
        self.aliases: dict = {}
        self.doubles: dict = {}
        self.copied: dict = {}  # contents of a value, and the dtype they are kept in -> the variable that has them
        self.bindings = region.members
        self.tokens = _token_variable(region.members[0].var)
        members = {b.var for b in region.members}
        env: dict = {}
        self.env = env
        written: dict = {}  # number of an output -> its variable
        for b in region.members:
            for x in variables(b.value):
                if x not in env:
                    env[x] = self._external(x, members)
            value = _interpret(self.program, b, env, self._constants())
            users = fuse.users.get(b.var, [])
            inside = sum(u.var in members for u in users)
            outside = inside < len(users) or any(b.var.same_as(x) for x in leaves([fuse.old.body.body]))
            if outside and not isinstance(value, list):
                value = self._output(b.var, value, written)
            elif inside > 1 and not isinstance(value, list):
                value = self.program.settled(value)
            env[b.var] = value

    def _output(self, var, value: Value, written: dict) -> Value:
        row = _row(var.ty)
        if isinstance(value, Memory) and value.is_row and value.slot.dtype == row.dtype:
            if value.slot.kind == "input":
                self.aliases[var] = self.inputs[value.slot.number]
                return value
            if value.slot.kind == "output":
                self.doubles[var] = written[value.slot.number]
                return value
        first = self.copied.setdefault((V.contents(value), row.dtype), var)
        if first is not var:  # written out already under another shape: the angles, for every layer
            self.doubles[var] = first
            return value
        written[len(self.outputs)] = var
        self.outputs[var] = row
        return self.program.output(value, row.dtype)

    def _external(self, x, members):
        """A variable from outside the region: memory; or a value that is no token's, computed on the spot."""
        fuse = self.fuse
        if x in fuse.rowwise and _tokens(x) is None:
            b = fuse.defined[x]
            for y in variables(b.value):
                if y not in self.env:
                    self.env[y] = self._external(y, members)
            return _interpret(self.program, b, self.env, self._constants())
        row = _row(x.ty)
        return Memory.whole(self._slot(x, row), row.shape)

    def _slot(self, x, row: Row):
        held = self.fuse.memory[x] if isinstance(x, relax.Var) else x
        if held not in self.slots:
            self.slots[held] = self.program.new_input(row.dtype, row.size if row.tokens is not None else 0)
            self.inputs.append(x)
        return self.slots[held]

    def _constants(self):
        return lambda constant, row: Memory.whole(self._slot(constant, row), row.shape)


def _interpret(program: Program, b, env: dict, constants):
    """The value of a binding; operands are in `env`, constants(constant, row) places a constant tensor."""
    value = b.value

    def operand(x):
        if isinstance(x, relax.Tuple):
            pairs = [operand(f) for f in x.fields]
            return [v for v, _ in pairs], [r for _, r in pairs]
        if isinstance(x, relax.Var):
            return env[x], _rows_of(x.ty)
        if isinstance(x, tvm.ir.GenericConst):
            return _constant(program, x, constants)
        return None, None

    if isinstance(value, relax.Var):
        return env[value]
    if isinstance(value, relax.TupleGetItem):
        return env[value.tuple_value][value.index]
    # Numbers and shapes among the arguments are read from the call by the rules that know them.
    found = [operand(a) for a in value.args]
    args, rows = [v for v, _ in found if v is not None], [r for _, r in found if r is not None]
    name = op_name(value)
    assert name in RULES, f"{name} in a region"
    return RULES[name](program, value, args, rows, _rows_of(b.var.ty))


def _constant(program, x, constants):
    data = x.value.numpy()
    row = Row(tuple(data.shape), str(x.ty.dtype))
    if data.size == 1:
        return Scalar(row.shape, row.dtype, data.reshape(()).item()), row
    if callable(constants):
        return constants(x, row), row
    return Memory.whole(program.new_input(row.dtype, 0), row.shape), row


def _rows_of(ty):
    """The Row of a tensor type, or of every field of a tuple type; Unsupported where there is none."""
    if isinstance(ty, relax.TupleType):
        return [_rows_of(f) for f in ty.fields]
    return _row(ty)


def _row(ty) -> Row:
    """The Row of a tensor type; Unsupported where it has none."""
    row = row_of(ty)
    if row is None:
        raise Unsupported("a tensor of unknown or many symbolic dimensions")
    return row


def _token_variable(x):
    ty = x.ty
    while isinstance(ty, relax.TupleType):
        ty = ty.fields[0]
    row = row_of(ty)
    return row.tokens if row else None


def _tokens(x) -> str | None:
    """The kind of tokens that a row value belongs to."""
    variable = _token_variable(x)
    return variable.name if variable is not None else None


def _held_type(ty, row: Row) -> relax.TensorType:
    """The type under which a region's result is kept: its own where the tokens' parts lie one after the other."""
    whole = row.axis is not None and row.major and row.shape[row.axis] == 1
    return ty if whole else relax.TensorType([row.tokens, row.size], row.dtype)


def _symbolic(ty, tokens) -> tuple:
    """The shape of a kernel's parameter: the region's tokens are "n"."""
    row = row_of(ty)
    if row is None:
        return tuple(f"d{i}" for i in range(len(ty.shape)))
    if row.axis is None or row.tokens is None:
        return row.shape
    stem = "n" if row.tokens.same_as(tokens) else f"other_{row.tokens.name}"
    times = row.shape[row.axis]
    return tuple((stem if times == 1 else f"{stem}_{times}") if i == row.axis else d for i, d in enumerate(row.shape))
