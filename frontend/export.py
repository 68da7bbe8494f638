"""A transformers model without its weights, exported once, with attention, masks and experts as ops of their own.

Three public hooks of transformers make the graph clean whatever the architecture: attention arrives as one op with
grouped heads not repeated, no mask is built (its class is attached to the op), and the experts of a mixture arrive as
linear layers whose weight is picked by an index.
"""

import contextlib
import inspect
import types
from collections.abc import Iterator

import torch
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from llmc.frontend import masks
from llmc.frontend.importer import drop_checks
from llmc.ir.errors import SourceError

torch.library.define(
    "llmc::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, float softcap, int window, int chunk)"
    " -> Tensor",
)
torch.library.define("llmc::expert_linear", "(Tensor x, Tensor w, Tensor? bias, Tensor ids, bool transposed) -> Tensor")


@torch.library.register_fake("llmc::attention")
def _attention_shape(q, k, v, mask, sinks, scale, softcap, window, chunk):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


@torch.library.register_fake("llmc::expert_linear")
def _expert_linear_shape(x, w, bias, ids, transposed):
    return x.new_empty(x.shape[0], w.shape[2] if transposed else w.shape[1])


# Keywords of attention calls that change nothing here: what they say stands in the mask, or concerns caches, training
# and other outputs. Every other keyword that is not None is refused.
HARMLESS = {
    "cache_position",
    "deterministic",
    "is_causal",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, dropout=0.0, **others):
    """transformers' attention interface: q [1, h, n, d], k [1, g, n, d], v [1, g, n, e] -> ([1, n, h, e], None).

    The names of the arguments are the interface's: some models pass all of them by name.
    """
    q, k, v, mask = query, key, value, attention_mask
    layer = type(module).__name__
    for name, value in others.items():
        if value is not None and name not in HARMLESS:
            raise SourceError(f"{layer}: expected attention arguments that llmc knows, found {name}: not supported")
    if dropout:
        raise SourceError(f"{layer}: expected attention without dropout, found dropout={dropout}")
    if mask is None:
        raise SourceError(f"{layer}: expected an attention mask, found none: every token would see every other one")
    if k.shape[2] != q.shape[2]:
        raise SourceError(f"{layer}: expected attention of a sequence to itself, found attention to another one")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(scale, torch.Tensor):
        raise SourceError(f"{layer}: expected a number as attention's scale, found a tensor: not supported")
    return torch.ops.llmc.attention(q, k, v, mask, s_aux, float(scale), float(softcap or 0.0), 0, 0), None


def attention_mask(q_length, kv_length, mask_function, q_offset=0, kv_offset=0, attention_mask=None, **_):
    """transformers' mask interface: the mask as a tensor program [1, 1, rows, keys], to be classified after export."""
    if not (isinstance(q_offset, int) and q_offset == 0 and isinstance(kv_offset, int) and kv_offset == 0):
        raise SourceError(f"expected a mask of a sequence without a past, found offsets {q_offset} and {kv_offset}")
    rows, keys = torch.ops.llmc.query_rows(q_length)[:, None], torch.arange(kv_length)[None, :]
    seen = mask_function(0, 0, rows, keys) & (keys >= 0) & (rows >= 0)
    if attention_mask is not None:
        seen = seen & attention_mask[0].bool()[None, :]
    return seen[None, None]


def experts(module, x, ids, weights):
    """transformers' experts interface: x [s, w], ids and weights [s, k] -> [s, w]; only chosen experts are computed."""
    k = ids.shape[-1]
    flat = ids.reshape(-1)

    def linear(x, name):
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return torch.ops.llmc.expert_linear(x, getattr(module, name), bias, flat, module.is_transposed)

    hidden = x.repeat_interleave(k, dim=0)
    if module.has_gate:
        hidden = module._apply_gate(linear(hidden, "gate_up_proj"))
    else:
        hidden = module.act_fn(linear(hidden, "up_proj"))
    hidden = linear(hidden, "down_proj")
    if module.has_post_expert_norm:
        hidden = module.post_expert_norm(hidden)
    return (hidden * weights.reshape(-1, 1)).view(x.shape[0], k, -1).sum(1).to(x.dtype)


AttentionInterface.register("llmc", attention)
AttentionMaskInterface.register("llmc", attention_mask)
ALL_EXPERTS_FUNCTIONS.register("llmc", experts)


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Parameters of modules built in here have no data, only a shape; buffers are real."""
    register = nn.Module.register_parameter

    def register_shape(self, name, parameter):
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = register_shape
    try:
        with no_init_weights():
            yield
    finally:
        nn.Module.register_parameter = register


def build(model_class: type[PreTrainedModel], config, dtype: torch.dtype) -> nn.Module:
    """The model of `config` in evaluation mode: parameters are placeholders without memory, tied ones are one object.

    Persistent buffers become parameters (a checkpoint holds their values). Modules that transformers keeps in float32
    are in float32.
    """
    config._attn_implementation = config._experts_implementation = "llmc"
    config.use_cache = False
    with weightless():
        model = model_class._from_config(config, dtype=dtype).eval()
        model.tie_weights()
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name in [b for b in module._buffers if b not in module._non_persistent_buffers_set]:
            if module._buffers[name] is not None:
                module._parameters[name] = nn.Parameter(module._buffers.pop(name).to("meta"), requires_grad=False)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in placeholders:
                    placeholders[id(parameter)] = (parameter, placeholder(parameter.shape, parameter.dtype))
                module._parameters[name] = placeholders[id(parameter)][1]
    plan = model._get_dtype_plan(dtype)
    if plan:
        found, kept, _ = build_glob_alternation(list(plan))
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                match = found.search(f"{path}.{name}") if parameter is not None else None
                if match is not None and parameter.is_floating_point():
                    module._parameters[name] = placeholder(parameter.shape, plan[kept[match.lastgroup]])
    return model


def placeholder(shape, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of one element, seen as a whole tensor."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(tuple(shape)), requires_grad=False)


def fix_rotary(model: nn.Module, max_context: int) -> list[str]:
    """Rotary frequencies that follow the length of the sequence become those of max_context. Returns notes on it.

    longrope has a set for sequences within the pretraining length and one for longer ones. dynamic scaling leaves
    sequences within max_position_embeddings alone; beyond it frequencies would change with every token.
    """
    notes = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or "forward" not in type(module).__dict__:
            continue
        per_layer = isinstance(kinds, dict)
        changed = False
        for layer_type, kind in kinds.items() if per_layer else [(None, kinds)]:
            prefix = f"{layer_type}_" if per_layer else ""
            parameters = module.config.rope_parameters[layer_type] if per_layer else module.config.rope_parameters
            if kind == "longrope":
                original = parameters["original_max_position_embeddings"]
                frequencies = getattr(module, f"{prefix}original_inv_freq")
                if max_context > original:
                    frequencies = _long_frequencies(module, layer_type, original)
                module.register_buffer(f"{prefix}inv_freq", frequencies.clone(), persistent=False)
                which = "long" if max_context > original else "short"
                notes.add(
                    f"rope: longrope's {which} factors, for a context of {max_context} ({original} in pretraining)"
                )
                changed = True
            elif kind is not None and "dynamic" in kind:
                limit = getattr(module, f"{prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", 0))
                if max_context > limit:
                    raise SourceError(
                        f"expected max_context of at most {limit} for dynamic rope, found {max_context}: beyond it the "
                        "frequencies change with every token"
                    )
                notes.add(f"rope: dynamic scaling has no effect within {max_context} tokens")
                changed = True
        if changed:
            forward = inspect.unwrap(type(module).forward)
            module.forward = types.MethodType(forward, module)
    return sorted(notes)


def _long_frequencies(module, layer_type, original):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    extra = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), seq_len=original + 1, **extra)[0]


def first_position(model: nn.Module) -> int:
    """The position id of a sequence's first token: that after the padding's, where a model numbers its tokens so."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return module.padding_idx + 1
    return 0


class Textbook(nn.Module):
    """One sequence, no cache: input_ids [1, n], position_ids [1, n] (from 0) -> logits [1, n, vocab]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.first_position = first_position(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids, position_ids):
        if self.first_position:
            position_ids = position_ids + self.first_position
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        return self.model(input_ids=input_ids, **positions, use_cache=False).logits


def export(model: nn.Module, max_context: int) -> torch.export.ExportedProgram:
    """The textbook program of a model, of any length; masks are still tensor programs in it."""
    try:
        return _export(model, torch.export.Dim("n", min=1))
    except torch._dynamo.exc.UserError:  # a length that something in the model bounds
        return _export(model, torch.export.Dim("n", min=1, max=max_context))


def _export(model: nn.Module, length) -> torch.export.ExportedProgram:
    n = 17
    tokens, positions = torch.zeros(1, n, dtype=torch.int32), torch.arange(n, dtype=torch.int32)[None]
    with torch.no_grad():
        return torch.export.export(
            Textbook(model),
            (tokens, positions),
            dynamic_shapes={"input_ids": {1: length}, "position_ids": {1: length}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def classify_masks(program: torch.export.ExportedProgram, sizes: list[int], max_context: int) -> int:
    """Attach its class to every attention op and cut the masks out of the graph. Returns the number of attention ops.

    sizes: windows and chunks that the config names. SourceError for what no served decoder can be: a mask that fits no
    class, or one through which a token sees its future.
    """
    found = {}
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.llmc.attention.default)
    for node in nodes:
        q, k, v, mask, sinks, scale, softcap, _, _ = node.args
        if mask not in found:
            found[mask] = masks.mask_of(program, mask, sizes, max_context)
        kind, size = found[mask].kind, found[mask].size
        if kind in ("bidirectional", "prefix"):
            raise SourceError(
                f"expected a decoder, in which no token sees its future; found {kind} attention: not supported"
            )
        window, chunk = size * (kind == "window"), size * (kind == "chunked")
        node.args = (q, k, v, None, sinks, scale, softcap, window, chunk)
    drop_checks(program)
    return len(nodes)
