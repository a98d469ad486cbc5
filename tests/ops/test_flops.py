"""torch.utils.flop_counter counts a layer of llm_ext as that of torch.nn, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import flatten
from support.layers import LAYERS, layer_pair, random_state, rows_of
from support.pairwise import parametrize_pairwise
from support.registered_ops import tensor_ops
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import llm_ext
from llm_ext import ops

FLAGS = (False, True)


def count(run: Callable[[], Any], backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        results = flatten(run())
        if backward:
            torch.autograd.backward([t.sum() for t in results if t.requires_grad])
    return int(counter.get_total_flops())


def test_every_op_has_a_formula() -> None:
    names = tensor_ops()
    assert "lstm_forward" in names, "the search finds the ops"
    missing = [name for name in names if getattr(torch.ops.llm_ext, name) not in flop_registry]
    assert missing == []


@parametrize_pairwise(
    name=LAYERS,
    num_layers=(1, 2),
    bidirectional=FLAGS,
    projected=FLAGS,
    bias=FLAGS,
    form=("padded", "packed", "no batch"),
    given_hx=(None, "plain", "with gradient"),
    dx=FLAGS,
)
def test_layers(
    name: str,
    num_layers: int,
    bidirectional: bool,
    projected: bool,
    bias: bool,
    form: str,
    given_hx: str | None,
    dx: bool,
) -> None:
    options: dict[str, Any] = {"input_size": 3, "hidden_size": 6, "num_layers": num_layers, "bias": bias}
    options |= {"bidirectional": bidirectional, "projected": projected, "dtype": torch.float64}
    layer, torch_layer = layer_pair(name, options)
    x: Any = torch.randn(5, 3, dtype=torch.float64) if form == "no batch" else torch.randn(5, 4, 3, dtype=torch.float64)
    x.requires_grad_(dx)
    # In two directions all rows have one length, because torch also counts the states of shorter rows backwards.
    lengths = torch.tensor([5, 5, 5, 5] if bidirectional else [5, 4, 4, 1])
    hx = None
    if given_hx is not None:
        hx = random_state(layer, rows_of(layer), *(() if form == "no batch" else (4,)))
        for tensor in flatten(hx):
            tensor.requires_grad_(given_hx == "with gradient")

    def output(each: Any) -> Any:
        if form == "packed":
            return each(pack_padded_sequence(x, lengths), hx)[0].data
        return each(x, hx)[0]

    for backward in FLAGS:
        assert count(lambda: output(layer), backward) == count(lambda: output(torch_layer), backward) > 0
    with torch.no_grad():
        assert count(lambda: output(layer)) == count(lambda: output(torch_layer))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_are_not_needed(name: str, frozen: str) -> None:
    pair = layer_pair(name, {"input_size": 3, "hidden_size": 6, "dtype": torch.float64})
    for each in pair:
        getattr(each, frozen).requires_grad_(False)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    counts = [count(lambda each=each: each(x)[0], backward=True) for each in pair]  # type: ignore[misc]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [f"{layer}Cell" for layer in LAYERS])
def test_cells(name: str) -> None:
    cell, torch_cell = layer_pair(name, {"input_size": 3, "hidden_size": 6, "dtype": torch.float64})
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    hx = random_state(cell, 4)
    for backward in FLAGS:
        assert count(lambda: cell(x, hx), backward) == count(lambda: torch_cell(x, hx), backward) > 0


def test_linear() -> None:
    x, layer = torch.randn(5, 4, 3, requires_grad=True), llm_ext.Linear(3, 7)
    for backward in FLAGS:
        expected = count(lambda: torch.nn.functional.linear(x, layer.weight, layer.bias), backward)
        assert count(lambda: layer(x), backward) == expected > 0
    assert count(lambda: ops.linear_argmax(x, layer.weight)) == count(lambda: layer(x))


def formula(e: Tensor, u: Tensor | None, scores: Tensor | None) -> Tensor:
    s = (e.flatten(0, 1) @ u[:, None]).view(e.shape[:2]) if u is not None else scores
    assert s is not None
    return torch.softmax(s, -1)[:, None] @ e


@parametrize_pairwise(given=("u", "scores"), de=FLAGS, other=FLAGS)
def test_pools(given: str, de: bool, other: bool) -> None:
    """A prefix pool is linear in T, and counts as the pool of the whole sequence."""
    if not de and not other:
        return
    e = torch.randn(3, 5, 4, requires_grad=de)
    u, scores = torch.randn(4, requires_grad=other), torch.randn(3, 5, requires_grad=other)
    options: dict[str, Any] = {"u": u, "scores": None} if given == "u" else {"u": None, "scores": scores}
    for backward in FLAGS:
        expected = count(lambda: formula(e, **options), backward)
        for pool in (ops.attention_pool, ops.prefix_pool):
            assert count(lambda pool=pool: pool(e, **options)[0], backward) == expected > 0  # type: ignore[misc]


def additive_formula(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> Tensor:
    hidden = torch.tanh(query[:, :, None] + keys[:, None])
    scores = (hidden.flatten(0, 2) @ v[:, None]).view(hidden.shape[:3])
    return torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("needs", list(itertools.product(FLAGS, repeat=4)))
def test_additive_attention(needs: tuple[bool, ...]) -> None:
    shapes = ((3, 5, 7), (3, 6, 7), (7,), (3, 6, 4))
    tensors = [torch.randn(*shape, requires_grad=need) for shape, need in zip(shapes, needs, strict=True)]
    for backward in {False, any(needs)}:
        expected = count(lambda: additive_formula(*tensors), backward)
        assert count(lambda: ops.additive_attention(*tensors)[0], backward) == expected > 0


@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
@pytest.mark.parametrize("projected", FLAGS)
def test_inference_of_a_decoder(mode: str, projected: bool) -> None:
    """The ops for inference count as their parts; input projections replace the products of the first layer."""
    float64: dict[str, Any] = {"dtype": torch.float64}
    layer = getattr(torch.nn, mode)(3, 6, 2, **float64)
    gates = layer.weight_ih_l0.shape[0]
    projections = torch.randn(9, gates, **float64) if projected else None
    vectors, query = torch.randn(1, 4, 3, **float64), torch.randn(4, 6, **float64)
    x = torch.randint(9, (1, 4)) if projected else vectors
    state = tuple(torch.zeros(2, 4, 6, **float64) for _ in range(1 + (mode == "LSTM")))
    shapes = ((5, 6), (2, 7, 5), (5,), (2, 7, 8), (8, 6))
    w_query, keys, v, values, w_out = (torch.randn(*shape, **float64) for shape in shapes)
    with torch.no_grad():
        layers = count(lambda: layer(vectors)) - (2 * 4 * gates * 3 if projected else 0)
        given = None if projections is None else [projections]
        assert layers == count(lambda: ops.multilayer_rnn(mode, x, state, layer.all_weights, input_projections=given))

        def attend() -> Tensor:
            context = additive_formula((query @ w_query.T).view(2, 2, 5), keys, v, values)
            result: Tensor = query @ w_out.T + context.flatten(0, 1)
            return result

        arguments = (x, state, layer.all_weights, w_query, keys, v, values, w_out)
        counted = count(lambda: ops.attention_step(mode, *arguments, input_projections=projections))
        assert counted == layers + count(attend)


@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
def test_both_directions_of_a_layer(mode: str) -> None:
    """The op of CUDA, on meta tensors."""
    layer = getattr(torch.nn, mode)(3, 6, bidirectional=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    flat = [tensor.detach().to("meta").requires_grad_() for row in layer.all_weights for tensor in row]
    xm = x.detach().to("meta").requires_grad_()
    op = torch.ops.llm_ext.bidirectional_forward
    double = layer.double()
    for backward in FLAGS:
        expected = count(lambda: double(x.double())[0], backward)
        assert count(lambda: op(mode, xm, None, None, flat, True, None, None, False, True)[0], backward) == expected
