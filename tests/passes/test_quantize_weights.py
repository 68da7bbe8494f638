"""QuantizeWeights: the program with parts is the program with the weights that the parts stand for."""

from dataclasses import replace

import numpy as np
import pytest
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.errors import FormError
from llmc.ir.evaluate import evaluate
from llmc.ir.forms import check_textbook, weight_names
from llmc.ir.ops import expert_linear, op_of
from llmc.ir.quantized import TABLES, Format, activation_group, dequantize
from llmc.ir.rewrite import bindings, op_name
from llmc.ir.text import text
from llmc.passes import schemes
from llmc.passes.cache_latent import CacheLatent
from llmc.passes.fuse_projections import FuseProjections
from llmc.passes.goal import Goal
from llmc.passes.prove_token_locality import ProveTokenLocality
from llmc.passes.quantize_weights import QuantizeWeights
from llmc.passes.weight_uses import weight_uses
from tests import decoders

TOKENS = np.random.default_rng(1).integers(0, 32, 9).astype("int32")


def decoded(format: Format, parts: dict[str, np.ndarray]) -> np.ndarray:
    """What parts stand for, weight by weight in float64: an oracle that shares nothing with dequantize."""
    codes, scales = parts["codes"], parts["scales"]
    out = np.zeros(codes.shape)
    for at in np.ndindex(*codes.shape):
        group = (*at[:-1], at[-1] // format.group if format.group else 0)
        code = int(codes[at])
        zero = int(parts["zeros"][group]) if format.zeros else format.offset
        scale = 2.0 ** (int(scales[group]) - 127) if format.scale == "e8m0" else float(scales[group])
        out[at] = (TABLES[format.table][code] if format.table else code - zero) * scale
    return out


def quantized(module, weights, plan, fuse=False):
    """The program after the pass, its weights, and the weights that they stand for."""
    uses = weight_uses(module)
    goal = Goal(schemes=plan)
    after = QuantizeWeights().run(module, goal)
    after = FuseProjections().run(after, goal) if fuse else after
    check_textbook(after)
    given, fake = {}, {}
    for name, w in weights.items():
        if f"{name}:codes" not in weight_names(after["main"]):
            given[name] = fake[name] = w
            continue
        rows = w.astype("float32")
        rows = rows.swapaxes(-1, -2) if uses[name].transposed else rows
        flat = rows.reshape(-1, rows.shape[-1])
        parts = {k: p.reshape(*rows.shape[:-1], -1) for k, p in plan[name].encode(flat).items()}
        given |= {f"{name}:{part}": p for part, p in parts.items()}
        stands = decoded(plan[name].format(rows.shape[-1]), parts).astype("float32")
        if plan[name].scaled:
            factors = np.random.default_rng(len(plan[name].scaled)).uniform(0.25, 4, rows.shape[-1]).astype("float32")
            given[f"{plan[name].scaled}:inverse_scale"] = factors
            stands = stands * factors
        fake[name] = stands.swapaxes(-1, -2) if uses[name].transposed else stands
    return after, given, fake


def run(module, weights):
    arrays = [weights[name] for name in weight_names(module["main"])]
    return evaluate(module, [TOKENS, np.arange(len(TOKENS), dtype="int32"), *arrays]).astype("float32")


def close(found, wanted):
    # float32 in the same order: the weights differ in the last place, the order of sums does not.
    assert np.abs(found - wanted).max() <= 1e-5 * np.ptp(wanted)


@pytest.mark.parametrize("scheme", ["int4", "int8", "int4-g16-zp"])
@pytest.mark.parametrize("fuse", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parts_are_the_weights_they_stand_for(scheme, fuse, tied):
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64, tied=tied, bias=True)
    plan = {n: schemes.parse(scheme) for n, use in weight_uses(decoder.module).items() if use.roles}
    assert len(plan) == 8 + (not tied)
    after, given, fake = quantized(decoder.module, decoder.weights, plan, fuse)
    assert sum(op_of(after, b.value) == "dequantize" for b in bindings(after["main"])) == (6 if fuse else 9) - tied
    close(run(after, given), run(decoder.module, fake))
    # and it is a loss: the test would see weights that were not quantized at all
    assert np.abs(run(after, given) - run(decoder.module, decoder.weights)).max() > 1e-4


def test_weights_stored_in_16_bits():
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64, stored="bfloat16")
    plan = {n: schemes.parse("int4") for n, use in weight_uses(decoder.module).items() if use.roles}
    after, given, fake = quantized(decoder.module, decoder.weights, plan, fuse=True)
    widened = decoders.Decoder(layers=1, hidden=32, intermediate=64)  # the same program over float32 weights
    close(run(after, given), run(widened.module, {n: w.astype("float32") for n, w in fake.items()}))


class Conv(decoders.Decoder):
    """Weights as [inputs, outputs], as GPT-2 has them."""

    def linear(self, x, name, outputs, bias=False):
        return self.emit(R.matmul(x, self.weight(f"{name}.weight", int(x.ty.shape[-1]), outputs)))


def test_weights_that_lie_the_other_way_are_quantized_along_their_inputs():
    decoder = Conv(layers=1, hidden=32, intermediate=64)
    plan = {n: schemes.parse("int4") for n, use in weight_uses(decoder.module).items() if use.roles}
    after, given, fake = quantized(decoder.module, decoder.weights, plan)
    assert given["layers.0.mlp.down_proj.weight:scales"].shape == (32, 2)  # 64 inputs, groups of 32
    close(run(after, given), run(decoder.module, fake))


class Mixture(decoders.Decoder):
    """Every token goes to the expert of the largest of 4 numbers; experts lie either way."""

    turned = False

    def mlp(self, at, x):
        scores = self.linear(x, f"{at}.router", 4)
        ids = self.emit(R.argmax(scores, axis=-1))
        ids = self.emit(R.astype(ids, "int32"))
        shape = (4, self.hidden, self.hidden)
        w = self.weight(f"{at}.experts", *shape)
        return expert_linear(self.bb, x, w, ids, transposed=self.turned)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_and_not_their_router(turned):
    kind = type("Turned", (Mixture,), {"turned": turned})
    decoder = kind(layers=1, hidden=32)
    uses = weight_uses(decoder.module)
    assert uses["layers.0.mlp.router.weight"].roles == {"product", "router"}
    assert uses["layers.0.mlp.experts"].roles == {"experts"}
    assert uses["layers.0.mlp.experts"].transposed is turned
    plan = {"layers.0.mlp.experts": schemes.parse("int4")}
    after, given, fake = quantized(decoder.module, decoder.weights, plan)
    assert given["layers.0.mlp.experts:scales"].shape == (4, 32, 1)
    close(run(after, given), run(decoder.module, fake))


def test_uses_of_a_decoder():
    tied = weight_uses(decoders.Decoder(layers=1, tied=True).module)
    assert tied["embed_tokens.weight"].roles == {"embedding", "product", "head"}
    untied = weight_uses(decoders.Decoder(layers=1).module)
    assert untied["embed_tokens.weight"].roles == {"embedding"}
    assert untied["lm_head.weight"].roles == {"product", "head"}
    assert untied["layers.0.self_attn.o_proj.weight"].roles == {"product"}
    assert "norm.weight" not in untied


def test_activations_are_rounded_once_for_all_products_of_them():
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64)
    roles = weight_uses(decoder.module)
    plan = {n: schemes.parse("int4-g32-a8") for n, use in roles.items() if use.roles == {"product"}}
    after, given, _ = quantized(decoder.module, decoder.weights, plan, fuse=True)
    names = [op_of(after, b.value) for b in bindings(after["main"])]
    assert names.count("round_activation") == 4  # before q/k/v, o, gate/up, down
    products = [b.value for b in bindings(after["main"]) if op_name(b.value) == "matmul"]
    assert len(products) == 5  # and the head's, of what was not rounded
    close(run(after, given), rounded_by_hand(decoder, plan))


@pytest.mark.parametrize(("scheme", "dtype"), [("int4", "float32"), ("int4-g32-a8", "float32"), ("int4", "bfloat16")])
def test_inputs_are_scaled_once_for_all_products_of_them(scheme, dtype):
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64, dtype=dtype, stored=dtype)
    at = "layers.0.self_attn"
    owners = {f"{at}.{s}_proj.weight": f"{at}.q_proj.weight" for s in "qkv"}
    owners |= {"layers.0.mlp.down_proj.weight": "layers.0.mlp.down_proj.weight"}
    plan = {n: replace(schemes.parse(scheme), scaled=owner) for n, owner in owners.items()}
    after, given, fake = quantized(decoder.module, decoder.weights, plan, fuse=True)
    names = weight_names(after["main"])
    assert [n for n in names if n.endswith("inverse_scale")] == [
        f"{at}.q_proj.weight:inverse_scale",
        "layers.0.mlp.down_proj.weight:inverse_scale",
    ]
    assert sum(op_of(after, b.value) == "dequantize" for b in bindings(after["main"])) == 2, "q, k, v are one product"
    found = run(after, given)
    if dtype == "float32" and scheme == "int4":
        close(found, run(decoder.module, fake))
    elif dtype == "float32":
        # what is rounded is the scaled activation: other numbers than those of the weights that the parts stand for
        assert 1e-4 < np.abs(found - run(decoder.module, fake)).max() / np.ptp(found) < 0.1
    else:  # every value in between is rounded to 8 bits again
        assert np.abs(found - run(decoder.module, {n: w.astype(decoder.dtype) for n, w in fake.items()})).max() < (
            6e-2 * np.ptp(found)
        )


def test_where_a_factor_costs_no_kernel():
    uses = weight_uses(decoders.Decoder(layers=1).module)
    rowwise = {name.split(".")[-2]: use.rowwise for name, use in uses.items()}
    assert rowwise == {
        "embed_tokens": False,
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"], True),
        "o_proj": False,  # attention's own kernel gives what it reads
    }
    assert weight_uses(Mixture(layers=1, hidden=32).module)["layers.0.mlp.experts"].rowwise


def rounded_by_hand(decoder, plan):
    """The decoder over weights that plan's parts stand for, whose products see 8-bit activations, in numpy's words."""

    def rounding(x):
        blocks = x.reshape(len(x), -1, 32)
        most = np.abs(blocks).max(-1, keepdims=True)
        safe = np.where(most > 0, most, np.float32(1))
        return (np.rint(blocks * (np.float32(127) / safe)) * (safe * np.float32(1 / 127))).reshape(x.shape)

    class Rounded(decoders.Decoder):
        def linear(self, x, name, outputs, bias=False):
            if f"{name}.weight" in plan:
                n, depth = x.ty.shape[0], int(x.ty.shape[1])
                y = self.emit(R.reshape(x, [n, depth // 32, 32]))
                most = self.emit(R.max(self.emit(R.abs(y)), axis=[-1], keepdims=True))
                q = self.emit(R.round(self.emit(R.multiply(y, self.emit(R.divide(relax.const(127.0), most))))))
                y = self.emit(R.multiply(q, self.emit(R.multiply(most, relax.const(1 / 127)))))
                x = self.emit(R.reshape(y, [n, depth]))
            return super().linear(x, name, outputs, bias)

    made = Rounded(layers=1, hidden=32, intermediate=64)
    _, _, fake = quantized(decoder.module, decoder.weights, plan)
    return run(made.module, fake)


def test_weights_that_other_ops_read_stay():
    """A latent that attention absorbs is read head by head: no kernel reads such rows in few bits."""
    from tests.passes.test_cache_latent import Latent

    decoder = Latent()
    module = CacheLatent().run(decoder.module, Goal())
    uses = weight_uses(module)
    absorbed = [n for n, use in uses.items() if use.other]
    assert absorbed and all(uses[n].other in ("reshape", "strided_slice") for n in absorbed)
    plan = {n: schemes.parse("int4") for n in uses}
    after = QuantizeWeights().run(module, Goal(schemes=plan))
    assert set(absorbed) <= set(weight_names(after["main"]))


def test_no_scheme_leaves_the_module():
    decoder = decoders.Decoder(layers=1)
    assert QuantizeWeights().run(decoder.module, Goal()) is decoder.module


def test_expected(golden):
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64, tied=True, stored="bfloat16")
    uses = weight_uses(decoder.module)
    plan = {n: schemes.parse("int8" if "head" in u.roles else "int4-g32-a8") for n, u in uses.items() if u.roles}
    after, *_ = quantized(decoder.module, decoder.weights, plan, fuse=True)
    golden("quantize_weights.txt", text(after))


def test_experts_read_rounded_rows():
    decoder = Mixture(layers=1, hidden=32)
    after, *_ = quantized(decoder.module, decoder.weights, {"layers.0.mlp.experts": schemes.parse("int4-g32-a8")})
    bound = {b.var: b.value for b in bindings(after["main"])}
    (call,) = (v for v in bound.values() if op_of(after, v) == "expert_linear")
    assert activation_group(after, bound[call.args[0]]) == 32


def test_tokens_stay_apart_and_parts_are_no_tokens():
    decoder = decoders.Decoder(layers=1, hidden=32, intermediate=64)
    plan = {n: schemes.parse("w8a8") for n, use in weight_uses(decoder.module).items() if use.roles}
    after, *_ = quantized(decoder.module, decoder.weights, plan)
    ProveTokenLocality().run(after, Goal())
    bb, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    tokens, positions = (relax.Var(s, relax.TensorType([n], "int32")) for s in ("tokens", "positions"))
    with bb.function("main", [tokens, positions], attrs={"num_input": 2, "llmc.weights": []}):
        with bb.dataflow():  # tokens across the columns that are rounded together
            x = bb.emit(R.reshape(bb.emit(R.astype(tokens, "float32")), [1, n]))
            x = bb.emit(R.broadcast_to(x, [4, n]))
            x = bb.emit(R.permute_dims(bb.emit(R.concat([x] * 2, axis=0)), [0, 1]))
            out = bb.emit_output(dequantize(bb, Format(8, 0, "float32"), bb.emit(R.astype(x, "uint8")), x))
        bb.emit_func_output(out)
    with pytest.raises(FormError, match="expected parts that are the same for all tokens"):
        ProveTokenLocality().run(bb.get(), Goal())


def test_biases_of_experts_are_no_matrices():
    class Biased(Mixture):
        def mlp(self, at, x):
            ids = self.emit(R.astype(self.emit(R.argmax(self.linear(x, f"{at}.router", 4), axis=-1)), "int32"))
            w = self.weight(f"{at}.experts", 4, self.hidden, self.hidden)
            return expert_linear(self.bb, x, w, ids, self.weight(f"{at}.bias", 4, self.hidden))

    uses = weight_uses(Biased(layers=1).module)
    assert "layers.0.mlp.experts" in uses and "layers.0.mlp.bias" not in uses
