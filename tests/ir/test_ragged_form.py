"""check_ragged: what is in the form passes, and every way out of it is named."""

import json
from dataclasses import replace

import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from llmc.ir import paging
from llmc.ir.errors import FormError
from llmc.ir.ops import op_of
from llmc.ir.ragged_form import check_ragged
from llmc.ir.rewrite import Rewriter
from llmc.passes.cache_latent import CacheLatent
from llmc.passes.gather_logits import GatherLogits
from llmc.passes.page_attention import PageAttention
from llmc.passes.split_embedding import SplitEmbedding
from tests import decoders
from tests.serving import GOAL


def ragged(decoder, goal=GOAL):
    module = decoder.module
    for current in (CacheLatent(), PageAttention(), SplitEmbedding(), GatherLogits()):
        module = current.run(module, goal)
    return module


@pytest.fixture(scope="module")
def module():
    return ragged(decoders.Decoder(windows=(0, 6), sinks=True))


def test_the_form_is_recognised(module):
    check_ragged(module)


class Change(Rewriter):
    """Rewrites calls of one semantic op in step: `new(rewriter, var, call)` returns another expression."""

    def __init__(self, module, op, new):
        super().__init__(module, "step")
        self.op, self.other = op, new
        self.kept = {}

    def rewrite(self, var, value):
        if op_of(self.module, value) == self.op:
            new = self.other(self, var, value)
            if new is not None:
                return new
        return self.again(value)


def fields(at, call):
    return [at.get(a) for a in call.args[1].fields]


def reads_the_parameter(at, var, call):
    args = fields(at, call)
    args[1] = next(p for p in at.old.params if p.name == "k_pages_0")
    return R.call_tir(call.args[0], args, call.ty) if var.ty.shape and "0" in str(args[-1].name) else None


def other_tables(at, var, call):
    args = fields(at, call)
    args[-3:] = [p for p in at.old.params if p.name in ("kv_indptr_1", "kv_indices_1", "kv_last_page_len_1")]
    return R.call_tir(call.args[0], args, call.ty)


def lost_window(at, var, call):
    func = paging.paged_attention(**{**paging.parameters(at.module[call.args[0]]), "window": 0})
    return R.call_tir(at.builder.add_func(func, "wide"), fields(at, call), call.ty)


def copies(at, var, call):
    return R.call_tir(call.args[0], fields(at, call), call.ty)


def appends_twice(at, var, call):
    args = fields(at, call)
    at.emit(R.call_tir_inplace(call.args[0], args, 0, call.ty))
    first = at.emit(R.call_tir_inplace(call.args[0], args, 0, call.ty))
    at.kept[var] = first
    return R.call_tir_inplace(call.args[0], [first, *args[1:]], 0, call.ty)


def changes_pages(at, var, call):
    args = fields(at, call)
    args[1] = at.emit(R.multiply(args[1], relax.const(2.0, "float32")))
    return R.call_tir(call.args[0], args, call.ty)


FAULTS = {
    "pages as they came": (
        paging.PAGED_ATTENTION,
        reads_the_parameter,
        "after their append, found k_pages_0 as it came",
    ),
    "tables of another group": (paging.PAGED_ATTENTION, other_tables, r"expected the tables qo_indptr, kv_indptr_0"),
    "window of no group": (paging.PAGED_ATTENTION, lost_window, "expected window 6 of group 1, found 0"),
    "not in place": (paging.APPEND_PAGES, copies, "expected a well-formed module"),
    "append of an append": (paging.APPEND_PAGES, appends_twice, "expected a parameter of pages, found"),
    "pages computed with": (paging.PAGED_ATTENTION, changes_pages, "pages in semantic ops alone, found .* in multiply"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(module, fault):
    op, new, message = FAULTS[fault]
    with pytest.raises(FormError, match=message):
        check_ragged(Change(module, op, new).run())


class Unused(Rewriter):
    """Attention of layer 0 gives its queries back: its pages stay unused."""

    def rewrite(self, var, value):
        if op_of(self.module, value) == paging.PAGED_ATTENTION and "_0" in value.args[1].fields[-1].name:
            return self.get(value.args[1].fields[0])
        return self.again(value)


def test_a_pool_without_use_is_named(module):
    with pytest.raises(FormError, match="k_pages_0 to be appended to and attended over, found it unused"):
        check_ragged(Unused(module, "step").run())


def swapped_scales(at, var, call):
    args = fields(at, call)
    args[2], args[4] = args[4], args[2]
    return R.call_tir(call.args[0], args, call.ty)


def scales_as_they_came(at, var, call):
    args = fields(at, call)
    args[2] = next(p for p in at.old.params if p.name == "k_scales_0")
    return R.call_tir(call.args[0], args, call.ty)


SCALES = {
    "of the values": (swapped_scales, "pages with the scales of their append, found k_pages_0, v_scales_0"),
    "as they came": (scales_as_they_came, "after their append, found k_scales_0 as it came"),
}


@pytest.mark.parametrize("fault", SCALES)
def test_scales_of_a_quantized_cache_are_followed(fault):
    module = ragged(decoders.Decoder(layers=1), replace(GOAL, kv_cache="int8"))
    check_ragged(module)
    new, message = SCALES[fault]
    with pytest.raises(FormError, match=message):
        check_ragged(Change(module, paging.PAGED_ATTENTION, new).run())


def test_states_and_signatures_are_checked(module):
    def changed(name, value):
        other = tvm.IRModule(dict(module.functions.items()))
        other["step"] = other["step"].with_attr(name, value)
        return other

    state = json.loads(str(module["step"].attrs["llmc.state"]))
    with pytest.raises(FormError, match="num_input of step to be"):
        check_ragged(changed("num_input", 3))
    with pytest.raises(FormError, match=r"of a paged group in llmc.state"):
        check_ragged(changed("llmc.state", json.dumps([{**state[0], "kind": "slot"}, state[1]])))
    with pytest.raises(FormError, match="one group for each window and chunk"):
        check_ragged(changed("llmc.state", json.dumps([state[0], state[0]])))
    with pytest.raises(FormError, match="expected v_pages_0 as parameter 10 of step, found k_pages_0"):
        tensors = {"tensors": state[0]["tensors"][::-1]}
        check_ragged(changed("llmc.state", json.dumps([{**state[0], **tensors}, state[1]])))
    with pytest.raises(FormError, match="as parameter k_pages_0 of step"):
        tensors = [{**t, "dtype": "float16"} for t in state[0]["tensors"]]
        check_ragged(changed("llmc.state", json.dumps([{**state[0], "tensors": tensors}, state[1]])))
    with pytest.raises(FormError, match="an attention for each of layers"):
        check_ragged(changed("llmc.state", json.dumps([{**state[0], "layers": [0, 2]}, state[1]])))


def test_earlier_forms_are_not_ragged():
    decoder = decoders.Decoder(layers=1)
    with pytest.raises(FormError, match="expected a function embed, found main"):
        check_ragged(decoder.module)
    half = PageAttention().run(decoder.module, GOAL)
    with pytest.raises(FormError, match="expected a function embed, found step"):
        check_ragged(half)
