"""fake_quantize_: training reduces what rounding loses, and a model in training is copied and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.comparison import assert_same_bits
from torch import Tensor, nn

import llm_ext


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_training_recovers_what_an_outlier_costs(name: str) -> None:
    """A column of large weights meets a small feature, so that the other weights of a row lose their bits.

    The features depend on each other, as those of data do: other roundings can make up for an error.
    """
    layer: Any = getattr(nn, name)(24, 16)
    mixing, sizes = torch.randn(2, 24), torch.ones(24)
    sizes[0] = 1e-2
    with torch.no_grad():
        layer.weight_ih_l0[:, 0] *= 1e2
    original = copy.deepcopy(layer)

    def batch(B: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(12, B, 2) @ mixing * sizes
        with torch.no_grad():
            return x, original(x)[0]

    x, y = batch(256)

    def loss() -> float:
        rounded = copy.deepcopy(layer)
        (entry,) = llm_ext.quantize_(rounded)
        assert entry.reason is None
        with torch.no_grad():
            return float(nn.functional.mse_loss(rounded(x)[0], y) / y.var())

    before = loss()
    assert before > 0.01
    llm_ext.fake_quantize_(layer)
    steps, rate = 150, 1e-3
    optimizer = torch.optim.Adam(layer.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        inputs, targets = batch(32)
        optimizer.zero_grad()
        error: Any = nn.functional.mse_loss(layer(inputs)[0], targets)
        error.backward()
        optimizer.step()
        schedule.step()
    assert loss() < 0.4 * before


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_the_gradient_of_a_weight_is_that_of_the_rounded_one(weights: Any) -> None:
    layer = llm_ext.Linear(6, 5)
    original = layer.weight
    llm_ext.fake_quantize_(layer, weights)
    x, rounded = torch.randn(4, 6), layer.weight.detach().requires_grad_()
    assert not torch.equal(rounded, original)
    found = torch.autograd.grad(layer(x).square().sum(), original)
    assert_same_bits(found, torch.autograd.grad(llm_ext.ops.linear(x, rounded, layer.bias).square().sum(), rounded))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_a_model_in_training_is_copied_and_compiled(name: str) -> None:
    model: Any = nn.Sequential(getattr(nn, name)(6, 10))
    llm_ext.fake_quantize_(model)
    assert isinstance(model[0], getattr(llm_ext, name))
    x = torch.randn(5, 4, 6) if name == "LSTM" else torch.randn(4, 6)
    y = model(x)[0]
    y.sum().backward()
    another = copy.deepcopy(model)
    compiled: Any = torch.compile(another, fullgraph=True, backend="aot_eager")
    z = compiled(x)[0]
    assert_same_bits(z, y)
    another.zero_grad()
    z.sum().backward()
    for ours, copied in zip(model.parameters(), another.parameters(), strict=True):
        assert_same_bits(copied.grad, ours.grad)
