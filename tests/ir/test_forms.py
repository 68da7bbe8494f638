"""Every message of the form checks."""

import pytest
from tvm import relax, tirx
from tvm.relax import op as R

from llmc.ir.errors import FormError
from llmc.ir.forms import check_imported, check_textbook, check_well_formed, weight_names, weights_of
from llmc.passes.drop_batch_axis import DropBatchAxis
from llmc.passes.goal import Goal
from tests import textbook


def with_main(module, **changes):
    module = type(module)(dict(module.functions.items()))
    function = module["main"]
    for name, value in changes.items():
        name = name.replace("__", ".")
        function = function.without_attr(name) if value is None else function.with_attr(name, value)
    module["main"] = function
    return module


def test_a_model_is_in_its_form_and_not_in_the_other():
    imported = textbook.llama(layers=1)
    check_imported(imported)
    with pytest.raises(FormError, match=r"textbook form: expected int32 \[n\] as parameter tokens of main, found"):
        check_textbook(imported)
    after = DropBatchAxis().run(imported, Goal())
    check_textbook(after)
    with pytest.raises(FormError, match=r"imported form: expected int32 \[1, n\] as parameter tokens of main"):
        check_imported(after)


def test_names_of_weights():
    main = textbook.llama(layers=1)["main"]
    assert weight_names(main)[0] == "embed.weight"
    assert list(weights_of(main)) == weight_names(main)
    assert weights_of(main)["head.weight"].name == "head.weight"


def test_main_is_missing():
    module = textbook.llama(layers=1)
    function = module["main"].with_attr("global_symbol", "start")
    del module["main"]
    module["start"] = function
    with pytest.raises(FormError, match="imported form: expected a function main, found start"):
        check_imported(module)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_input": 3}, "expected the attribute num_input of main to be 2, found 3"),
        ({"llmc__weights": None}, "expected the attribute llmc.weights on main, found"),
        ({"llmc__weights": ["a"]}, "expected a name for each of 12 weights of main, found 1"),
        ({"llmc__weights": ["a"] * 12}, "expected every weight of main once, found a twice"),
    ],
    ids=str,
)
def test_attributes(changes, message):
    with pytest.raises(FormError, match=message):
        check_imported(with_main(textbook.llama(layers=1), **changes))


def test_a_private_function_that_is_no_semantic_op():
    module = textbook.llama(layers=1)
    y = relax.Var("y", relax.TensorType([2], "float32"))
    inner = relax.BlockBuilder()
    with inner.function("helper", [y], private=True):
        inner.emit_func_output(inner.emit(R.exp(y)))
    module["helper"] = inner.get()["helper"]
    with pytest.raises(FormError, match="expected private functions to be semantic ops, found helper"):
        check_imported(module)


def test_positions_of_another_length():
    builder = relax.BlockBuilder()
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    params = [
        relax.Var("tokens", relax.TensorType([1, n], "int32")),
        relax.Var("positions", relax.TensorType([1, m], "int32")),
    ]
    with builder.function("main", params, attrs={"num_input": 2, "llmc.weights": []}):
        with builder.dataflow():
            out = builder.emit_output(R.expand_dims(R.astype(params[0], "float32"), -1))
        builder.emit_func_output(out)
    with pytest.raises(
        FormError, match=r"expected int32 \[1, n\] as parameter positions of main, found int32 \[1, m\]"
    ):
        check_imported(builder.get())


@pytest.mark.parametrize(
    "result, found",
    [
        (lambda emit, x, p, n: emit(R.astype(x, "int32")), r"int32 \[1, n, 8\]"),
        (lambda emit, x, p, n: emit(R.permute_dims(x, [0, 2, 1])), r"float32 \[1, 8, n\]"),
        (lambda emit, x, p, n: emit(R.reshape(x, [n, 8])), r"float32 \[n, 8\]"),
    ],
)
def test_result(result, found):
    with pytest.raises(
        FormError, match=rf"float32 or float16 or bfloat16 \[1, n, vocab\] as the result of main, found {found}"
    ):
        check_imported(textbook.embedded(result))


def test_well_formed():
    module = textbook.llama(layers=1)
    check_well_formed(module)
    main = module["main"]
    module["main"] = relax.Function(list(main.params)[:-1], main.body, main.ret_ty, main.is_pure, main.attrs)
    with pytest.raises(FormError, match="expected a well-formed module, found: "):
        check_well_formed(module)
