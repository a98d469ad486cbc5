"""The condition under which a model uses the weights of a layer instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from llm_ext.models.bypass import may_bypass
from llm_ext.nn import GRU, LSTM, Linear


class Doubled(Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replace_forward(layer: Any) -> None:
    layer.forward = lambda input: input


def test_untouched_layers_of_the_types() -> None:
    assert may_bypass(Linear(2, 3), Linear)
    assert may_bypass(GRU(2, 3), LSTM, GRU)
    assert not may_bypass(GRU(2, 3), LSTM, Linear)
    assert not may_bypass(Doubled(2, 3), Linear)
    assert not may_bypass(nn.Linear(2, 3), Linear)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
        replace_forward,
    ],
    ids=["hook", "pre-hook", "parametrization", "forward"],
)
def test_changed_layers(change: Callable[[Any], Any]) -> None:
    layer = Linear(2, 3)
    change(layer)
    assert not may_bypass(layer, Linear)


def test_a_removed_hook_does_not_matter() -> None:
    layer = Linear(2, 3)
    layer.register_forward_hook(lambda *_: None).remove()
    assert may_bypass(layer, Linear)
