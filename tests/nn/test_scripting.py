"""torch.jit.script compiles the layers that torch.nn has as its own, and refuses the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import assert_all_close
from support.layers import op_of
from torch import nn

import llm_ext

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:LSTM with projections")

BIDIRECTIONAL: dict[str, Any] = {"num_layers": 2, "batch_first": True, "bidirectional": True}
SCRIPTED = [
    ("RNN", {"nonlinearity": "relu"} | BIDIRECTIONAL),
    ("GRU", {"bias": False, "num_layers": 3, "dropout": 0.5}),
    ("LSTM", {"proj_size": 2} | BIDIRECTIONAL),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("GRUCell", {"bias": False}),
    ("LSTMCell", {}),
]


@pytest.mark.parametrize(("name", "options"), SCRIPTED)
def test_compiled_layer_has_the_same_parameters(name: str, options: dict[str, Any]) -> None:
    """Within a module: torch itself cannot call a layer that is scripted alone."""
    layer = getattr(llm_ext, name)(3, 5, **options).eval()
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(4, 2, 3)
    expected = layer(x)
    scripted = torch.jit.script(nn.Sequential(layer))
    assert not next(scripted.children()).training
    assert [p.data_ptr() for p in scripted.parameters()] == [p.data_ptr() for p in layer.parameters()]
    assert_all_close(op_of(name), scripted(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    layer, x = llm_ext.Linear(3, 5, bias), torch.randn(4, 3)
    assert_all_close("linear", torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (llm_ext.RNN(3, 5, nonlinearity="sigmoid"), "RNN with nonlinearity='sigmoid'"),
        (llm_ext.RNNCell(3, 5, nonlinearity="sigmoid"), "RNNCell with nonlinearity='sigmoid'"),
        (llm_ext.AttentionPool(3, 5), "AttentionPool"),
        (llm_ext.AdditiveAttention(3, 3, 5), "AdditiveAttention"),
        (llm_ext.nn.AffineEmbedding(3, 5), "AffineEmbedding"),
        (llm_ext.LLM(3, 4, 5, 3, 1, 0.0), "LLM"),
        (llm_ext.Seq2Seq(3, 3, 4, 5), "Seq2Seq"),
    ],
)
def test_what_torch_nn_lacks_is_refused(layer: nn.Module, what: str) -> None:
    for module in (layer, nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile {what}; torch.export can"):
            torch.jit.script(module)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_are_not_lost(kind: str) -> None:
    layer = llm_ext.GRU(3, 5)
    getattr(layer, f"register_{kind}")(lambda *_: None)
    with pytest.raises(RuntimeError, match="cannot compile GRU with forward hooks"):
        torch.jit.script(layer)


def test_parametrizations_are_not_lost() -> None:
    layer = llm_ext.GRU(3, 5)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", nn.Tanh())
    with pytest.raises(RuntimeError, match="cannot compile ParametrizedGRU with parametrizations"):
        torch.jit.script(nn.Sequential(layer))


def test_a_forward_of_ones_own_is_compiled() -> None:
    class Doubled(llm_ext.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input

    assert torch.equal(torch.jit.script(Doubled(3, 3))(torch.ones(2, 3)), 2 * torch.ones(2, 3))
