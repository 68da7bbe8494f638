"""No wrong accept: what the analysis accepts keeps tokens apart when it is run."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R

from llmc.ir.evaluate import Reference
from llmc.passes import locality_rules
from llmc.passes.goal import Goal
from llmc.passes.locality import UNIFORM, MixesTokens, Token, analyze
from llmc.passes.prove_token_locality import ProveTokenLocality
from tests import textbook
from tests.passes.locality_programs import LOCAL, MIXING, local, mixing


def analysed(module):
    """The state of what main returns."""
    main = module["main"]
    return analyze(main, module, main.params[0].ty.shape.values[1])[main.body.body]


def reached(module, state, n=5, changed=2, seed=0):
    """The tokens whose part of the result changes with token `changed` or with a token appended, `changed` apart."""
    run = Reference(module)
    args = textbook.arguments(module, n, seed)
    other = [a.copy() for a in args]
    other[0][0, changed] = (other[0][0, changed] + 7) % textbook.VOCAB
    longer = textbook.arguments(module, n + 1, seed)
    longer[2:] = args[2:]
    longer[0][0, :n] = args[0][0]
    base = by_token(run(*args), state)
    differ = [t for t in range(n) if t != changed and not same(base[t], by_token(run(*other), state)[t])]
    return set(differ) | {t for t in range(n) if not same(base[t], by_token(run(*longer), state)[t])}


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def by_token(x, state):
    """A result as [n, everything that is token n's]."""
    if state is UNIFORM:
        return np.broadcast_to(x, (8, *x.shape))
    x = np.moveaxis(x, state.axis, 0)
    n = x.shape[0] // (state.outer * state.inner)
    return np.moveaxis(x.reshape(state.outer, n, -1), 1, 0).reshape(n, -1)


@pytest.mark.parametrize("name", MIXING)
def test_refuses_what_mixes_tokens_and_names_the_op(name):
    op, module = mixing(name)
    with pytest.raises(MixesTokens) as error:
        ProveTokenLocality().run(module, Goal())
    assert error.value.op == op
    assert f"found {op} (" in str(error.value)


@pytest.mark.parametrize("name", LOCAL)
def test_accepts_what_keeps_tokens_apart(name):
    module = local(name)
    state = analysed(module)
    assert isinstance(state, Token)
    assert reached(module, state) == set()


@pytest.mark.parametrize("name", ["softmax over tokens", "reversed tokens", "shifted tokens", "reversing slice"])
def test_the_property_sees_programs_that_mix(name):
    assert reached(mixing(name)[1], Token(1)) != set()


def test_a_wrong_rule_is_caught(monkeypatch):
    """A fault planted in a rule (flip is taken for elementwise) makes the analysis accept; the property then fails."""
    monkeypatch.setitem(locality_rules.RULES, "flip", lambda site: site.states[0])
    module = mixing("reversed tokens")[1]
    assert reached(module, analysed(module)) != set()


# Random programs: a stack of values, each move makes another of the last ones.
WEIGHT = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")


def alike(x, y):
    """Do two values have one shape?"""
    return [str(d) for d in x.ty.shape.values] == [str(d) for d in y.ty.shape.values]


def move(choice, values, n):
    """The expression that a move makes, or an error of Relax's type inference."""
    name, which, axis, number = choice
    x = values[-1 - which % len(values)]
    y = values[-1]
    rank = len(x.ty.shape.values)
    axis %= rank
    shape = list(x.ty.shape.values)
    size, left, right = shape[axis], shape[:axis], shape[axis + 1 :]
    return {
        "exp": lambda: R.tanh(x),
        "add": lambda: R.add(x, y),
        "where": lambda: R.where(R.greater(x, relax.const(0.0)), x, y),
        "matmul": lambda: R.matmul(x, y),
        "matmul_t": lambda: R.matmul(x, R.permute_dims(y, [*range(rank - 2), rank - 1, rank - 2])),
        "weight": lambda: R.matmul(
            x, relax.const(np.random.default_rng(number).standard_normal((8, 4)).astype("float32"))
        ),
        "permute": lambda: R.permute_dims(x, list(np.random.default_rng(number).permutation(rank))),
        "merge": lambda: R.reshape(x, [*left, size * right[0], *right[1:]]),
        "cut": lambda: R.reshape(x, [*left, 2, size // 2, *right]),
        "cut_back": lambda: R.reshape(
            x, [*x.ty.shape.values[:axis], size // 2, 2, *list(x.ty.shape.values)[axis + 1 :]]
        ),
        "rows": lambda: R.reshape(x, [n, -1]),
        "columns": lambda: R.reshape(x, [-1, n]),
        "sum": lambda: R.sum(x, [axis], keepdims=bool(number % 2)),
        "softmax": lambda: R.nn.softmax(x, axis),
        "cumsum": lambda: R.cumsum(x, axis),
        "flip": lambda: R.flip(x, axis),
        "sort": lambda: R.sort(x, axis),
        "topk": lambda: R.topk(x, 1, axis, "values"),
        "take": lambda: R.take(x, relax.const(np.array([0, 0]), "int64"), axis),
        "repeat": lambda: R.repeat(x, 2, axis),
        "tile": lambda: R.tile(x, [2 if a == axis else 1 for a in range(rank)]),
        "stack": lambda: R.stack([x, y], axis),
        "concat": lambda: R.concat([x, y], axis),
        "slice": lambda: R.strided_slice(x, [axis], [number % 2], [size]),
        "expand": lambda: R.expand_dims(x, axis),
        # Relax does not check what an argsort's places are used for: those of a y that is longer than x lie outside it.
        "gather": lambda: R.gather_elements(x, R.argsort(y if alike(x, y) else x, axis, dtype="int64"), axis),
    }[name]()


NAMES = """
    exp add where matmul matmul_t weight permute merge cut cut_back rows columns sum softmax cumsum flip sort topk take
    repeat tile stack concat slice expand gather
"""
MOVES = NAMES.split()


def random_program(choices):
    """As many of the moves as Relax gives a known shape to."""

    def body(emit, x, p, n):
        values = [x]
        for choice in choices:
            try:
                y = emit(deep_emit(emit, move(choice, values, n)))
            except (ValueError, TypeError, IndexError, RuntimeError, AttributeError):
                continue
            if isinstance(y.ty, relax.TensorType) and y.ty.shape is not None and len(y.ty.shape.values):
                values.append(y)
        return values[-1]

    return textbook.embedded(body)


def deep_emit(emit, call):
    """Operands of operands bound, as the imported form has them."""
    args = [emit(deep_emit(emit, a)) if isinstance(a, relax.Call) else a for a in call.args]
    return relax.Call(call.op, args, call.attrs, call.ty_args)


CHOICE = st.tuples(st.sampled_from(MOVES), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(CHOICE, min_size=2, max_size=7))
def test_random_programs_that_are_accepted_keep_tokens_apart(choices):
    check_random(choices)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CHOICE, min_size=2, max_size=9))
def test_many_random_programs_that_are_accepted_keep_tokens_apart(choices):
    check_random(choices)


def check_random(choices):
    module = random_program(choices)
    try:
        state = analysed(module)
    except MixesTokens:
        return
    assert reached(module, state) == set(), f"{state} of\n{module}"
