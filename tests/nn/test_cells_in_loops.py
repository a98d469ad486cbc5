"""Cells in loops under autograd: the steps of a loop share one product for the gradients of the weights."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pairwise import parametrize_pairwise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llm_ext
from llm_ext.ops import _loops

Cell = nn.RNNCell | nn.GRUCell | nn.LSTMCell
KINDS = ("RNN", "GRU", "LSTM")
FLAGS = (False, True)
INPUT, HIDDEN = 5, 7


def both_cells(kind: str, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The cell of torch.nn and that of llm_ext, with the same parameters."""
    theirs = getattr(nn, f"{kind}Cell")(INPUT, HIDDEN, bias=bias, dtype=dtype)
    ours = getattr(llm_ext, f"{kind}Cell")(INPUT, HIDDEN, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(kind: str, B: int = 3, T: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The input [T, B, I] and the first state."""
    state = [torch.randn(B, HIDDEN, dtype=dtype, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    return [torch.randn(T, B, INPUT, dtype=dtype, requires_grad=True), *state]


def run(cell: Cell, x: Tensor, *state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every hidden state, and the last state."""
    outputs = []
    for step in x:
        after = cell(step, state if len(state) > 1 else state[0])
        state = after if isinstance(after, tuple) else (after,)
        outputs.append(state[0])
    return torch.stack(outputs), state


def loss(cell: Cell, *inputs: Tensor) -> Tensor:
    y, _ = run(cell, *inputs)
    return (y * y).sum()


def assert_same(kind: str, bias: bool, results: Callable[[Any, list[Tensor]], Any], atol: float = 1e-10) -> None:
    """Compare what `results` computes with both cells."""
    inputs = inputs_of(kind)
    theirs, ours = (results(cell, inputs) for cell in both_cells(kind, bias))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def gradients(cell: Cell) -> list[Tensor | None]:
    return [parameter.grad for parameter in cell.parameters()]


@parametrize_pairwise(kind=KINDS, bias=FLAGS, dtype=(torch.float64, torch.float32), B=(1, 3, 40), rows=(5, 2048))
def test_gradients(
    kind: str, bias: bool, dtype: torch.dtype, B: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loops, "MOST_ROWS", rows)
    inputs = inputs_of(kind, B=B, dtype=dtype)
    found = [
        torch.autograd.grad(loss(cell, *inputs), [*inputs, *cell.parameters()])
        for cell in both_cells(kind, bias, dtype)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_the_stored_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loops, "MOST_ROWS", 5)
    add_rows, counts = _loops._Sum.add_rows, []

    def add(self: Any, row: Any) -> None:
        add_rows(self, row)
        counts.append(self.count)

    monkeypatch.setattr(_loops._Sum, "add_rows", add)
    torch.autograd.backward(loss(both_cells("GRU")[1], *inputs_of("GRU")))
    assert 0 < max(counts) < 5


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_replaced_weights(name: str) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        y, after = run(cell, *inputs)
        old = getattr(cell, name)
        setattr(cell, name, nn.Parameter(2 * old.detach()))
        z, _ = run(cell, inputs[0], *after)
        torch.autograd.backward(y.sum() + (z * z).sum())
        return old.grad, gradients(cell)

    assert_same("GRU", True, results)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_passes_over_the_same_steps(kind: str) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        value = loss(cell, *inputs)
        # A pass that does not ask for the weights leaves nothing for the next one.
        (dx,) = torch.autograd.grad(value, inputs[:1], retain_graph=True)
        (dw,) = torch.autograd.grad(value, [cell.weight_hh], retain_graph=True)
        torch.autograd.backward(value, retain_graph=True)
        torch.autograd.backward(value)
        return dx, dw, gradients(cell)

    assert_same(kind, True, results)


@pytest.mark.parametrize("kind", KINDS)
def test_two_losses_of_one_loop(kind: str) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        x, *state = inputs
        first, second = loss(cell, *inputs), loss(cell, 2 * x, *state)
        torch.autograd.backward(first)
        after_first = [None if grad is None else grad.clone() for grad in gradients(cell)]
        torch.autograd.backward(second)
        return after_first, gradients(cell)

    assert_same(kind, True, results)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_backpropagation_and_changed_weights(kind: str) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        x, *state = (tensor.detach() for tensor in inputs)
        for _ in range(3):
            y, after = run(cell, x, *state)
            torch.autograd.backward((y * y).sum())
            with torch.no_grad():
                for parameter in cell.parameters():
                    parameter -= 0.1 * parameter.grad
            state = [tensor.detach() for tensor in after]
        return [*state, *cell.parameters()]

    assert_same(kind, True, results)


@parametrize_pairwise(kind=KINDS, bias=FLAGS)
def test_derivatives_of_derivatives(kind: str, bias: bool) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        wanted = [*inputs, *cell.parameters()]
        first = torch.autograd.grad(loss(cell, *inputs), wanted, create_graph=True)
        penalty = torch.stack([(grad * grad).sum() for grad in first]).sum()
        return first, torch.autograd.grad(penalty, wanted)

    assert_same(kind, bias, results, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients(kind: str) -> None:
    directions = torch.randn(4, 6, 3, HIDDEN, dtype=torch.float64)

    def results(cell: Any, inputs: list[Tensor]) -> Any:
        y, _ = run(cell, *inputs)
        return torch.autograd.grad(y, [*inputs, *cell.parameters()], directions, is_grads_batched=True)

    assert_same(kind, True, results)


@parametrize_pairwise(kind=KINDS, reentrant=FLAGS)
def test_checkpoints(kind: str, reentrant: bool) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        def outputs(*tensors: Tensor) -> Tensor:
            return run(cell, *tensors)[0]

        x, *state = inputs
        total = outputs(*inputs)
        for factor in (1, 3):
            total = total + checkpoint(outputs, factor * x, *state, use_reentrant=reentrant)
        torch.autograd.backward((total * total).sum())
        return gradients(cell)

    assert_same(kind, True, results)


@pytest.mark.parametrize("thaws", FLAGS)
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_hh"])
def test_frozen_weights(frozen: str, thaws: bool) -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        getattr(cell, frozen).requires_grad_(not thaws)
        y, after = run(cell, *inputs)
        getattr(cell, frozen).requires_grad_(thaws)
        z, _ = run(cell, inputs[0], *after)
        torch.autograd.backward(y.sum() + (z * z).sum())
        return gradients(cell)

    assert_same("LSTM", True, results)


def test_hooks_and_weight_norm() -> None:
    def results(cell: Any, inputs: list[Tensor]) -> Any:
        calls: list[Tensor] = []
        cell.weight_ih.register_hook(lambda grad: calls.append(grad) or 2 * grad)  # type: ignore[func-returns-value]
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
        torch.autograd.backward(loss(cell, *inputs))
        return calls, gradients(cell)

    assert_same("GRU", True, results)


def test_weights_that_change_before_the_backward_pass() -> None:
    _, cell = both_cells("GRU")
    value = loss(cell, *inputs_of("GRU"))
    with torch.no_grad():
        cell.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(value)


def test_nothing_outlives_the_loop() -> None:
    _, cell = both_cells("LSTM")
    before = len(_loops._tokens)
    inputs = inputs_of("LSTM")
    value = loss(cell, *inputs)
    assert len(_loops._tokens) == before + 1
    torch.autograd.grad(value, inputs, retain_graph=True)
    torch.autograd.backward(value, retain_graph=True)
    assert not any(token().loop.sums for token in _loops._tokens.values())  # type: ignore[union-attr]
    torch.autograd.backward(value)
    pickle.loads(pickle.dumps(cell))
    copy.deepcopy(cell)
    del value
    gc.collect()
    assert len(_loops._tokens) == before


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """Each step is rounded, and its gradients are those of torch's cell within that rounding."""
    inputs, found = inputs_of(kind, dtype=torch.float32), []
    for cell in both_cells(kind, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(cell, *inputs)
        found.append(torch.autograd.grad(value.float(), [*inputs, *cell.parameters()]))
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_the_state_may_be_written_to(kind: str) -> None:
    """Rows of the state are cleared in place between steps, as torch.nn's cells allow."""
    torch.manual_seed(0)
    x, *first = inputs_of(kind)
    gradients = []
    for cell in both_cells(kind):
        state = tuple(first)
        for step in x:
            after = cell(step, state if len(state) > 1 else state[0])
            state = after if isinstance(after, tuple) else (after,)
            for tensor in state:
                tensor[0] = 0
        loss = sum((tensor.square().sum() for tensor in state), torch.zeros(()))
        gradients.append(torch.autograd.grad(loss, [x, *first, *cell.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", FLAGS)
@pytest.mark.parametrize("batch_first", FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_called_step_by_step(kind: str, batch_first: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is called for one step at a time does as a cell."""
    steps = []
    step = _loops.step
    monkeypatch.setattr(_loops, "step", lambda *call: steps.append(call) or step(*call))  # type: ignore[func-returns-value]
    x, *state = inputs_of(kind)
    theirs = getattr(nn, kind)(INPUT, HIDDEN, bias=bias, batch_first=batch_first, dtype=torch.float64)
    found = []
    for layer in (theirs, llm_ext.convert(copy.deepcopy(theirs))):
        hx: Any = tuple(tensor.unsqueeze(0) for tensor in state) if kind == "LSTM" else state[0].unsqueeze(0)
        outputs = []
        for row in x:
            y, hx = layer(row.unsqueeze(1 if batch_first else 0), hx)
            outputs.append(y.flatten(0, 1))
        last = [*hx] if kind == "LSTM" else [hx]
        values = [torch.stack(outputs), *last]
        total = torch.stack([(value * value).sum() for value in values]).sum()
        found.append([*values, *torch.autograd.grad(total, [x, *state, *layer.parameters()])])
        last[0].detach_()
    torch.testing.assert_close(found[1], found[0])
    assert len(steps) == len(x)
