"""The ragged form: many sequences share one token axis, attention reads and writes a paged cache.

    embed(tokens [n] i32, *weights) -> hidden [n, w]
    step(hidden [n, w], positions [1, n] i32, qo_indptr [b1] i32, logit_rows [m] i32,
         kv_indptr_g [b1] i32, kv_indices_g [r_g] i32, kv_last_page_len_g [b] i32    for each group g,
         pages [p_g, *page] for each tensor of each group, *weights) -> logits [m, vocab] f32

The attribute llmc.state of step is a JSON list of groups: {"kind": "paged", "page_size", "window", "chunk", "layers",
"tensors": [{"name", "shape" (of a page), "dtype"}]}.
"""

from __future__ import annotations

import json

import tvm
from tvm import relax, tirx

from llmc.ir.errors import FormError
from llmc.ir.forms import check_function, check_inputs, check_well_formed, expect_tensor, length_of
from llmc.ir.ops import attributes_of, op_of
from llmc.ir.paging import APPEND_PAGES, PAGED_ATTENTION
from llmc.ir.rewrite import bindings, dtype_of, op_name, variables

__all__ = ["TABLES", "check_ragged"]

FLOATS = ("float32", "float16", "bfloat16")
TABLES = ("kv_indptr", "kv_indices", "kv_last_page_len")  # of each group


def check_ragged(module: tvm.IRModule) -> None:
    """Raises FormError (expected, found, where) unless the module is in the ragged form.

    Beside the signatures: every pool is appended to exactly once, in place; what attention reads is the appended pool,
    never the parameter, by the tables of its group, and within its group's window and chunk. That tokens stay apart is
    proven by a pass of the stage, not here.
    """
    check_well_formed(module)
    embed = check_function(module, "ragged", "embed")
    check_inputs(embed, "ragged", "embed", 1)
    step = check_function(module, "ragged", "step")
    groups = check_state(step)
    hidden = check_signature(step, groups)
    n = length_of(embed.params[0].ty, 0)
    expect_tensor(embed.params[0].ty, "int32", [n], "ragged", "parameter tokens of embed")
    expect_tensor(embed.ret_ty, dtype_of(hidden), [n, int(hidden.ty.shape[1])], "ragged", "the result of embed")
    for b in bindings(embed):
        if op_of(module, b.value) not in (None, "dequantize"):
            raise _wrong(f"plain lookups in embed, found {op_of(module, b.value)}")
    _PoolUse(module, step, groups).check()


def check_state(step: relax.Function) -> list[dict]:
    """The state groups of step."""
    if "llmc.state" not in step.attrs:
        raise _wrong("the attribute llmc.state on step, found none")
    groups = json.loads(str(step.attrs["llmc.state"]))
    keys = {"kind", "page_size", "window", "chunk", "layers", "tensors"}
    for g, group in enumerate(groups):
        if set(group) != keys or group["kind"] != "paged":
            raise _wrong(f"{sorted(keys)} of a paged group in llmc.state, found {group} as {g}")
    reaches = [(group["window"], group["chunk"]) for group in groups]
    if len(set(reaches)) != len(reaches):
        raise _wrong(f"one group for each window and chunk, found {reaches}")
    return groups


def check_signature(step: relax.Function, groups: list[dict]) -> relax.Var:
    """Names, order, dtypes and shapes of step's parameters and result; returns hidden."""
    tensors = [(g, t) for g, group in enumerate(groups) for t in group["tensors"]]
    names = ["hidden", "positions", "qo_indptr", "logit_rows"]
    names += [f"{name}_{g}" for g in range(len(groups)) for name in TABLES]
    names += [t["name"] for _, t in tensors]
    check_inputs(step, "ragged", "step", len(names))
    found = [p.name for p in step.params[: len(names)]]
    if found != names:
        where = next(i for i, (a, b) in enumerate(zip(names, found, strict=True)) if a != b)
        raise _wrong(f"{names[where]} as parameter {where} of step, found {found[where]}")
    params = dict(zip(names, step.params, strict=False))
    n, b1, m = (length_of(params[name].ty, axis) for name, axis in (("hidden", 0), ("qo_indptr", 0), ("logit_rows", 0)))
    hidden = params["hidden"]
    expected: dict[str, tuple[str | tuple[str, ...], list]] = {"hidden": (FLOATS, [n, "width"])}
    expected |= {"positions": ("int32", [1, n])}
    expected |= {"qo_indptr": ("int32", [b1]), "logit_rows": ("int32", [m])}
    for g in range(len(groups)):
        sizes = [b1, *(length_of(params[f"{name}_{g}"].ty, 0) for name in TABLES[1:])]
        expected |= {f"{name}_{g}": ("int32", [size]) for name, size in zip(TABLES, sizes, strict=True)}
    for _, t in tensors:
        expected[t["name"]] = (t["dtype"], [length_of(params[t["name"]].ty, 0), *t["shape"]])
    for name, (dtype, shape) in expected.items():
        expect_tensor(params[name].ty, dtype, shape, "ragged", f"parameter {name} of step")
    expect_tensor(step.ret_ty, "float32", [m, "vocab"], "ragged", "the result of step")
    return hidden


def _wrong(what: str) -> FormError:
    return FormError(f"ragged form: expected {what}")


class _PoolUse:
    """How step uses its pools and tables."""

    def __init__(self, module: tvm.IRModule, step: relax.Function, groups: list[dict]):
        self.module, self.groups = module, groups
        self.params = {p.name: p for p in step.params}
        self.bound = {b.var: b.value for b in bindings(step)}
        self.result = step.body.body
        self.group_of = {self.params[t["name"]]: g for g, group in enumerate(groups) for t in group["tensors"]}
        self.written: dict[relax.Var, list[relax.Var]] = {}  # what an append is bound to -> its pools
        self.appended: dict[relax.Var, relax.Var] = {}  # a pool after its append -> the pool
        self.attended: list[tuple[int, list[relax.Var]]] = []  # group and pools of every attention

    def check(self) -> None:
        for var, value in self.bound.items():
            op = op_of(self.module, value)
            if op == "attention":
                raise _wrong(f"attention over pages, found attention over a sequence ({var.name})")
            if op == APPEND_PAGES:
                self.check_append(var, value)
            elif op == PAGED_ATTENTION:
                self.check_attention(var, value)
            elif isinstance(value, relax.TupleGetItem) and value.tuple_value in self.written:
                self.appended[var] = self.written[value.tuple_value][value.index]
            else:
                self.check_other(var, value)
        if variables(self.result) & self.pools:
            raise _wrong("logits as the result of step, found pages")
        used = [pool for _, pools in self.attended for pool in pools]
        for pool in self.group_of:
            if pool not in used:
                raise _wrong(f"{pool.name} to be appended to and attended over, found it unused")
            if used.count(pool) > 1:
                raise _wrong(f"one attention over {pool.name}, found {used.count(pool)}")
        for g, group in enumerate(self.groups):
            found = sum(of == g for of, _ in self.attended)
            if found != len(group["layers"]):
                raise _wrong(f"an attention for each of layers {group['layers']} of group {g}, found {found}")

    @property
    def pools(self) -> set[relax.Var]:
        """Every variable that stands for pages."""
        return set(self.group_of) | set(self.written) | set(self.appended)

    def check_append(self, var: relax.Var, call: relax.Call) -> None:
        where = f"in append_pages ({var.name})"
        *pools, _ = list(call.args[1].fields)[:-4]
        tables = list(call.args[1].fields)[-4:]
        for pool in pools:
            if pool not in self.group_of:
                raise _wrong(f"a parameter of pages, found {pool} {where}")
            if pool in self.appended.values():
                raise _wrong(f"one append to {pool.name}, found another {where}")
            self.check_tables(tables, self.group_of[pool], where)
        self.written[var] = pools
        if len(pools) == 1:
            self.appended[var] = pools[0]

    def check_attention(self, var: relax.Var, call: relax.Call) -> None:
        where = f"in paged_attention ({var.name})"
        args = list(call.args[1].fields)
        attrs = attributes_of(self.module, call)
        each = 2 if "cache" in self.module[call.args[0]].attrs else 1  # pages, and scales where they are quantized
        pages = args[1 : 1 + (each if int(attrs["v_width"]) else 2 * each)]
        for x in pages:
            if x in self.group_of:
                raise _wrong(f"pages after their append, found {x.name} as it came {where}")
            if x not in self.appended:
                raise _wrong(f"appended pages, found {x} {where}")
        for i in range(0, len(pages), each):
            together = [self.appended[x] for x in pages[i : i + each]]
            if not any(self.same(together, pools) for pools in self.written.values()):
                names = ", ".join(pool.name for pool in together)
                raise _wrong(f"pages with the scales of their append, found {names} {where}")
        group = {self.group_of[self.appended[x]] for x in pages}
        if len(group) != 1:
            raise _wrong(f"keys and values of one group, found {sorted(group)} {where}")
        g = group.pop()
        self.check_tables(args[-4:], g, where)
        for name in ("window", "chunk", "page_size"):
            if int(attrs[name]) != self.groups[g][name]:
                raise _wrong(f"{name} {self.groups[g][name]} of group {g}, found {int(attrs[name])} {where}")
        self.attended.append((g, [self.appended[x] for x in pages]))

    @staticmethod
    def same(found: list[relax.Var], expected: list[relax.Var]) -> bool:
        return len(found) == len(expected) and all(a.same_as(b) for a, b in zip(found, expected, strict=True))

    def check_tables(self, found: list[relax.Expr], g: int, where: str) -> None:
        names = ["qo_indptr", *(f"{name}_{g}" for name in TABLES)]
        if len(found) != 4 or not all(self.params[name].same_as(x) for name, x in zip(names, found, strict=True)):
            raise _wrong(f"the tables {', '.join(names)}, found {', '.join(map(str, found))} {where}")

    def check_other(self, var: relax.Var, value: relax.Expr) -> None:
        kernel = (
            value.args[0] if isinstance(value, relax.Call) and (op_name(value) or "").startswith("call_tir") else None
        )
        if kernel is not None and isinstance(self.module.functions.get(kernel), tirx.PrimFunc):
            raise _wrong(f"Relax and semantic ops, found a call of {kernel} ({var.name})")
        touched = variables(value) & self.pools
        if touched:
            names = ", ".join(sorted(v.name for v in touched))
            raise _wrong(f"pages in semantic ops alone, found {names} in {op_name(value)} ({var.name})")
