"""Copies for tools that know the layers of torch.nn only."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.comparison import assert_all_close, flatten
from support.layers import CELLS, LAYERS, op_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

import llm_ext

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit", "ignore:.*quantization.*:DeprecationWarning", "ignore:.*weight_norm.*:FutureWarning"
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = llm_ext.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.gru = llm_ext.GRU(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = llm_ext.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.rnn(x)[0])
        return self.head(self.norm(y[:, -1]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("by", ["nothing", "parametrize", "weight_norm", "prune"])
def test_copy_shares_parameters(name: str, by: str) -> None:
    layer = getattr(llm_ext, name)(3, 5)
    weight, x = "weight_hh" if name in CELLS else "weight_hh_l0", torch.randn(2, 3)
    if by == "parametrize":
        parametrize.register_parametrization(layer, weight, nn.Tanh())
    elif by == "weight_norm":
        weight_norm(layer, weight)
    elif by == "prune":
        prune.random_unstructured(layer, weight, 0.5)  # type: ignore[no-untyped-call]
    expected, ours = layer(x), type(layer)
    copied = llm_ext.to_torch(layer)
    assert type(layer) is ours
    assert parametrize.type_before_parametrizations(copied) is getattr(nn, name)
    assert_all_close(op_of(name), copied(x), expected)
    shared = zip([*layer.parameters(), *layer.buffers()], [*copied.parameters(), *copied.buffers()], strict=True)
    assert all(a is b for a, b in shared)
    copied.register_forward_hook(lambda *_: None)
    assert not layer._forward_hooks
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    assert_all_close(op_of(name), flatten(copied(x)), flatten(layer(x)))


def test_tools() -> None:
    """torch.jit.script, torch.fx and dynamic quantization of the whole model."""
    model, x = Model().eval(), torch.randn(3, 5, 6)
    expected = model(x)
    copied: Any = llm_ext.to_torch(model)
    assert [type(m) for m in copied.children()] == [nn.LSTM, nn.GRU, nn.BatchNorm1d, nn.Linear]
    assert_all_close("lstm", torch.jit.script(copied)(x), expected)
    traced = torch.fx.symbolic_trace(copied)
    assert_all_close("lstm", traced(x), expected)
    assert isinstance(llm_ext.convert(traced).rnn, llm_ext.LSTM)
    assert_all_close("lstm", traced(x), expected)

    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantized = quantize(llm_ext.to_torch(model))
    kinds = [type(m).__module__.partition(".modules")[0] for m in (quantized.rnn, quantized.gru, quantized.head)]
    assert kinds == ["torch.ao.nn.quantized.dynamic"] * 3
    assert (quantized(x) - expected).abs().max() < 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        passed_over = quantize(model)
    said = {
        str(each.message).partition(": torch.ao.quantization leaves layers of llm_ext in floating point; ")[0]
        for each in caught
    }
    assert said == {"LSTM", "GRU", "Linear"}
    assert torch.equal(passed_over(x), expected)
    assert type(model.rnn) is llm_ext.LSTM
