"""An exported PyTorch program to Relax: TVM's importer with its gaps filled and every result checked.

What PyTorch says a node gives (dtype, rank, static dimensions) is what Relax must give: a wrong dtype is a cast away,
anything else is an error. Parameters are never copied: they become the function's parameters, in the dtype they are
stored in, cast to the dtype the model computes in.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.relax.frontend.torch import exported_program_translator as translator

from llmc.ir import ops
from llmc.ir.errors import SourceError

# PyTorch spells some operators twice.
ALIASES = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "absolute": "abs",
    "negative": "neg",
    "concatenate": "cat",
    "clip": "clamp",
}
# On numbers of 16 bits PyTorch computes these in float32 and rounds once; TVM would round at every step, and it sorts
# bfloat16 by its bits.
WIDE = {
    *("sum", "mean", "std", "var", "prod", "cumsum", "logsumexp", "linalg_vector_norm", "topk", "sort", "argsort"),
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "native_layer_norm", "group_norm"),
    *("sigmoid", "silu", "gelu", "tanh", "exp", "expm1", "log", "log1p", "softplus", "erf", "elu", "mish"),
    *("rsqrt", "sqrt", "pow", "cos", "sin", "reciprocal"),
}
# Of integers PyTorch gives floats in these, and makes floats of them first; TVM would compute with integers.
PROMOTES = WIDE | {"add", "sub", "rsub", "mul", "div", "addcmul", "lerp", "log2", "log10", "atan2", "square", "neg"}
CHECKS = ("_assert_tensor_metadata.default", "_assert_scalar.default", "_assert_async.msg", "_assert_async.default")


def import_program(
    program: torch.export.ExportedProgram, names: Mapping[str, str], dtypes: Mapping[str, str]
) -> tvm.IRModule:
    """The imported form of `program`, whose user inputs are tokens and positions.

    names: parameter of the program -> name of the weight; parameters with one name are one weight. dtypes: name of the
    weight -> dtype it is stored in. Weights that nothing uses are dropped.
    SourceError names the PyTorch operators that have no translation.
    """
    drop_checks(program)
    importer = Importer(program, names, dtypes)
    if _writes_in_place(program) or importer.missing():
        # Not core ATen: linear and silu stay whole. It traces the program anew, so only where there is a need.
        program = program.run_decompositions({})
        drop_checks(program)
        importer = Importer(program, names, dtypes)
    module = relax.transform.DeadCodeElimination(["main"])(importer.convert())
    main = module["main"]
    count = int(main.attrs["num_input"])
    used = {v.name for v in relax.analysis.free_vars(main.body)}
    inputs, weights = list(main.params)[:count], [p for p in list(main.params)[count:] if p.name in used]
    main = relax.Function([*inputs, *weights], main.body, main.ret_ty, main.is_pure, main.attrs)
    module["main"] = main.with_attr("llmc.weights", [p.name for p in weights])
    return module


def drop_checks(program: torch.export.ExportedProgram) -> None:
    """Erase assertions on shapes and dtypes: they keep dead masks alive and say nothing about values."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and node.target.__name__ in CHECKS:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _writes_in_place(program: torch.export.ExportedProgram) -> bool:
    schemas = [getattr(n.target, "_schema", None) for n in program.graph.nodes if n.op == "call_function"]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16', as Relax and numpy spell it ('bool' alike)."""
    return str(dtype).removeprefix("torch.")


class Importer(translator.ExportedProgramImporter):
    """TVM's importer of exported programs, for one program."""

    def __init__(self, program, names, dtypes):
        super().__init__()
        self.program, self.names, self.dtypes = program, names, dtypes
        self._numbers: dict[fx.Node, Any] = {}  # values of nodes that depend on no input, None of others
        for node in program.graph.nodes:
            untranslated = node.op == "call_function" and node.target.__name__ not in self.convert_map
            if untranslated and self._number(node) is not None:
                self.convert_map[node.target.__name__] = self.convert_number

    def missing(self) -> list[str]:
        """The operators of the program that have no translation."""
        called = {n.target.__name__ for n in self.program.graph.nodes if n.op == "call_function"}
        return sorted(called - set(self.convert_map))

    def convert(self) -> tvm.IRModule:
        if self.missing():
            raise SourceError(
                f"expected PyTorch operators with a translation, found: {', '.join(self.missing())}: not supported"
            )
        module = self.from_exported_program(self.program, True, True, False, {})
        module["main"] = module["main"].without_attr("params")
        return module

    # Operators without a translation whose inputs are numbers: PyTorch computes them now.

    def _number(self, node: fx.Node):
        """The value of a node that depends on buffers and constants alone, as PyTorch gives it; None of others."""
        if node not in self._numbers:
            self._numbers[node] = None
            if node.op == "placeholder":
                target = {s.arg.name: s.target for s in self.program.graph_signature.input_specs}[node.name]
                constants = {**self.program.constants, **dict(self.program.named_buffers())}
                self._numbers[node] = constants.get(target)
            elif node.op == "call_function" and all(self._number(n) is not None for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), self._number)
                self._numbers[node] = node.target(*args, **kwargs)
        return self._numbers[node]

    def convert_number(self, node):
        value = self._number(node)
        if value is None:
            raise SourceError(f"expected PyTorch operators with a translation, found {node.target.__name__}")
        several = isinstance(value, (list, tuple))
        values = [self.emit(relax.const(v.numpy(), dtype_name(v.dtype))) for v in (value if several else [value])]
        return values if several else values[0]

    # Weights: one parameter each, in the dtype they are stored in.

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor):
        if isinstance(tensor, torch.nn.Parameter):  # a placeholder: TVM lists it and nobody reads it
            return tvm.runtime.tensor(np.zeros((), "float32"))
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return translator.ExportedProgramImporter._convert_pytorch_tensor_to_tvm(tensor.contiguous())

    @staticmethod
    def _convert_data_type(input_type, env=None):
        if input_type == torch.complex64:  # a real tensor with a last axis of 2
            return "float32"
        return translator.ExportedProgramImporter._convert_data_type(input_type, env)

    def create_input_vars(self, program):
        variables, inputs, ranges = super().create_input_vars(program)
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        buffers = {**program.constants, **dict(program.named_buffers())}
        parameters, first = {}, {}
        self._computed = {}  # placeholder -> (parameter, dtype the model computes in)
        for name, variable in variables.items():
            spec = kinds[name]
            if spec.kind is not torch.export.graph_signature.InputKind.PARAMETER:
                value = buffers.get(spec.target)
                if value is not None and value.is_complex():
                    variable = relax.Var(name, relax.TensorType([*value.shape, 2], variable.ty.dtype))
                parameters[name] = variable
                continue
            weight = self.names[spec.target]
            if weight not in first:
                stored = self.dtypes.get(weight, variable.ty.dtype)
                first[weight] = relax.Var(weight, relax.TensorType(variable.ty.shape, stored))
                parameters[name] = first[weight]
            self._computed[name] = (first[weight], str(variable.ty.dtype))
        # The length is called n; whatever else the graph names after it follows from the inputs' types.
        n = tirx.Var("n", "int64")
        shape = next(iter(inputs.values())).ty.shape
        lower, upper = ranges.get(str(shape[1]), (1, None))
        inputs = {
            name: relax.Var(public, relax.TensorType([1, n], variable.ty.dtype))
            for public, (name, variable) in zip(("tokens", "positions"), inputs.items(), strict=True)
        }
        return parameters, inputs, {"n": (lower, upper)}

    def _translate_fx_graph(self, graph_module, nodes, inputs_vars, custom_ops=None):
        cast = {}
        for parameter, dtype in self._computed.values():
            if (parameter.name, dtype) not in cast:
                cast[parameter.name, dtype] = self._cast(parameter, dtype)
        bound = {**inputs_vars, **{name: cast[p.name, dtype] for name, (p, dtype) in self._computed.items()}}
        return super()._translate_fx_graph(graph_module, nodes, bound, custom_ops)

    # The conversion table.

    def create_convert_map(self):
        table = super().create_convert_map()
        self._plain = {k: table[k] for k in ("mul.Tensor", "to.dtype_layout", "_to_copy.default", "index_put.default")}
        table |= {
            "attention.default": self.convert_attention,
            "expert_linear.default": self.convert_expert_linear,
            "linear.default": self.convert_linear,
            "masked_fill.Scalar": self.convert_masked_fill,
            "full_like.default": lambda node: self._filled(node, node.args[1]),
            "zeros_like.default": lambda node: self._filled(node, 0),
            "ones_like.default": lambda node: self._filled(node, 1),
            "repeat_interleave.self_int": self.convert_repeat_interleave,
            "_unsafe_view.default": self.convert_view,
            "view.default": self.convert_view,
            "reshape.default": self.convert_view,
            "flatten.using_ints": self.convert_flatten,
            "chunk.default": self.convert_chunk,
            "to.dtype": self.convert_cast,
            "to.device": self.convert_cast,
            "topk.default": self.convert_topk,
            "new_empty.default": self.convert_new_empty,
            "layer_norm.default": self.convert_layer_norm,
            "rms_norm.default": self.convert_rms_norm,
            "select_scatter.default": self.convert_select_scatter,
            "index_put.default": self.convert_index_put,
            "where.ScalarSelf": self.convert_where,
            "where.ScalarOther": self.convert_where,
            "where.Scalar": self.convert_where,
            "std.dim": self.convert_std,
            "polar.default": self.convert_polar,
            "mul.Tensor": self.convert_mul,
            "to.dtype_layout": self.convert_to,
            "_to_copy.default": self.convert_to_copy,
            "view_as_complex.default": lambda node: self.env[node.args[0]],
            "view_as_real.default": lambda node: self.env[node.args[0]],
            "sym_min": lambda node: tirx.min(*self.retrieve_args(node)),
            "sym_max": lambda node: tirx.max(*self.retrieve_args(node)),
        }
        spelled = {name: name.split(".", 1) for name in table if "." in name}
        for alias, name in ALIASES.items():
            table |= {f"{alias}.{kind}": table[f"{op}.{kind}"] for op, kind in spelled.values() if op == name}
        return {name: self._checked(convert) for name, convert in table.items()}

    def _checked(self, convert):
        """A converter whose result has the dtype, rank and static dimensions that PyTorch gave the node."""

        def run(node: fx.Node):
            wide = node.target.__name__.split(".")[0] in WIDE
            want = node.meta.get("val")
            out = self._with_operands(convert, node, self._operand_dtype(node, want, wide))
            found = getattr(out, "ty", None)
            if isinstance(found, relax.TupleType) and wide:
                fields = [self.emit(relax.TupleGetItem(out, i)) for i in range(len(found.fields))]
                return [self._cast(x, dtype_name(v.dtype)) for x, v in zip(fields, want, strict=True)]
            if not isinstance(want, torch.Tensor) or want.is_complex() or not isinstance(found, relax.TensorType):
                return out
            if found.dtype != dtype_name(want.dtype):
                out = self.emit(R.astype(out, dtype_name(want.dtype)))
            sizes = None if found.shape is None else list(found.shape)
            static = [d if isinstance(d, int) else None for d in want.shape]
            same = sizes is None or (
                len(sizes) == len(static)
                and all(
                    d is None or not isinstance(s, tirx.IntImm) or int(s) == d
                    for s, d in zip(sizes, static, strict=True)
                )
            )
            if not same:
                raise SourceError(
                    f"{node.target.__name__} ({node.name}): expected the shape {list(want.shape)} that PyTorch gives, "
                    f"found {sizes} after translation: this is a fault of llmc, please report it"
                )
            return out

        return run

    @staticmethod
    def _operand_dtype(node: fx.Node, want, wide: bool):
        """Operand's dtype -> the one to compute in."""
        result = dtype_name(want.dtype) if isinstance(want, torch.Tensor) else ""
        promotes = "float" in result and node.target.__name__.split(".")[0] in PROMOTES

        def dtype(own: str) -> str:
            if wide and own in ("bfloat16", "float16"):
                return "float32"
            # PyTorch makes floats of integers first; TVM computes with integers and casts the result.
            return result if promotes and own in ("bool", "int8", "uint8", "int16", "int32", "int64") else own

        return dtype

    def _with_operands(self, convert, node: fx.Node, dtype):
        """The node on operands cast to dtype(their own)."""
        operands = {n: self.env[n] for n in node.all_input_nodes}
        for n, x in operands.items():
            if isinstance(getattr(x, "ty", None), relax.TensorType) and dtype(x.ty.dtype) != x.ty.dtype:
                self.env[n] = self.emit(R.astype(x, dtype(x.ty.dtype)))
        out = convert(node)
        self.env.update(operands)
        return out

    def emit(self, x: relax.Expr) -> relax.Var:
        return self.block_builder.emit(x)

    def _arguments(self, node: fx.Node) -> dict:
        """Every argument of the operator by name, defaults included."""
        given = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=False)) | dict(node.kwargs)
        return {
            a.name: self._retrieve_args(given[a.name]) if a.name in given else a.default_value
            for a in node.target._schema.arguments
        }

    # The semantic ops.

    def convert_attention(self, node):
        a = self._arguments(node)
        # [1, h, n, d] -> [n, h, d]
        q, k, v = (self.emit(R.squeeze(self.emit(R.permute_dims(a[x], [0, 2, 1, 3])), [0])) for x in "qkv")
        parameters = {x: a[x] for x in ("scale", "softcap", "window", "chunk")}
        out = ops.attention(self.block_builder, q, k, v, a["sinks"], **parameters)
        return self.emit(R.expand_dims(out, 0))

    def convert_expert_linear(self, node):
        a = self._arguments(node)
        return ops.expert_linear(self.block_builder, a["x"], a["w"], a["ids"], a["bias"], transposed=a["transposed"])

    # The gaps.

    def convert_linear(self, node):
        """A float32 sum, the bias added in float32, one rounding to the dtype of x: what PyTorch does."""
        a = self._arguments(node)
        x, w, bias = a["input"], a["weight"], a["bias"]
        y = self.emit(R.matmul(x, self.emit(R.permute_dims(w, [1, 0])), out_dtype="float32"))
        if bias is not None:
            y = self.emit(R.add(y, self._cast(bias, "float32")))
        return self._cast(y, x.ty.dtype)

    def _cast(self, x, dtype):
        return x if x.ty.dtype == dtype else self.emit(R.astype(x, dtype))

    def convert_view(self, node):
        """TVM's compares shapes with ==, which raises as soon as a dimension is n · 2; so do its own -1."""
        x, dims = self.env[node.args[0]], self.retrieve_args(node)[1]
        dims = [tirx.IntImm("int64", d) if isinstance(d, int) else d for d in dims]
        free = [i for i, d in enumerate(dims) if isinstance(d, tirx.IntImm) and int(d) == -1]
        if free:
            one = tirx.IntImm("int64", 1)
            known = functools.reduce(operator.mul, [d for i, d in enumerate(dims) if i not in free], one)
            total = functools.reduce(operator.mul, list(x.ty.shape), one)
            dims[free[0]] = tvm.sym.Analyzer().simplify(tirx.floordiv(total, known))
        return self.emit(R.reshape(x, dims))

    def convert_flatten(self, node):
        a = self._arguments(node)
        dims = list(a["self"].ty.shape)
        first, last = a["start_dim"] % len(dims), a["end_dim"] % len(dims)
        merged = functools.reduce(operator.mul, dims[first : last + 1])
        return self.emit(R.reshape(a["self"], [*dims[:first], merged, *dims[last + 1 :]]))

    def convert_chunk(self, node):
        a = self._arguments(node)
        sizes = [v.shape[a["dim"]] for v in node.meta["val"]]
        return self.emit(R.split(a["self"], [sum(sizes[:i]) for i in range(1, len(sizes))], axis=a["dim"]))

    def convert_cast(self, node):
        return self._cast(self.env[node.args[0]], dtype_name(node.meta["val"].dtype))

    def convert_topk(self, node):
        """Sorted or not: a sorted result is one of those that PyTorch may give."""
        a = self._arguments(node)
        call = R.topk(a["self"], k=a["k"], axis=a["dim"], largest=a["largest"], ret_type="both", dtype="int64")
        return self.emit(call)

    def convert_repeat_interleave(self, node):
        a = self._arguments(node)
        return self.emit(R.repeat(a["self"], a["repeats"], a["dim"]))

    def convert_new_empty(self, node):
        """Memory that something else fills: zeros, so that a result is never random."""
        return self.emit(R.zeros(self.retrieve_args(node)[1], dtype_name(node.meta["val"].dtype)))

    def _filled(self, node, value):
        """TVM has no full(inf) nor full(nan): a constant is broadcast."""
        value = relax.const(value, dtype_name(node.meta["val"].dtype))
        return self.emit(R.broadcast_to(value, self.env[node.args[0]].ty.shape))

    def convert_masked_fill(self, node):
        x, mask, value = self.retrieve_args(node)
        return self.emit(R.where(mask, relax.const(value, x.ty.dtype), x))

    def convert_layer_norm(self, node):
        """TVM's has no layer norm without a weight."""
        a = self._arguments(node)
        x, shape = a["input"], [int(d) for d in a["normalized_shape"]]
        weight = relax.const(np.ones(shape, "float32")) if a["weight"] is None else a["weight"]
        bias = relax.const(np.zeros(shape, "float32")) if a["bias"] is None else a["bias"]
        weight, bias = self._cast(weight, x.ty.dtype), self._cast(bias, x.ty.dtype)
        axes = list(range(-len(shape), 0))
        return self.emit(R.nn.layer_norm(x, weight, bias, axes=axes, epsilon=a["eps"]))

    def convert_rms_norm(self, node):
        """x / sqrt(mean(x²) + eps) · weight in float32, rounded once: what PyTorch does."""
        a = self._arguments(node)
        x = self._cast(a["input"], "float32")
        axes = list(range(-len(a["normalized_shape"]), 0))
        eps = torch.finfo(node.args[0].meta["val"].dtype).eps if a["eps"] is None else a["eps"]
        mean = self.emit(R.mean(self.emit(R.multiply(x, x)), axes, keepdims=True))
        y = self.emit(R.multiply(x, self.emit(R.rsqrt(self.emit(R.add(mean, relax.const(eps, "float32")))))))
        if a["weight"] is not None:
            y = self.emit(R.multiply(y, self._cast(a["weight"], "float32")))
        return self._cast(y, a["input"].ty.dtype)

    def convert_index_put(self, node):
        """x[mask] = number is where(mask, number, x): TVM's takes integers for indices only."""
        a = self._arguments(node)
        x, indices, values = a["self"], a["indices"], a["values"]
        if not any(i is not None and i.ty.dtype == "bool" for i in indices):
            return self._plain["index_put.default"](node)
        if len(indices) > 1 or values.ty.ndim or a["accumulate"]:
            raise SourceError(f"index_put ({node.name}): expected one mask and one number, found more: not supported")
        mask = indices[0]
        for _ in range(x.ty.ndim - mask.ty.ndim):
            mask = self.emit(R.expand_dims(mask, -1))
        return self.emit(R.where(mask, values, x))

    def convert_where(self, node):
        a = self._arguments(node)
        dtype = dtype_name(node.meta["val"].dtype)
        sides = [
            self._cast(a[side], dtype) if isinstance(a[side], relax.Expr) else relax.const(a[side], dtype)
            for side in ("self", "other")
        ]
        return self.emit(R.where(a["condition"], *sides))

    def convert_std(self, node):
        a = self._arguments(node)
        if a["unbiased"]:
            raise SourceError(f"std ({node.name}): expected the biased estimate, found the unbiased one: not supported")
        return self.emit(R.std(a["self"], a["dim"], a["keepdim"]))

    def convert_select_scatter(self, node):
        a = self._arguments(node)
        dim, size = a["dim"], node.meta["val"].shape[a["dim"]]
        at = a["index"] % size
        parts = list(self.emit(R.split(a["self"], [i for i in (at, at + 1) if 0 < i < size], axis=dim)))
        parts = [self.emit(part) for part in parts]
        parts[1 if at else 0] = self.emit(R.expand_dims(a["src"], dim))
        return self.emit(R.concat(parts, axis=dim))

    # A complex tensor is a real one with a last axis of 2: rotary embeddings in polar form.

    def convert_polar(self, node):
        size, angle = self.retrieve_args(node)
        parts = [self.emit(R.multiply(size, self.emit(f(angle)))) for f in (R.cos, R.sin)]
        return self.emit(R.stack(parts, axis=-1))

    def convert_mul(self, node):
        if not all(isinstance(a, fx.Node) and _is_complex(a) for a in node.args):
            return self._plain["mul.Tensor"](node)
        (a, b), (c, d) = ([self.emit(part) for part in self.emit(R.split(self.env[x], 2, axis=-1))] for x in node.args)

        def combine(op, x, y):
            return self.emit(op(self.emit(R.multiply(*x)), self.emit(R.multiply(*y))))

        real, imaginary = combine(R.subtract, (a, c), (b, d)), combine(R.add, (a, d), (b, c))
        return self.emit(R.concat([real, imaginary], axis=-1))

    def convert_to(self, node):
        return self.env[node.args[0]] if _is_complex(node) else self._plain["to.dtype_layout"](node)

    def convert_to_copy(self, node):
        return self.env[node.args[0]] if _is_complex(node) else self._plain["_to_copy.default"](node)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()
