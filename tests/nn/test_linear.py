"""llm_ext.Linear beside torch.nn.Linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.comparison import assert_close
from torch import nn

import llm_ext


def test_replaces_torch_nn() -> None:
    layer, torch_layer = llm_ext.Linear(30, 20, dtype=torch.float64), nn.Linear(30, 20, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    torch_layer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 30, dtype=torch.float64)
    assert_close("linear", layer(x), torch_layer(x))
    gradients = [torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in (layer, torch_layer)]
    for a, b in zip(*gradients, strict=True):
        assert_close("linear_backward", a, b)
    assert repr(layer) == repr(torch_layer)


def test_without_bias() -> None:
    layer, x = llm_ext.Linear(3, 2, bias=False), torch.randn(5, 3)
    assert layer.bias is None
    assert_close("linear", layer(x), F.linear(x, layer.weight))


def test_compiled() -> None:
    torch.compiler.reset()
    layer, x = llm_ext.Linear(4, 5), torch.randn(6, 4)
    assert_close("linear", torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_names_the_input(dtype: torch.dtype) -> None:
    layer = llm_ext.Linear(3, 5, dtype=dtype)
    with pytest.raises(ValueError, match=r"Linear: input must be \[\*, I\] = \[\*, \*, 3\], got \[2, 1, 4\]"):
        layer(torch.zeros(2, 1, 4, dtype=dtype))
    with pytest.raises(TypeError, match=f"Linear: input must be {str(dtype)[6:]}, got float16"):
        layer(torch.zeros(2, 3, dtype=torch.float16))
