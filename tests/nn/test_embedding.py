"""llm_ext.nn.AffineEmbedding: an affine map of one-hot vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm_ext.nn import AffineEmbedding


def test_affine_map_of_one_hot_vectors() -> None:
    layer = AffineEmbedding(7, 5, dtype=torch.float64)
    assert not layer.bias.any()
    torch.nn.init.normal_(layer.bias)
    ids = torch.randint(7, (3, 4))
    expected = F.linear(F.one_hot(ids, 7).double(), layer.weight.T, layer.bias)
    torch.testing.assert_close(layer(ids), expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(layer(ids), [layer.weight, layer.bias], weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [layer.weight, layer.bias], weights))
    assert layer(ids[:0]).shape == (0, 4, 5)
    assert torch.equal(layer(ids, layer.fold()), layer(ids))
    assert repr(layer) == "AffineEmbedding(7, 5)"


@pytest.mark.parametrize("bad", [-1, 7])
def test_unknown_ids_are_refused(bad: int) -> None:
    layer = AffineEmbedding(7, 5)
    for folded in (None, layer.fold()):
        with pytest.raises(IndexError, match="ids must be from 0 to 6, got values from"):
            layer(torch.tensor([[3, bad]]), folded)


def test_ids_on_another_device_are_refused() -> None:
    """torch.nn.Embedding gives uninitialized memory for ids on the meta device."""
    with pytest.raises(ValueError, match="AffineEmbedding: ids must be on cpu like the weights, got meta"):
        AffineEmbedding(5, 3)(torch.zeros(4, dtype=torch.int64, device="meta"))
    on_meta = AffineEmbedding(5, 3, device="meta")
    assert on_meta(torch.zeros(4, dtype=torch.int64, device="meta")).shape == (4, 3)
