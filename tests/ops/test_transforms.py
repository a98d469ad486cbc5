"""The public functions under every transform of torch: derivatives of any order in both modes, torch.func, vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.additive_attention import SELECTIONS, additive_functions, additive_inputs, key_selection
from support.comparison import assert_all_close, assert_same_bits, flatten
from support.devices import num_threads
from support.inputs import leaf
from support.multilayer import multilayer_functions, multilayer_inputs
from support.pairwise import parametrize_pairwise
from support.pooling import pool_functions, pool_inputs
from support.recurrences import (
    ARCHITECTURES,
    GRU,
    LSTM,
    PROJECTED,
    RECURRENCES,
    RNN,
    Recurrence,
    recurrence_functions,
    recurrence_inputs,
)
from support.registered_ops import tensor_ops
from support.tolerances import DTYPES, HALF_DTYPES
from support.transforms import TRANSFORMS, Call, check_derivatives, check_transform
from torch import Tensor, func
from torch.autograd import forward_ad

import llm_ext
from llm_ext import ArgumentError, ops, reference

T, B, I, H = 3, 2, 2, 3  # noqa: E741
FORMS = ("whole", "packed", "lengths")
Case = tuple[list[Callable[..., Any]], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread only waits at these sizes."""
    with num_threads(1):
        yield


def rows_of(form: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of x, and the option that says what its rows are; one of the lengths is 0."""
    if form == "packed":
        return (4, I), {"batch_sizes": torch.tensor([2, 1, 1])}
    return (T, B, I), {"lengths": torch.tensor([2, 0])} if form == "lengths" else {}


def one_direction(
    recurrence: Recurrence, form: str, reverse: bool, state: bool, bias: bool, dtype: torch.dtype
) -> Case:
    x_shape, options = rows_of(form)
    inputs = recurrence_inputs(recurrence, x_shape, B, H, dtype, state=state, bias=bias)
    return recurrence_functions(recurrence, reverse=reverse, **options), inputs


def several(recurrence: Recurrence, form: str, stack: str, state: bool, dtype: torch.dtype) -> Case:
    x_shape, options = rows_of(form)
    both = stack == "bidirectional"
    inputs = multilayer_inputs(
        recurrence, x_shape, B, H, dtype, layers=1 if both else 2, bidirectional=both, state=state
    )
    return multilayer_functions(recurrence, bidirectional=both, **options), inputs


def packed_has_a_state(form: str, state: bool, **_: Any) -> bool:
    return state or form != "packed"


one_layer_options: dict[str, Any] = {
    "recurrence": RECURRENCES,
    "form": FORMS,
    "reverse": (False, True),
    "state": (True, False),
    "bias": (True, False),
}
several_options: dict[str, Any] = {
    "recurrence": ARCHITECTURES,
    "form": FORMS,
    "stack": ("two layers", "bidirectional"),
    "state": (True, False),
}


@parametrize_pairwise(packed_has_a_state, **one_layer_options)
def test_derivatives_of_one_layer(recurrence: Recurrence, form: str, reverse: bool, state: bool, bias: bool) -> None:
    (function, _), inputs = one_direction(recurrence, form, reverse, state, bias, torch.float64)
    check_derivatives(function, inputs)


@parametrize_pairwise(packed_has_a_state, **one_layer_options, transform=tuple(TRANSFORMS), dtype=DTYPES)
def test_transforms_of_one_layer(
    recurrence: Recurrence, form: str, reverse: bool, state: bool, bias: bool, transform: str, dtype: torch.dtype
) -> None:
    check_transform(recurrence.op, transform, *one_direction(recurrence, form, reverse, state, bias, dtype))


@parametrize_pairwise(recurrence=(GRU, PROJECTED), form=FORMS, stack=("two layers", "bidirectional"))
def test_derivatives_of_several_layers(recurrence: Recurrence, form: str, stack: str) -> None:
    (function, _), inputs = several(recurrence, form, stack, True, torch.float64)
    check_derivatives(function, inputs)


@parametrize_pairwise(packed_has_a_state, **several_options, transform=tuple(TRANSFORMS), dtype=DTYPES)
def test_transforms_of_several_layers(
    recurrence: Recurrence, form: str, stack: str, state: bool, transform: str, dtype: torch.dtype
) -> None:
    check_transform(recurrence.op, transform, *several(recurrence, form, stack, state, dtype))


# ---- linear, pooling, attention


def linear_case(kind: str, dtype: torch.dtype) -> Case:
    shape, bias = {"rows": ((3, 4), True), "vector": ((4,), True), "cube": ((2, 3, 4), False)}[kind]
    inputs = {"x": leaf(*shape, dtype=dtype), "weight": leaf(2, 4, dtype=dtype)}
    if bias:
        inputs["bias"] = leaf(2, dtype=dtype)
    return [ops.linear, torch.nn.functional.linear], inputs


POOLS = ("folded", "scores", "prefix, folded", "prefix, scores", "prefix, state")
SELECTED = ("none", "lengths", "mask", "both")


def pool_case(kind: str, selected: str, dtype: torch.dtype) -> Case:
    """The second row is empty."""
    lengths, mask = torch.tensor([3, 0]), torch.tensor([[True, False, True, True], [False] * 4])
    options: dict[str, Any] = {}
    if selected in ("lengths", "both"):
        options["lengths"] = lengths
    if selected in ("mask", "both"):
        options["mask"] = mask
    inputs = pool_inputs(2, 4, 3, dtype, folded=kind.endswith("folded"), state=kind.endswith("state"))
    return pool_functions(kind.startswith("prefix"), **options), inputs


def additive_case(kind: str, need_weights: bool, dtype: torch.dtype) -> Case:
    options = key_selection(kind, 2, 3, 4)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor([3, 0])
    return additive_functions(need_weights=need_weights, **options), additive_inputs(2, 3, 4, 3, 2, dtype)


@pytest.mark.parametrize("kind", ["rows", "vector", "cube"])
def test_derivatives_of_linear(kind: str) -> None:
    (function, _), inputs = linear_case(kind, torch.float64)
    check_derivatives(function, inputs)


@parametrize_pairwise(kind=("rows", "vector", "cube"), transform=tuple(TRANSFORMS), dtype=DTYPES)
def test_transforms_of_linear(kind: str, transform: str, dtype: torch.dtype) -> None:
    check_transform("linear", transform, *linear_case(kind, dtype))


def without_lse(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the log-sum-exp, which is -inf where finite differences need a number."""

    def run(**inputs: Tensor) -> list[Tensor]:
        return [t for t in flatten(function(**inputs)) if t.isfinite().all()]

    return run


@parametrize_pairwise(kind=POOLS, selected=SELECTED)
def test_derivatives_of_pooling(kind: str, selected: str) -> None:
    (function, _), inputs = pool_case(kind, selected, torch.float64)
    check_derivatives(without_lse(kind, function), inputs)


@parametrize_pairwise(kind=POOLS, selected=SELECTED, transform=tuple(TRANSFORMS), dtype=DTYPES)
def test_transforms_of_pooling(kind: str, selected: str, transform: str, dtype: torch.dtype) -> None:
    op = "prefix_pool" if kind.startswith("prefix") else "attention_pool"
    check_transform(op, transform, *pool_case(kind, selected, dtype))


def test_a_state_passes_masked_positions_unchanged() -> None:
    e, scores, states = torch.randn(2, 3, 4), torch.randn(2, 3), torch.randn(5, 2, 4)
    empty, none = torch.tensor([[-torch.inf, 0.0]] * 2), torch.zeros(2, 3, dtype=torch.bool)

    def run(c0: Tensor) -> Tensor:
        return ops.prefix_pool(e, scores=scores, mask=none, state=(empty, c0))[0]

    assert torch.equal(torch.stack([run(c0) for c0 in states]), states[:, :, None].expand(-1, -1, 3, -1))
    assert torch.equal(func.vmap(run)(states), states[:, :, None].expand(-1, -1, 3, -1))


@parametrize_pairwise(kind=SELECTIONS, need_weights=(True, False))
def test_derivatives_of_additive_attention(kind: str, need_weights: bool) -> None:
    (function, _), inputs = additive_case(kind, need_weights, torch.float64)
    check_derivatives(function, inputs)


@parametrize_pairwise(kind=SELECTIONS, need_weights=(True, False), transform=tuple(TRANSFORMS), dtype=DTYPES)
def test_transforms_of_additive_attention(kind: str, need_weights: bool, transform: str, dtype: torch.dtype) -> None:
    check_transform("additive_attention", transform, *additive_case(kind, need_weights, dtype))


# ---- lengths and masks as mapped arguments


def check_mapped_option(
    op: str, functions: list[Callable[..., Any]], inputs: dict[str, Tensor], option: Tensor
) -> None:
    """A vmap over `option` alone and over data with it gives what one call of the reference for each gives."""
    function, ref = functions
    tensors = tuple(tensor.detach() for tensor in inputs.values())

    def loss(run: Callable[..., Any]) -> Callable[..., Tensor]:
        def total(option: Tensor, *tensors: Tensor) -> Tensor:
            results = run(option, **dict(zip(inputs, tensors, strict=True)))
            return sum((t.masked_fill(t.isinf(), 0).square().sum() for t in flatten(results)), torch.zeros(()))

        return total

    every = tuple(range(1, 1 + len(tensors)))
    stacked = tuple(torch.stack([tensor * (1 + 0.1 * i) for i in range(len(option))]) for tensor in tensors)
    gradients = func.grad(loss(ref), every)
    mapped = func.vmap(func.grad(loss(function), every), (0, *[None] * len(tensors)))(option, *tensors)
    together = func.vmap(func.grad(loss(function), every))(option, *stacked)
    for i, one in enumerate(option):
        assert_all_close(f"{op}_backward", [g[i] for g in mapped], gradients(one, *tensors))
        assert_all_close(f"{op}_backward", [g[i] for g in together], gradients(one, *(t[i] for t in stacked)))


@pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
def test_vmap_over_lengths(recurrence: Recurrence) -> None:
    inputs = multilayer_inputs(recurrence, (T, B, I), B, H, torch.float64, layers=2, bidirectional=True)

    def run(module: int, lengths: Tensor, **inputs: Tensor) -> Any:
        return multilayer_functions(recurrence, bidirectional=True, lengths=lengths)[module](**inputs)

    check_mapped_option(
        recurrence.op,
        [lambda option, module=i, **inputs: run(module, option, **inputs) for i in (0, 1)],
        inputs,
        torch.tensor([[3, 1], [0, 2], [0, 0]]),
    )


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("option", ["lengths", "mask"])
def test_vmap_over_positions_to_pool(prefix: bool, option: str) -> None:
    values = torch.tensor([[3, 1], [0, 4]]) if option == "lengths" else torch.rand(2, 2, 4) < 0.5
    check_mapped_option(
        "prefix_pool" if prefix else "attention_pool",
        [lambda value, module=i, **inputs: pool_functions(prefix, **{option: value})[module](**inputs) for i in (0, 1)],
        pool_inputs(2, 4, 3, torch.float64, folded=True),
        values,
    )


@pytest.mark.parametrize("option", ["key_lengths", "mask"])
def test_vmap_over_keys_to_attend_to(option: str) -> None:
    values = torch.tensor([[3, 1], [0, 4]]) if option == "key_lengths" else torch.rand(2, 2, 3, 4) < 0.5
    check_mapped_option(
        "additive_attention",
        [lambda value, module=i, **inputs: additive_functions(**{option: value})[module](**inputs) for i in (0, 1)],
        additive_inputs(2, 3, 4, 3, 2, torch.float64),
        values,
    )


# ---- functions for inference


def attention_step_case() -> tuple[list[Callable[..., Any]], tuple[Tensor, ...]]:
    layer = torch.nn.GRU(I, H, dtype=torch.float64)
    weights = [[tensor.detach() for tensor in row] for row in layer.all_weights]
    sizes = {"x": (1, 4, I), "h0": (1, 4, H), "w_query": (2, H), "keys": (2, 5, 2), "v": (2,), "values": (2, 5, 3)}
    tensors = tuple(torch.randn(size, dtype=torch.float64) for size in (*sizes.values(), (3, H)))

    def bind(module: Any) -> Callable[..., Any]:
        lengths = torch.tensor([5, 3])
        step = partial(module.attention_step, "GRU", key_lengths=lengths)
        return lambda x, h0, *others: flatten(step(x, (h0,), weights, *others))

    return [bind(ops), bind(reference)], tensors


def test_attention_step() -> None:
    """It is for inference; under a transform it has the derivatives of the reference, without one it refuses them."""
    functions, tensors = attention_step_case()
    function, ref = functions
    every = tuple(range(len(tensors)))
    for transform in (func.jacrev, func.jacfwd):
        assert_all_close("gru_backward", transform(function, every)(*tensors), transform(ref, every)(*tensors))
    stacked = tuple(torch.stack([t, t * 2]) for t in tensors)
    assert_all_close("gru_backward", func.vmap(function)(*stacked), func.vmap(ref)(*stacked))
    actual, expected = (
        func.vmap(func.grad(lambda *t, run=run: run(*t)[0].sum(), every))(*stacked) for run in (function, ref)
    )
    assert_all_close("gru_backward", actual, expected)
    out, *_ = function(tensors[0].requires_grad_(), *tensors[1:])
    with pytest.raises(RuntimeError, match="no derivative; it is for inference"):
        torch.autograd.backward(out.sum())


def test_linear_argmax() -> None:
    x, weight = torch.randn(3, 5, 4), torch.randn(2, 4)
    expected = ops.linear_argmax(x, weight)
    assert torch.equal(func.vmap(ops.linear_argmax, (0, None))(x, weight), expected)
    index, tangent = func.jvp(lambda x: ops.linear_argmax(x, weight), (x,), (x,))  # type: ignore[misc]
    assert torch.equal(index, expected)
    assert not tangent.any()


# ---- 16 bits and autocast

CASES: dict[str, Callable[[torch.dtype], Case]] = {
    **{
        recurrence.op: lambda dtype, recurrence=recurrence: one_direction(  # type: ignore[misc]
            recurrence, "whole", False, True, True, dtype
        )
        for recurrence in (RNN, GRU, LSTM)
    },
    "linear": lambda dtype: linear_case("rows", dtype),
    "attention_pool": lambda dtype: pool_case("folded", "mask", dtype),
    "prefix_pool": lambda dtype: pool_case("prefix, folded", "mask", dtype),
    "additive_attention": lambda dtype: additive_case("mask", True, dtype),
}


@parametrize_pairwise(
    name=tuple(CASES),
    transform=("double backward", "dual level", "grad", "jvp", "hessian", "per-sample gradients", "vmap of weights"),
    autocast=(False, True),
    dtype=HALF_DTYPES,
)
def test_16_bits(name: str, transform: str, autocast: bool, dtype: torch.dtype) -> None:
    """Results are in the dtype of the inputs, and near those of float64."""
    given = torch.float32 if autocast else dtype
    (function, ref), inputs = CASES[name](given)
    with torch.autocast("cpu", dtype, enabled=autocast):
        actual = flatten(TRANSFORMS[transform](Call(function, inputs)))
    doubles = {key: tensor.detach().double() for key, tensor in inputs.items()}
    expected = flatten(TRANSFORMS[transform](Call(ref, doubles)))
    for a, b in zip(actual, expected, strict=True):
        # Products of several rounded factors; a missing term is off by about 1.
        scale = max(1.0, b.abs().nan_to_num(posinf=1).max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.1 * scale)


@pytest.mark.parametrize("recurrence", [RNN, GRU, LSTM], ids=str)
def test_gradients_of_16_bits_are_computed_in_float32(recurrence: Recurrence) -> None:
    """Those that are recorded are as exact as those of the kernel."""
    function, ref = recurrence_functions(recurrence)
    inputs = recurrence_inputs(recurrence, (100, 4, 8), 4, 16, torch.bfloat16)
    weights = torch.randn(100, 4, 16).bfloat16()

    def gradient(run: Callable[..., Any], dtype: torch.dtype, **options: bool) -> Tensor:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        y = run(**leaves)[0]
        return torch.autograd.grad(y, leaves["x"], weights.to(dtype), **options)[0].double()

    expected = gradient(ref, torch.float64)
    recorded, kernel = (gradient(function, torch.bfloat16, create_graph=each) for each in (True, False))
    assert (recorded - expected).norm() < 1.1 * (kernel - expected).norm()


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear"])  # under a transform it is torch's
def test_autocast_of_rounded_inputs(name: str) -> None:
    """Under autocast, layers pass each other rounded results beside weights in float32."""
    (function, _), inputs = CASES[name](torch.float32)
    first = next(iter(inputs))
    rounded = inputs[first].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = func.vmap(lambda tensor: function(**inputs | {first: tensor}))(torch.stack((rounded,)))
        expected = function(**inputs | {first: rounded})
    for actual, other in zip(flatten(found), flatten(expected), strict=True):
        assert actual.dtype == other.dtype
        torch.testing.assert_close(actual[0], other)


@pytest.mark.parametrize("layout", ["whole", "packed", "no steps"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("recurrence", [RNN, GRU, LSTM], ids=str)
def test_results_share_no_memory(recurrence: Recurrence, reverse: bool, layout: str) -> None:
    """A new state that is written to changes neither y nor the given state."""
    T = 0 if layout == "no steps" else 3
    inputs = recurrence_inputs(recurrence, (5, 2) if layout == "packed" else (T, 2, 2), 2, 3, torch.float32)
    sizes = torch.tensor([2, 2, 1]) if layout == "packed" else None
    function, _ = recurrence_functions(recurrence, reverse=reverse, batch_sizes=sizes)

    def write(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        given = {name: tensor.clone() for name, tensor in inputs.items()} | {"x": x}
        y, *last = function(**given)
        kept = [y, *(given[name] for name in ("h0", "c0") if name in given)]
        before = [tensor.clone() for tensor in kept]
        for tensor in last:
            tensor.zero_()
        return before, kept

    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            before, after = func.vmap(write)(torch.stack((inputs["x"], inputs["x"])))
        assert_same_bits(before, after)


# ---- errors


BAD: list[tuple[str, Callable[[Tensor], Any], tuple[int, ...]]] = [
    ("rnn", lambda x: ops.rnn(x, None, torch.zeros(3, 5), torch.zeros(3, 3)), (3, 2, 2)),
    ("gru", lambda x: ops.gru(x, torch.zeros(2, 4), torch.zeros(9, 2), torch.zeros(9, 3)), (3, 2, 2)),
    ("lstm", lambda x: ops.lstm(x, None, torch.zeros(12, 2), torch.zeros(12, 4)), (3, 2, 2)),
    ("lengths", lambda x: ops.gru(x, None, *torch.zeros(2, 9, 3), lengths=torch.tensor([4, 1])), (3, 2, 3)),
    ("batch_sizes", lambda x: ops.gru(x, None, *torch.zeros(2, 9, 3), batch_sizes=torch.tensor([1, 2])), (3, 3)),
    (
        "multilayer_rnn",
        lambda x: ops.multilayer_rnn("GRU", x, None, [tuple(torch.zeros(2, 9, n)) for n in (3, 4)]),
        (3, 2, 3),
    ),
    ("dtype", lambda x: ops.rnn(x, None, *torch.zeros(2, 3, 3, dtype=torch.float64)), (3, 2, 3)),
    ("attention_pool", lambda e: ops.attention_pool(e, torch.zeros(4)), (2, 3, 5)),
    ("prefix_pool", lambda e: ops.prefix_pool(e, scores=torch.zeros(2, 4)), (2, 3, 5)),
    ("mask", lambda e: ops.prefix_pool(e, scores=torch.zeros(2, 3), mask=torch.zeros(2, 3)), (2, 3, 5)),
    ("additive", lambda q: ops.additive_attention(q, q, torch.zeros(3), q[:1]), (2, 3, 5)),
]


@pytest.mark.parametrize(("function", "shape"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_errors_are_the_same(function: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    """A wrong argument raises what it raises without a transform."""
    x = torch.zeros(shape)
    with pytest.raises(Exception, match=r".*") as plain:
        function(x)
    assert isinstance(plain.value, llm_ext.ArgumentError)

    def under_jvp() -> None:
        func.jvp(function, (x,), (x,))

    def under_vmap() -> None:
        func.vmap(function)(torch.zeros(3, *shape))

    def under_grad() -> None:
        func.grad(function)(x)

    def under_dual_level() -> None:
        with forward_ad.dual_level():
            function(forward_ad.make_dual(x, x))  # type: ignore[no-untyped-call]

    for run in (under_jvp, under_vmap, under_grad, under_dual_level):
        with pytest.raises(type(plain.value)) as transformed:
            run()
        assert str(transformed.value) == str(plain.value)


# ---- the registered ops, which have no forward mode


@pytest.mark.parametrize("name", tensor_ops())
def test_no_op_loses_a_tangent(name: str) -> None:
    """A registered op that gets a tangent refuses, whichever argument has it; none returns a result without one.

    An op with a forward-mode derivative of its own needs a test of it, and an exception here.
    """
    op = getattr(torch.ops.llm_ext, name).default
    parameters = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    plain: dict[str, Any] = {"str": "tanh", "bool": False, "List[Tensor]": []}
    given = {key: plain.get(kind, torch.ones(1, 1)) for key, kind in parameters}
    tangible = [(key, kind) for key, kind in parameters if "Tensor" in kind]
    assert tangible

    def call(key: str, kind: str, tensor: Tensor) -> Any:
        return op(*(given | {key: [tensor] if kind == "List[Tensor]" else tensor}).values())

    for key, kind in tangible:
        one = torch.ones(1, 1)
        with pytest.raises(NotImplementedError, match=rf"llm_ext\.{name} has no forward-mode derivative"):
            func.jvp(lambda t, key=key, kind=kind: call(key, kind, t), (one,), (one,))
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(one, one)  # type: ignore[no-untyped-call]
            with pytest.raises(NotImplementedError, match=rf"llm_ext\.{name} has no forward-mode derivative"):
                call(key, kind, dual)


def test_batch_sizes_cannot_be_mapped() -> None:
    x, h0, w = torch.randn(3, 2), torch.zeros(2, 4), (torch.randn(4, 2), torch.randn(4, 4))
    with pytest.raises(ArgumentError, match="batch_sizes must be the same for all samples"):
        func.vmap(lambda sizes: ops.rnn(x, h0, *w, batch_sizes=sizes)[0])(torch.tensor([[2, 1], [2, 1]]))


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
def test_forward_mode_over_double_backward(recurrence: Recurrence) -> None:
    """A second backward pass that is not recorded has tangents all the same."""
    functions, inputs = one_direction(recurrence, "whole", True, True, True, torch.float64)
    found = []
    for call in (Call(function, inputs) for function in functions):
        leaves = call.leaves()
        with forward_ad.dual_level():
            make_dual: Any = forward_ad.make_dual
            unpack_dual: Any = forward_ad.unpack_dual
            duals = [make_dual(leaf, tangent) for leaf, tangent in zip(leaves, call.dx, strict=True)]
            gradients = torch.autograd.grad(call.loss(*duals), leaves, create_graph=True)
            penalty = sum((g.square().sum() for g in gradients), torch.zeros(()))
            found.append([unpack_dual(result).tangent for result in torch.autograd.grad(penalty, leaves)])
    actual, expected = found
    assert_all_close(f"{recurrence.op}_backward", actual, expected)


@pytest.mark.parametrize("recurrence", [RECURRENCES[1], PROJECTED], ids=str)
def test_nested_forward_mode_over_pullbacks(recurrence: Recurrence) -> None:
    """The second level begins after the forward pass, whose results have tangents of the first one."""
    functions, inputs = one_direction(recurrence, "whole", True, True, True, torch.float64)
    found: list[Any] = [[], []]
    for call, results in zip((Call(function, inputs) for function in functions), found, strict=True):

        def tangents(*tensors: Tensor, call: Any = call) -> Any:
            y, pull = func.vjp(lambda *each: tuple(flatten(call.function(*each))), *tensors)  # type: ignore[misc]
            _, pull_twice = func.vjp(pull, y)  # type: ignore[misc]
            of_pull = func.jvp(lambda *g: pull(g), y, tuple(g.square() for g in y))[1]
            return of_pull, func.jvp(lambda *g: pull_twice(g), call.dx, call.dx)[1]

        results += flatten(func.jvp(tangents, call.x, call.dx)[1])
    assert_all_close(f"{recurrence.op}_backward", *found)


@pytest.mark.parametrize("op", ["rnn", "gru", "lstm"])
def test_tangents_without_a_step(op: str) -> None:
    """The tangent of the new state is that of the first one."""
    gates, layer_state = {"rnn": 1, "gru": 3, "lstm": 4}[op], [torch.randn(2, 4) for _ in range(1 + (op == "lstm"))]
    weights = torch.randn(gates * 4, 3), torch.randn(gates * 4, 4)

    def last(*state: Tensor) -> list[Tensor]:
        return flatten(getattr(ops, op)(torch.zeros(0, 2, 3), state if op == "lstm" else state[0], *weights)[1])

    _, tangents = func.jvp(last, tuple(layer_state), tuple(2 * tensor for tensor in layer_state))  # type: ignore[misc]
    assert_same_bits(tangents, [2 * tensor for tensor in layer_state])


@pytest.mark.parametrize(("T", "B"), [(0, 2), (3, 0)])
@pytest.mark.parametrize("op", ["gru", "lstm"])
def test_double_backward_of_empty_sequences(op: str, T: int, B: int) -> None:
    """Without a step the new state is the first one, and without rows nothing depends on anything."""
    gates = 3 if op == "gru" else 4
    x, h0 = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((T, B, 2), (B, 4)))
    weights = [torch.randn(gates * 4, n, dtype=torch.float64, requires_grad=True) for n in (2, 4)]
    found = []
    for module in (ops, reference):
        state = h0 if op == "gru" else (h0, h0 * 2)
        y, last = getattr(module, op)(x, state, *weights)
        total = sum((r.square().sum() for r in (y, *(last if isinstance(last, tuple) else (last,)))), h0.sum())
        (dh0,) = torch.autograd.grad(total, h0, create_graph=True)
        found.append((dh0, *torch.autograd.grad(dh0.square().sum(), h0)))
    torch.testing.assert_close(found[0], found[1])
