"""Products with weights become kernels; the packed weight is a recipe, and says the same as the packer in numpy."""

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import op as R

from llmc import targets
from llmc.codegen.backend import backend
from llmc.codegen.cpu.pack import panels
from llmc.codegen.lift_weights import RECIPES, LiftWeights
from llmc.codegen.lower_embedding import LowerEmbedding
from llmc.codegen.lower_matmul import LowerMatmul
from llmc.codegen.weights import Recipe
from llmc.ir.rewrite import bindings, op_name
from llmc.passes.goal import Goal
from tests.codegen.conftest import Array
from tests.codegen.ragged import Llama
from tests.codegen.test_weights import recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64, 32), (33, 20), (7, 3)])
def test_packed_by_recipe_as_by_numpy(goal, dtype, shape):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    w = np.random.default_rng(0).standard_normal(shape).astype(kind)
    layout = panels(goal.target, *shape, dtype)
    made = Recipe(recipe(lambda emit, a: backend(goal.target).pack(emit, [a], *shape, dtype)[0], a=w), {"a": Array(w)})
    expected = np.empty(layout.shape, kind)
    layout.pack(w, expected)
    assert made.shape == layout.shape
    for size in (1, 1000, 1 << 20):
        got = np.concatenate(list(made.slices(size)))
        assert (got.view(kind) == expected).all()


def ops(function):
    return [op_name(b.value) for b in bindings(function)]


def test_every_product_with_a_weight_is_lowered_and_packed_once(goal):
    model = Llama(checkpoint="bfloat16")
    module = LiftWeights().run(LowerMatmul().run(model.module, goal), goal)
    assert "matmul" not in ops(module["step"])
    recipes = {str(k): v for k, v in module.attrs[RECIPES].items()}
    packed = [v for k, v in recipes.items() if "qkv" in k]
    assert len(packed) == model.layers
    # the checkpoint's dtype, without the cast that stood before the product
    assert all(str(v.ret_ty.dtype) == "bfloat16" and "astype" not in ops(v) for v in packed)
    assert str(recipes["norm.weight:astype"].ret_ty.dtype) == "float32"


def test_equal_layers_share_kernels(goal):
    def kernels(layers):
        module = LowerMatmul().run(Llama(layers=layers).module, goal)
        return sorted(v.name_hint for v in module.functions)

    assert kernels(2) == kernels(3)


def test_a_cast_of_the_product_is_the_kernels(goal):
    module = LowerMatmul().run(Llama(dtype="bfloat16", checkpoint="bfloat16").module, goal)
    step = module["step"]
    products = [b for b in bindings(step) if op_name(b.value) == "call_tir" and "matmul" in b.value.args[0].name_hint]
    *layers, logits = [str(b.var.ty.dtype) for b in products]
    assert set(layers) == {"bfloat16"}
    assert logits == "bfloat16"
    assert all(isinstance(b.value.ty, relax.TensorType) for b in products)


def test_products_of_activations_are_left_alone(goal):
    model = Llama()
    module = tvm.IRModule({v: f for v, f in model.module.functions.items() if v.name_hint != "embed"})
    builder = relax.BlockBuilder(module)
    x = relax.Var("x", relax.TensorType([4, 4], "float32"))
    with builder.function("embed", [x], attrs={"num_input": 1, "llmc.weights": []}):
        builder.emit_func_output(builder.emit(R.matmul(x, x)))
    module = builder.get()
    assert "matmul" in ops(LowerMatmul().run(module, goal)["embed"])


def packed_by(target, dtype):
    """Recipes of the products' weights for a target whose activations have a dtype, of a checkpoint in bfloat16."""
    [facts] = targets.parse(target)
    goal = Goal(target=facts, dtype=dtype, page_size=4)
    model = Llama(layers=1, dtype=dtype, checkpoint="bfloat16", token_last=False)
    module = model.module
    for step in (LowerEmbedding(), LowerMatmul(), LiftWeights()):
        module = step.run(module, goal)
    return {str(k): v for k, v in module.attrs[RECIPES].items() if "norm" not in str(k)}


def test_metal_reads_a_checkpoint_in_bfloat16_as_other_cards_do():
    """It computes in float16, and its products take either: one stored weight serves all."""
    cuda, metal = packed_by("cuda:sm_90", "bfloat16"), packed_by("metal", "float16")
    assert set(metal) == set(cuda) and len(metal) == 6
    for name, recipe_ in metal.items():
        assert str(recipe_.ret_ty.dtype) == "bfloat16" and tvm_ffi.structural_equal(recipe_, cuda[name])
    # Other cards' matrix units multiply operands of one dtype.
    assert all(str(v.ret_ty.dtype) == "float16" for k, v in packed_by("cuda:sm_90", "float16").items() if "qkv" in k)
