"""Pages and weights travel as two tuples, so that a call has a dozen arguments whatever the depth."""

from __future__ import annotations

import json
from dataclasses import dataclass

import tvm
from tvm import relax, tirx

from llmc.ir.rewrite import Rewriter

from .backend import backend

__all__ = ["AddCopyPages", "BundleArguments"]


@dataclass(frozen=True)
class BundleArguments:
    """Pages and weights become tuples.

        step(hidden, ..., k_pages_0, v_pages_0, w0, w1)
        -> step(hidden, ..., pages: (k_pages_0, v_pages_0), weights: (w0, w1))

    Keeps everything; only the signature changes.
    """

    name: str = "bundle_arguments"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        pages = sum(len(group["tensors"]) for group in json.loads(str(module["step"].attrs["llmc.state"])))
        module = _Bundle(module, "embed", 0).run()
        return _Bundle(module, "step", pages).run()


class _Bundle(Rewriter):
    def __init__(self, module, function, pages):
        super().__init__(module, function)
        self.pages = pages

    def params(self, old):
        count = int(self.old.attrs["num_input"])
        bundles = {"pages": old[count - self.pages : count], "weights": old[count:]}
        if not self.pages:
            del bundles["pages"]
        self.fields: dict[relax.Var, tuple[relax.Var, int]] = {}
        new = old[: count - self.pages]
        for name, members in bundles.items():
            bundle = relax.Var(name, relax.TupleType([m.ty for m in members]))
            self.fields |= {m: (bundle, i) for i, m in enumerate(members)}
            new.append(bundle)
        return new

    def attrs(self, old):
        return {k: v for k, v in old.items() if k != "num_input"}

    def get(self, x):
        if isinstance(x, relax.Var) and x in self.fields and x not in self.new:
            bundle, index = self.fields[x]
            self.new[x] = self.emit(relax.TupleGetItem(bundle, index), x.name)
        return super().get(x)


@dataclass(frozen=True)
class AddCopyPages:
    """Adds copy_pages_{g}(source [k] i32, target [k] i32, pages: Tuple) for every group of pages.

    Page target[i] of every tensor of the group becomes a copy of page source[i].

    Keeps every other function.
    """

    name: str = "add_copy_pages"

    def run(self, module: tvm.IRModule, goal) -> tvm.IRModule:
        step = module["step"]
        groups = json.loads(str(step.attrs["llmc.state"]))
        builder, machine = relax.BlockBuilder(module), backend(goal.target)
        for g, group in enumerate(groups):
            count, number = tirx.Var("k", "int64"), tirx.Var("p", "int64")
            source, target = (relax.Var(s, relax.TensorType([count], "int32")) for s in ("source", "target"))
            types = [relax.TensorType([number, *t["shape"]], t["dtype"]) for t in group["tensors"]]
            pages = relax.Var("pages", relax.TupleType(types))
            with builder.function(f"copy_pages_{g}", [source, target, pages]):
                with builder.dataflow():
                    done = []
                    for i, (tensor, ty) in enumerate(zip(group["tensors"], types, strict=True)):
                        kernel = machine.copy_pages(tuple(tensor["shape"]), tensor["dtype"])
                        kernel = builder.add_func(kernel.without_attr("global_symbol"), "copy_pages")
                        pool = builder.emit(relax.TupleGetItem(pages, i))
                        done.append(builder.emit(relax.op.call_tir_inplace(kernel, [pool, source, target], 0, ty)))
                    out = builder.emit_output(relax.Tuple(done))
                builder.emit_func_output(out)
        return builder.get()
