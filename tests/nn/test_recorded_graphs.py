"""Layers in graphs that are recorded once and run at other sizes: torch.compile, torch.export and torch.jit.trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, assert_same_bits, flatten
from support.pairwise import parametrize_pairwise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import llm_ext

LAYERS = ("RNN", "GRU", "LSTM")
OPTIONS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True}]


def layer(name: str, **options: Any) -> Any:
    return getattr(llm_ext, name)(4, 5, **options)


def gradients(results: object, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad([r.square().sum() for r in flatten(results)], inputs)


@parametrize_pairwise(name=LAYERS, options=OPTIONS, padded=(False, True))
def test_compiled_training_at_changing_lengths(name: str, options: dict[str, Any], padded: bool) -> None:
    """At most two graphs, of which the second is dynamic; `lengths` break no graph and are not constants of it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = layer(name, **options)
    compiled: Any = torch.compile(module, fullgraph=True, backend=counter)
    for T in (5, 6, 7, 9, 12):
        x = torch.randn(T, 3, 4, requires_grad=True)
        given: dict[str, Any] = {}
        states: list[Tensor] = []
        if padded:  # the row of no steps keeps its state
            shape = (module.num_layers * (1 + module.bidirectional), 3, 5)
            states = [torch.randn(shape, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
            given = {"hx": tuple(states) if name == "LSTM" else states[0], "lengths": torch.tensor([T - 2, T, 0])}
        actual, expected = compiled(x, **given), module(x, **given)
        assert_all_close(name.lower(), actual, expected)
        inputs = [x, *states, *module.parameters()]
        assert_all_close(name.lower(), gradients(actual, inputs), gradients(expected, inputs), "gradient")
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", LAYERS)
def test_a_dynamic_graph_serves_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(layer(name), fullgraph=True, backend=counter, dynamic=True)
    for T in (5, 6, 9):
        x = torch.randn(T, 3, 4, requires_grad=True)
        gradients(compiled(x), [x])
    assert counter.frame_count == 1


def check_export(module: nn.Module, x: Tensor, other: Tensor) -> None:
    sizes = {0: torch.export.Dim("first"), 1: torch.export.Dim("second")}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,))
    assert_same_bits(exported.module()(other), module(other))


@pytest.mark.parametrize("options", OPTIONS, ids=["one", "stacked"])
@pytest.mark.parametrize("name", LAYERS)
def test_export_with_gradients(name: str, options: dict[str, Any]) -> None:
    check_export(layer(name, **options), torch.randn(6, 3, 4), torch.randn(9, 2, 4))


def test_export_of_models_with_gradients() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llm_ext.Seq2Seq(11, 13, 4, 6)

        def forward(self, source: Tensor) -> Any:
            output, state = self.model.encode(source)
            return output.keys, output.values, state.hidden

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llm_ext.Seq2Seq(11, 11, 4, 6).eval()

        def forward(self, source: Tensor) -> Any:
            return self.model(source, source)

    ids, others = torch.randint(11, (3, 6)), torch.randint(11, (2, 9))
    check_export(llm_ext.LLM(11, 4, 5, 11, 1, 0.0), ids, others)
    check_export(Encoder(), ids, others)
    check_export(Translator(), ids, others)


CELLS = ("RNNCell", "GRUCell", "LSTMCell")


@pytest.mark.parametrize(
    ("name", "options"), [*((name, options) for name in LAYERS for options in OPTIONS), *((c, {}) for c in CELLS)]
)
@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without gradients"])
def test_traced_training(name: str, options: dict[str, Any], recorded: bool) -> None:
    """A graph of torch.jit.trace gives results and gradients at other sizes, also if gradients were disabled before."""
    module = layer(name, **options)
    shape = (3, 4) if name in CELLS else (6, 3, 4)
    with torch.set_grad_enabled(recorded):
        traced: Any = torch.jit.trace(module, (torch.randn(shape),))  # type: ignore[no-untyped-call]
    x = torch.randn(2, *shape[1:], requires_grad=True)
    actual, expected = traced(x), module(x)
    assert_same_bits(actual, expected)
    inputs = [x, *module.parameters()]
    assert_same_bits(gradients(actual, inputs), gradients(expected, inputs))


def test_traced_lengths_are_no_constants() -> None:
    module = layer("GRU", num_layers=2).requires_grad_(False)
    x = torch.randn(6, 3, 4)
    given = x, torch.tensor([6, 2, 0])
    traced: Any = torch.jit.trace(lambda x, n: module(x, lengths=n), given)  # type: ignore[no-untyped-call]
    other = torch.tensor([1, 5, 3])
    assert_all_close("gru", traced(x, other), module(x, lengths=other))


def test_an_exported_graph_without_gradients_says_why_it_cannot_be_trained() -> None:
    module = layer("GRU")
    x = torch.randn(6, 3, 4)
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    with pytest.raises(RuntimeError, match="trace or export it with gradients enabled"):
        exported(x)[0].sum().backward()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=["one", "stacked"])
def test_all_lengths_zero(name: str, options: dict[str, Any]) -> None:
    """Zeros, the first state, and gradients of zero."""
    module, x, lengths = layer(name, **options), torch.zeros(3, 2, 4, requires_grad=True), torch.tensor([0, 0])
    y, state = module(x, lengths=lengths)
    assert not y.any()
    assert not any(tensor.any() for tensor in flatten(state))
    (dx,) = torch.autograd.grad(y.sum() + sum(tensor.sum() for tensor in flatten(state)), x)
    assert not dx.any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", OPTIONS, ids=["one", "stacked"])
def test_new_states_are_no_views(name: str, options: dict[str, Any]) -> None:
    """Truncated backpropagation detaches them in place."""
    for shape in ((6, 3, 4), (6, 4)):
        _, state = layer(name, **options)(torch.randn(shape))
        for tensor in flatten(state):
            tensor.detach_()
