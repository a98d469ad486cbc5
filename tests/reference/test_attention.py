"""The reference of additive attention against the formula, and of linear against torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.additive_attention import SELECTIONS, key_selection
from support.comparison import assert_close, flatten
from torch import Tensor

from llm_ext import reference

F64 = torch.float64


@pytest.mark.parametrize("kind", SELECTIONS)
def test_formula(kind: str) -> None:
    B, Tq, Tk = 3, 4, 5
    query, keys, v, values = (torch.randn(*shape, dtype=F64) for shape in ((B, Tq, 2), (B, Tk, 2), (2,), (B, Tk, 3)))
    selection = key_selection(kind, B, Tq, Tk)
    mask = selection.get("mask", torch.ones(B, Tk, dtype=torch.bool)).clone()
    mask[0] = False  # rows without an unmasked key
    lengths = selection.get("key_lengths")
    context, weights = reference.additive_attention(
        query, keys, v, values, key_lengths=lengths, mask=mask, need_weights=True
    )
    assert weights is not None
    for b, q in itertools.product(range(B), range(Tq)):
        unmasked = mask[b] if mask.dim() == 2 else mask[b, q]
        if lengths is not None:
            unmasked = unmasked & (torch.arange(Tk) < lengths[b])
        scores = torch.stack([v @ torch.tanh(query[b, q] + key) for key in keys[b]])
        expected = torch.zeros(Tk, dtype=F64)
        if unmasked.any():
            expected[unmasked] = torch.softmax(scores[unmasked], 0)
        assert_close("additive_attention", weights[b, q], expected, "weights")
        assert_close("additive_attention", context[b, q], expected @ values[b], "context")
    assert reference.additive_attention(query, keys, v, values)[1] is None


@pytest.mark.parametrize("of_each_query", [False, True])
def test_gradcheck(of_each_query: bool) -> None:
    shapes = (2, 3, 2), (2, 4, 2), (2,), (2, 4, 3)
    inputs = [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in shapes]
    mask = torch.rand(2, 3, 4) < 0.5 if of_each_query else torch.tensor([[True, False, True, True], [False] * 4])

    def attend(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        results = reference.additive_attention(query, keys, v, values, mask=mask, need_weights=True)
        return tuple(flatten(results))

    assert torch.autograd.gradcheck(attend, inputs)


def test_masked_keys_may_hold_nan() -> None:
    query, keys, v, values = (torch.randn(*shape, dtype=F64) for shape in ((2, 3, 2), (2, 4, 2), (2,), (2, 4, 3)))
    lengths = torch.tensor([4, 2])
    padding = (torch.arange(4) >= lengths[:, None])[..., None]
    expected, _ = reference.additive_attention(query, keys, v, values, key_lengths=lengths)
    dirty = [t.masked_fill(padding, math.nan).requires_grad_() for t in (keys, values)]
    actual, _ = reference.additive_attention(query, dirty[0], v, dirty[1], key_lengths=lengths)
    assert torch.equal(actual, expected)
    for gradient in torch.autograd.grad(actual.sum(), dirty):
        assert not gradient[padding.expand_as(gradient)].any()


def test_empty() -> None:
    for B, Tq, Tk, A, Dv in ((0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0)):
        keys, values = torch.randn(B, Tk, A), torch.randn(B, Tk, Dv)
        context, weights = reference.additive_attention(
            torch.randn(B, Tq, A), keys, torch.randn(A), values, need_weights=True
        )
        assert weights is not None
        assert context.shape == (B, Tq, Dv)
        assert weights.shape == (B, Tq, Tk)
        # Without A all scores are 0.
        torch.testing.assert_close(weights.sum(-1), torch.full((B, Tq), float(Tk > 0)))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    x, weight, b = torch.randn(2, 3, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.randn(5, dtype=F64)
    expected = F.linear(x, weight, b if bias else None)
    assert_close("linear", reference.linear(x, weight, b if bias else None), expected)
    assert torch.equal(reference.linear_argmax(x, weight, b if bias else None), expected.argmax(-1))


def test_linear_argmax_of_ties_and_nan() -> None:
    x, weight = torch.ones(1, 1), torch.tensor([[1.0], [3.0], [3.0]])
    assert reference.linear_argmax(x, weight).tolist() == [1]
    assert reference.linear_argmax(x, weight, torch.tensor([0.0, 0.0, math.nan])).tolist() == [2]
