"""The layers under every transform of torch, against torch.nn and the reference: derivatives, torch.func, ensembles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.comparison import assert_all_close, assert_close, flatten
from support.devices import num_threads
from support.inputs import leaf
from support.layers import CELLS, LAYERS, layer_pair, op_of
from support.pairwise import parametrize_pairwise
from support.pooling import log_sum_exp
from support.tolerances import DTYPES
from support.transforms import check_derivatives, check_transform
from torch import Tensor, func, nn
from torch.nn.utils.rnn import PackedSequence

import llm_ext
from llm_ext import reference

T, B, I, H = 3, 2, 2, 3  # noqa: E741
Parameters = dict[str, Tensor]
# A layer adds little to its op, which is tested under all transforms: one of each kind.
LAYER_TRANSFORMS = (
    "double backward",
    "double backward of one input",
    "is_grads_batched",
    "dual level",
    "dual level, no_grad",
    "dual level of backward",
    "functional.hessian",
    "hessian",
    "jacfwd of jacfwd",
    "vmap of data",
    "vmap of weights",
    "vmap of one input",
    "vmap of the last dimension",
    "vmap of vmap",
    "per-sample gradients",
    "vmap of jvp",
    "grad of vmap",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A second thread only waits at these sizes."""
    with num_threads(1):
        yield


class Case(NamedTuple):
    """A layer, what computes the same, and their tensors: inputs and parameters by name."""

    op: str
    functions: list[Callable[..., Any]]
    inputs: dict[str, Tensor]


def parameters_of(layer: nn.Module, dtype: torch.dtype) -> Parameters:
    """Random parameters: no bias is zero."""
    return {name: leaf(*p.shape, dtype=dtype, scale=0.5) for name, p in layer.named_parameters()}


def called(layer: nn.Module, call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)) -> Callable[..., Any]:
    """A layer as a function of its inputs and parameters by name."""

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, **inputs: Tensor) -> Any:
            return flatten(call(self.layer, *inputs.values()))

    caller = Caller()

    def run(**tensors: Tensor) -> Any:
        own = {f"layer.{name}": tensors[name] for name, _ in layer.named_parameters()}
        inputs = {name: t for name, t in tensors.items() if f"layer.{name}" not in own}
        return func.functional_call(caller, own, (), inputs)

    return run


# ---- recurrent layers and cells


def call_recurrent(rows: str) -> Callable[..., Any]:
    """How a layer or torch's is called with x and its state."""

    def call(layer: Any, x: Tensor, *state: Tensor) -> Any:
        hx = (state if len(state) > 1 else state[0]) if state else None
        if rows == "packed":
            # Rows in another order than that of their lengths.
            order = torch.tensor([1, 0])
            y, last = layer(PackedSequence(x, torch.tensor([2, 1, 1]), order, order), hx)
            return y.data, last
        return layer(x, hx, lengths=torch.tensor([2, 0])) if rows == "lengths" else layer(x, hx)

    return call


def by_reference(layer: Any, rows: str) -> Callable[..., Any]:
    """The reference of a recurrent layer as a function of its inputs and parameters; vmap maps over it."""

    def run(x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **weights: Tensor) -> Any:
        names = [name for name, _ in layer.named_parameters()]
        each = len(names) // (layer.num_layers * (1 + layer.bidirectional))
        groups = [[weights[name] for name in names[i : i + each]] for i in range(0, len(names), each)]
        state: tuple[Tensor, ...] | None = None if h0 is None else (h0,) if c0 is None else (h0, c0)
        options: dict[str, Any] = {"bidirectional": layer.bidirectional}
        if rows == "packed":
            options["batch_sizes"] = torch.tensor([2, 1, 1])
            shape = (len(groups), 2)
            sizes = (groups[0][1].shape[1], H)[: 1 + (layer.mode == "LSTM")]
            state = state or tuple(x.new_zeros(*shape, size) for size in sizes)
            state = tuple(tensor.flip(1) for tensor in state)
        elif rows == "lengths":
            options["lengths"] = torch.tensor([2, 0])
        if rows == "unbatched":
            x, state = x[:, None], None if state is None else tuple(tensor[:, None] for tensor in state)
        y, last = reference.multilayer_rnn(
            layer.mode, x.transpose(0, 1) if layer.batch_first else x, state, groups, **options
        )
        if rows == "unbatched":
            return y[:, 0], *(tensor[:, 0] for tensor in last)
        if rows == "packed":
            last = tuple(tensor.flip(1) for tensor in last)
        return y.transpose(0, 1) if layer.batch_first else y, *last

    return run


def recurrent_case(
    name: str, rows: str, options: dict[str, Any], state: bool, dtype: torch.dtype, torch_nn: bool
) -> Case:
    """`torch_nn`: compare with the layer of torch.nn and not with the reference."""
    options = {"input_size": I, "hidden_size": H} | options
    if name == "RNN" and options.pop("sigmoid", False):
        options["nonlinearity"] = "sigmoid"
    options.pop("sigmoid", None)
    if rows in ("packed", "lengths", "unbatched"):
        options.pop("batch_first", None)
    sigmoid = options.get("nonlinearity") == "sigmoid"
    if sigmoid:
        layer: Any = llm_ext.RNN(**options)
    else:
        layer, torch_layer = layer_pair(name, options)
    shape = {"packed": (4, I), "unbatched": (T, I)}.get(rows, (B, T, I) if layer.batch_first else (T, B, I))
    inputs = {"x": leaf(*shape, dtype=dtype)}
    if state:
        R, P = layer.num_layers * (1 + layer.bidirectional), getattr(layer, "proj_size", 0) or H
        batch = () if rows == "unbatched" else (B,)
        inputs["h0"] = leaf(R, *batch, P, dtype=dtype)
        if name == "LSTM":
            inputs["c0"] = leaf(R, *batch, H, dtype=dtype)
    inputs |= parameters_of(layer, dtype)
    call = call_recurrent(rows)
    usable = torch_nn and rows in ("whole", "unbatched") and not sigmoid
    other = called(torch_layer, call) if usable else by_reference(layer, rows)
    return Case(op_of(name), [called(layer, call), other], inputs)


def torch_has(transform: str) -> bool:
    """Whether recurrent layers of torch.nn work under a transform; they have no rule for vmap."""
    return "vmap" not in transform and "per-sample" not in transform


OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2, "sigmoid": True},
    "bidirectional": {"bidirectional": True},
    "projected": {"projected": True, "bidirectional": True},
    "no bias": {"bias": False, "batch_first": True},
}
ROWS = ("whole", "packed", "lengths", "unbatched")


def is_different(name: str, options: str, **_: Any) -> bool:
    return options != "projected" or name == "LSTM"


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("RNN", "whole", "two layers"),
        ("RNN", "unbatched", "no bias"),
        ("GRU", "packed", "bidirectional"),
        ("LSTM", "whole", "one layer"),
    ],
)
def test_derivatives_of_recurrent_layers(name: str, rows: str, options: str) -> None:
    case = recurrent_case(name, rows, OPTIONS[options], True, torch.float64, False)
    check_derivatives(case.functions[0], case.inputs)


@parametrize_pairwise(
    is_different,
    name=LAYERS,
    rows=ROWS,
    options=tuple(OPTIONS),
    state=(True, False),
    transform=LAYER_TRANSFORMS,
    dtype=DTYPES,
)
def test_transforms_of_recurrent_layers(
    name: str, rows: str, options: str, state: bool, transform: str, dtype: torch.dtype
) -> None:
    """Against torch.nn; against the reference where torch.nn cannot: under vmap, and with packed rows."""
    case = recurrent_case(name, rows, OPTIONS[options], state, dtype, torch_has(transform))
    check_transform(case.op, transform, case.functions, case.inputs)


def cell_case(name: str, bias: bool, dtype: torch.dtype, torch_nn: bool) -> Case:
    cell, torch_cell = layer_pair(name, {"input_size": I, "hidden_size": H, "bias": bias})
    inputs = {"x": leaf(B, I, dtype=dtype), "h0": leaf(B, H, dtype=dtype)}
    if name == "LSTMCell":
        inputs["c0"] = leaf(B, H, dtype=dtype)
    call = call_recurrent("whole")

    def plain(x: Tensor, h0: Tensor, c0: Tensor | None = None, **weights: Tensor) -> Any:
        state = h0 if c0 is None else (h0, c0)
        return flatten(getattr(reference, op_of(name))(x[None], state, *weights.values())[1])

    other = called(torch_cell, call) if torch_nn else plain
    return Case(op_of(name), [called(cell, call), other], inputs | parameters_of(cell, dtype))


@parametrize_pairwise(name=CELLS, bias=(True, False))
def test_derivatives_of_cells(name: str, bias: bool) -> None:
    case = cell_case(name, bias, torch.float64, False)
    check_derivatives(case.functions[0], case.inputs)


@parametrize_pairwise(name=CELLS, bias=(True, False), transform=LAYER_TRANSFORMS, dtype=DTYPES)
def test_transforms_of_cells(name: str, bias: bool, transform: str, dtype: torch.dtype) -> None:
    case = cell_case(name, bias, dtype, torch_has(transform))
    check_transform(case.op, transform, case.functions, case.inputs)


# ---- linear, attention, the language model


def linear_case(dtype: torch.dtype) -> Case:
    layers = llm_ext.Linear(4, 2), nn.Linear(4, 2)
    inputs = {"x": leaf(2, 3, 4, dtype=dtype)} | parameters_of(layers[0], dtype)
    return Case("linear", [called(layer) for layer in layers], inputs)


MASK = torch.tensor([[True, False, True, True], [False] * 4])


def pool_case(score: str, causal: bool, dtype: torch.dtype) -> Case:
    """With a mask, of which one row is empty, and the weights as results."""
    pool = llm_ext.AttentionPool(3, 2, score=score, causal=causal)

    def plain(e: Tensor, weight: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        inner = e @ weight.T
        scores = (inner if bias is None else torch.tanh(inner + bias)) @ v
        where = MASK[:, None] & torch.ones(4, 4, dtype=torch.bool).tril() if causal else MASK[:, None]
        s = scores[:, None].expand(where.shape)
        empty = ~where.any(-1, keepdim=True)
        alpha = torch.softmax(s.masked_fill(~where, -math.inf).masked_fill(empty, 0), -1).masked_fill(empty, 0)
        c = alpha @ e
        if not causal:
            return c[:, 0], alpha[:, 0]
        last = torch.where(MASK, scores, -math.inf).masked_fill(empty[:, -1], 0).logsumexp(1)
        return c, last.masked_fill(empty[:, -1, 0], -math.inf), c[:, -1], alpha

    inputs = {"e": leaf(2, 4, 3, dtype=dtype)} | parameters_of(pool, dtype)
    op = "prefix_pool" if causal else "attention_pool"

    def call(pool: Any, e: Tensor) -> Any:
        results = pool(e, None, MASK, True)
        if not causal:
            return results
        c, (L, last), alpha = results
        return c, log_sum_exp(L), last, alpha

    return Case(op, [called(pool, call), plain], inputs)


def additive_case(masked: bool, dtype: torch.dtype) -> Case:
    layer = llm_ext.AdditiveAttention(3, 4, 2)
    lengths = torch.tensor([3, 0]) if masked else torch.tensor([4, 4])

    def plain(query: Tensor, keys: Tensor, **w: Tensor) -> Any:
        k = keys @ w["k_proj_weight"].T + w["bias"]
        s = torch.tanh((query @ w["q_proj_weight"].T)[:, :, None] + k[:, None]) @ w["v"]
        where = (torch.arange(4) < lengths[:, None])[:, None]
        empty = ~where.any(-1, keepdim=True)
        s = s.masked_fill(~where, -math.inf).masked_fill(empty, 0)
        alpha = torch.softmax(s, -1).masked_fill(empty, 0)
        return alpha @ keys, alpha

    def call(layer: Any, query: Tensor, keys: Tensor) -> Any:
        return layer(query, keys, key_lengths=lengths if masked else None, need_weights=True)

    inputs = {"query": leaf(2, 3, 3, dtype=dtype), "keys": leaf(2, 4, 4, dtype=dtype)}
    return Case("additive_attention", [called(layer, call), plain], inputs | parameters_of(layer, dtype))


def model_case(cell: str, dtype: torch.dtype) -> Case:
    """The scores of a language model with two layers and causal attention, as a function of its parameters."""
    model = llm_ext.LLM(4, 2, 3, 4, 2, 0.0, cell=cell, attn_dim=2)
    ids = torch.tensor([[0, 3, 1], [2, 2, 0]])

    def plain(**w: Tensor) -> Tensor:
        e = F.embedding(ids.T, w["embedding.weight"]) + w["embedding.bias"]
        layers = [
            [tensor for name, tensor in w.items() if name.startswith("rnn.") and f"_l{i}" in name] for i in (0, 1)
        ]
        h = reference.multilayer_rnn(model.rnn.mode, e, None, layers)[0].transpose(0, 1)
        c, _ = reference.prefix_pool(h, w["pool.v"] @ w["pool.weight"])
        return torch.cat((h, c), -1) @ w["head.weight"].T + w["head.bias"]

    return Case("model", [called(model, lambda model: model(ids)[0]), plain], parameters_of(model, dtype))


OTHERS: dict[str, Callable[[torch.dtype], Case]] = {
    "Linear": linear_case,
    "AttentionPool, linear": lambda dtype: pool_case("linear", False, dtype),
    "AttentionPool, tanh": lambda dtype: pool_case("tanh", False, dtype),
    "AttentionPool, linear, causal": lambda dtype: pool_case("linear", True, dtype),
    "AttentionPool, tanh, causal": lambda dtype: pool_case("tanh", True, dtype),
    "AdditiveAttention": lambda dtype: additive_case(False, dtype),
    "AdditiveAttention, lengths": lambda dtype: additive_case(True, dtype),
    "LLM, gru": lambda dtype: model_case("gru", dtype),
    "LLM, lstm": lambda dtype: model_case("lstm", dtype),
}


def finite(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the log-sum-exp of an empty row, which is -inf where finite differences need a number."""
    return lambda **inputs: [t for t in flatten(function(**inputs)) if t.isfinite().all()]


@pytest.mark.parametrize("name", OTHERS)
def test_derivatives_of_other_layers(name: str) -> None:
    case = OTHERS[name](torch.float64)
    folds = "linear" in name or "LLM" in name  # u = Wᵀ v
    check_derivatives(finite(case.functions[0]), case.inputs, batched_forward=not folds)


@parametrize_pairwise(name=tuple(OTHERS), transform=LAYER_TRANSFORMS, dtype=DTYPES)
def test_transforms_of_other_layers(name: str, transform: str, dtype: torch.dtype) -> None:
    case = OTHERS[name](dtype)
    check_transform(case.op if case.op != "model" else "lstm", transform, case.functions, case.inputs)


# ---- what people do with it


def test_ensemble() -> None:
    """torch.func.stack_module_state: one call for several models."""
    models = [llm_ext.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = func.stack_module_state(models)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def call(parameters: Parameters, buffers: Parameters) -> Tensor:
        y: Tensor = func.functional_call(models[0], (parameters, buffers), (x,))[0]
        return y

    assert_all_close("lstm", list(func.vmap(call)(parameters, buffers)), [model(x)[0] for model in models])


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name: str) -> None:
    """A vmap of grad over a batch gives the gradients of a loop over its samples."""
    layer: Any = getattr(llm_ext, name)(I, H, 2, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    x = torch.randn(5, T, I, dtype=torch.float64)

    def loss(parameters: Parameters, sample: Tensor) -> Tensor:
        y: Tensor = func.functional_call(layer, parameters, (sample,))[0]
        return y.square().sum()

    found = func.vmap(func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(layer(sample)[0].square().sum(), list(layer.parameters()))
        assert_all_close(f"{op_of(name)}_backward", [g[i] for g in found.values()], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_penalty(name: str) -> None:
    """The gradients of a loss with the norm of its gradient with respect to the input, as torch.nn computes them."""
    layer, torch_layer = layer_pair(name, {"input_size": I, "hidden_size": H, "num_layers": 2, "dtype": torch.float64})
    x = torch.randn(T, B, I, dtype=torch.float64)

    def gradients(layer: Any) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        y = layer(given)[0]
        (slope,) = torch.autograd.grad(y.sum(), given, create_graph=True)
        penalty = (slope.square().sum((0, 2)).sqrt() - 1).square().mean()
        return torch.autograd.grad(y.square().sum() + penalty, list(layer.parameters()))

    assert_all_close(f"{op_of(name)}_backward", gradients(layer), gradients(torch_layer))


@pytest.mark.parametrize("name", LAYERS)
def test_step_of_maml(name: str) -> None:
    """The gradient through a step of gradient descent, as torch.nn computes it."""
    layers = layer_pair(name, {"input_size": I, "hidden_size": H, "dtype": torch.float64})
    support, query = torch.randn(2, T, B, I, dtype=torch.float64)

    def gradients(layer: Any) -> tuple[Tensor, ...]:
        parameters = dict(layer.named_parameters())
        inner = torch.autograd.grad(layer(support)[0].square().sum(), list(parameters.values()), create_graph=True)
        adapted = {key: p - 0.1 * g for (key, p), g in zip(parameters.items(), inner, strict=True)}
        outer = func.functional_call(layer, adapted, (query,))[0].square().sum()
        return torch.autograd.grad(outer, list(parameters.values()))

    assert_all_close(f"{op_of(name)}_backward", gradients(layers[0]), gradients(layers[1]))


@pytest.mark.parametrize("name", LAYERS)
def test_module_under_func(name: str) -> None:
    """Derivatives by the input of a module whose parameters require gradients: both modes, and then its training."""
    layer, torch_layer = layer_pair(name, {"input_size": I, "hidden_size": H, "dtype": torch.float64})
    x = torch.randn(T, B, I, dtype=torch.float64)
    for transform in (func.jacrev, func.jacfwd):
        jacobians = [transform(lambda x, m=m: m(x)[0])(x) for m in (layer, torch_layer)]
        assert_close(f"{op_of(name)}_backward", *jacobians)
        gradients = [
            torch.autograd.grad(jacobian.square().sum(), list(m.parameters()))
            for m, jacobian in zip((layer, torch_layer), jacobians, strict=True)
        ]
        assert_all_close(f"{op_of(name)}_backward", gradients[0], gradients[1])


def test_dropout_under_vmap() -> None:
    """As in torch, dropout under vmap needs a choice of randomness."""
    layer = llm_ext.GRU(I, 40, 2, dropout=0.5)
    x = torch.randn(1, T, B, I).expand(3, -1, -1, -1)

    def run(**options: Any) -> Tensor:
        y: Tensor = func.vmap(lambda x: layer(x)[0], **options)(x)
        return y

    with pytest.raises(RuntimeError, match="randomness"):
        run()
    same, different = run(randomness="same"), run(randomness="different")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("name", LAYERS)
def test_a_transform_leaves_nothing_behind(name: str) -> None:
    """A call after transforms has the same bits as one before, also if a transform was left by an error."""
    layer: Any = getattr(llm_ext, name)(I, H)
    x = torch.randn(T, B, I)
    before = layer(x)[0]
    func.jacrev(lambda x: layer(x)[0])(x)
    with pytest.raises(ZeroDivisionError):
        func.vmap(lambda x: layer(x)[0] / (1 // 0))(x[None])
    assert torch.equal(layer(x)[0], before)
    assert_close(op_of(name), copy.deepcopy(layer)(x)[0], before)
