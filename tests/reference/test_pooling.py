"""The reference pools against the formulas, row by row, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.comparison import assert_close, assert_same_bits, outputs_and_gradients
from support.pairwise import parametrize_pairwise
from support.pooling import log_sum_exp
from torch import Tensor

from llm_ext import reference

F64 = torch.float64
SELECTIONS = ("none", "lengths", "mask", "both")
every_selection = pytest.mark.parametrize("kind", SELECTIONS)
every_pool = pytest.mark.parametrize("pool", [reference.attention_pool, reference.prefix_pool])
by_u_or_scores = pytest.mark.parametrize("by", ["u", "scores"])


def selected(B: int, T: int, kind: str) -> dict[str, Tensor]:
    """The arguments that select positions; one row is whole, one is empty."""
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0], lengths[-1] = T, 0
    mask = torch.rand(B, T) < 0.5
    mask[0], mask[-1] = True, False
    selections: dict[str, dict[str, Tensor]] = {
        "none": {},
        "lengths": {"lengths": lengths},
        "mask": {"mask": mask},
        "both": {"lengths": lengths, "mask": mask.flip(0)},
    }
    return selections[kind]


def unmasked_positions(B: int, T: int, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    unmasked = torch.ones(B, T, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            unmasked[b, t] = (lengths is None or t < lengths[b]) and (mask is None or mask[b, t])
    return unmasked


def formula(e: Tensor, s: Tensor, unmasked: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row: softmax over the unmasked positions, and the weighted mean."""
    c, lse = torch.zeros_like(e[:, 0]), torch.full_like(s[:, 0], -math.inf)
    for b in range(e.shape[0]):
        if unmasked[b].any():
            scores = s[b, unmasked[b]]
            c[b] = torch.softmax(scores, 0) @ e[b, unmasked[b]]
            lse[b] = torch.logsumexp(scores, 0)
    return c, lse


@every_selection
@pytest.mark.parametrize(("B", "T", "D"), [(1, 1, 1), (3, 17, 5), (4, 33, 3)])
def test_formula(B: int, T: int, D: int, kind: str) -> None:
    e, weight, v = (torch.randn(*shape, dtype=F64) for shape in ((B, T, D), (7, D), (7,)))
    selection: dict[str, Any] = selected(B, T, kind)
    s = e @ weight.T @ v  # v^T W e_t, with W e formed
    unmasked = unmasked_positions(B, T, **selection)
    expected = formula(e, s, unmasked)
    scored: tuple[dict[str, Any], ...] = ({"u": weight.T @ v}, {"scores": s})
    for scores in scored:
        c, lse = reference.attention_pool(e, **scores, **selection)
        assert_close("attention_pool", c, expected[0], "c")
        assert_close("attention_pool", lse, expected[1], "lse")
        prefixes, (L, last) = reference.prefix_pool(e, **scores, **selection)
        for t in range(T):
            c, _ = formula(e[:, : t + 1], s[:, : t + 1], unmasked[:, : t + 1])
            assert_close("prefix_pool", prefixes[:, t], c, f"c_{t}")
        assert_close("prefix_pool", log_sum_exp(L), expected[1], "L")
        assert_close("prefix_pool", last, expected[0], "c_last")


@every_selection
@by_u_or_scores
def test_gradcheck(by: str, kind: str) -> None:
    B, T, D = 3, 4, 2
    e = torch.randn(B, T, D, dtype=F64, requires_grad=True)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=F64, requires_grad=True)
    selection: dict[str, Any] = selected(B, T, kind)
    nonempty = unmasked_positions(B, T, **selection).any(1)

    def pool(e: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        c, lse = reference.attention_pool(e, **{by: s}, **selection)
        return c, lse[nonempty]  # -inf has no finite difference

    assert torch.autograd.gradcheck(pool, (e, s))


@parametrize_pairwise(kind=SELECTIONS, by=("u", "scores"), past=("none", "empty", "some"))
def test_prefix_gradcheck(kind: str, by: str, past: str) -> None:
    B, T, D = 3, 4, 2
    e = torch.randn(B, T, D, dtype=F64, requires_grad=True)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=F64, requires_grad=True)
    L = torch.tensor([[-math.inf, 0]] if past == "empty" else [[0.5, 1.5], [-1, 2], [0.2, 0.7]], dtype=F64).repeat(
        B if past == "empty" else 1, 1
    )
    c = torch.randn(B, D, dtype=F64)
    selection: dict[str, Any] = selected(B, T, kind)
    nonempty = unmasked_positions(B, T, **selection).any(1) | (past == "some")
    # L = -inf has no finite difference; its gradient is tested below.
    state = [] if past == "none" else [L.requires_grad_(past == "some"), c.requires_grad_()]

    def pool(e: Tensor, s: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        earlier = (state[0], state[1]) if state else None
        prefixes, (L, c) = reference.prefix_pool(e, **{by: s}, **selection, state=earlier)
        return prefixes, log_sum_exp(L)[nonempty], c

    assert torch.autograd.gradcheck(pool, (e, s, *state))


def test_gradient_of_an_empty_past_is_zero() -> None:
    e, u, c = (torch.randn(*shape, dtype=F64) for shape in ((2, 3, 4), (4,), (2, 4)))
    L = torch.tensor([[-math.inf, 0]] * 2, dtype=F64, requires_grad=True)
    prefixes, (_, last) = reference.prefix_pool(e, u, lengths=torch.tensor([3, 0]), state=(L, c))
    (gradient,) = torch.autograd.grad(prefixes.sum() + last.sum(), L)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_pool
@by_u_or_scores
def test_padding_is_ignored(by: str, pool: Any) -> None:
    B, T, D = 3, 5, 2
    lengths = torch.tensor([5, 3, 0])
    e = torch.randn(B, T, D, dtype=F64)
    s = torch.randn(*((D,) if by == "u" else (B, T)), dtype=F64)
    padding = ~unmasked_positions(B, T, lengths)
    dirty_e = e.masked_fill(padding[..., None], math.nan)
    dirty_s = s if by == "u" else s.masked_fill(padding, math.nan)

    def run(e: Tensor, s: Tensor) -> object:
        return pool(e, **{by: s}, lengths=lengths)

    clean = outputs_and_gradients(run, {"e": e, "s": s})
    dirty = outputs_and_gradients(run, {"e": dirty_e, "s": dirty_s})
    assert_same_bits(clean[0], dirty[0])
    assert_same_bits(list(clean[1].values()), list(dirty[1].values()))
    assert not dirty[1]["e"][padding].any()
    assert by == "u" or not dirty[1]["s"][padding].any()


@every_pool
def test_score_of_minus_infinity_is_a_mask(pool: Any) -> None:
    e, s = torch.randn(3, 5, 2, dtype=F64), torch.randn(3, 5, dtype=F64)
    mask = unmasked_positions(3, 5, torch.tensor([5, 3, 0]))
    masked = outputs_and_gradients(lambda e, s: pool(e, scores=s, mask=mask), {"e": e, "s": s})
    infinite = outputs_and_gradients(lambda e, s: pool(e, scores=s), {"e": e, "s": s.masked_fill(~mask, -math.inf)})
    assert_same_bits(masked[0], infinite[0])
    assert_same_bits(list(masked[1].values()), list(infinite[1].values()))


def test_large_scores_do_not_overflow() -> None:
    e = torch.randn(2, 9, 3)
    scores = torch.linspace(-3e4, 3e4, 18).view(2, 9)
    c, lse = reference.attention_pool(e, scores=scores)
    prefixes, (L, last) = reference.prefix_pool(e, scores=scores)
    assert torch.equal(c, e[:, -1])
    assert torch.equal(lse, scores[:, -1])
    assert_close("prefix_pool", prefixes, e)
    assert torch.equal(log_sum_exp(L), lse)
    assert_close("prefix_pool", last, c)
    # Falling scores: the first position keeps all the weight.
    prefixes, (L, _) = reference.prefix_pool(e, scores=scores.flip(1))
    assert torch.equal(prefixes, e[:, :1].expand_as(e))
    assert torch.equal(log_sum_exp(L), scores[:, -1])


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_prefixes_in_pieces(cut: int) -> None:
    e, u = torch.randn(3, 9, 5, dtype=F64), torch.randn(5, dtype=F64)
    mask = torch.rand(3, 9) < 0.6
    whole, (L, c) = reference.prefix_pool(e, u, mask=mask)
    first, state = reference.prefix_pool(e[:, :cut], u, mask=mask[:, :cut])
    second, state = reference.prefix_pool(e[:, cut:], u, mask=mask[:, cut:], state=state)
    assert_close("prefix_pool", torch.cat((first, second), 1), whole)
    assert_close("prefix_pool", state[0], L)
    assert_close("prefix_pool", state[1], c)


@pytest.mark.parametrize(("B", "T", "D"), [(0, 3, 4), (2, 0, 4), (0, 0, 4)])
def test_empty(B: int, T: int, D: int) -> None:
    e, u = torch.randn(B, T, D, dtype=F64), torch.randn(D, dtype=F64)
    L, c0 = 1 + torch.rand(B, 2, dtype=F64), torch.randn(B, D, dtype=F64)
    c, lse = reference.attention_pool(e, u)
    assert torch.equal(c, torch.zeros(B, D, dtype=F64))
    assert torch.equal(lse, torch.full((B,), -math.inf, dtype=F64))
    prefixes, state = reference.prefix_pool(e, u, state=(L, c0))
    assert prefixes.shape == (B, T, D)
    if T == 0:
        assert torch.equal(state[0], L)
        assert torch.equal(state[1], c0)
    for pool in (reference.attention_pool, reference.prefix_pool):
        _, gradients = outputs_and_gradients(pool, {"e": e, "u": u})
        assert not gradients["u"].any()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e8])
@every_pool
def test_large_scores_in_float32(pool: Any, size: float) -> None:
    """Scores of any size with differences of a few roundings give the results and gradients of float64."""
    B, T, D = 3, 17, 5
    rounding = float(torch.tensor(size).nextafter(torch.tensor(math.inf))) - size
    step = max(rounding, 2.0**-4)
    e, weight = torch.randn(B, T, D), torch.randn(B, D)
    scores = size + step * torch.randint(-2, 3, (B, T))
    found = []
    for dtype in (torch.float32, F64):
        leaves = [t.to(dtype).requires_grad_() for t in (e, scores)]
        c, after = pool(leaves[0], scores=leaves[1])
        if pool is reference.prefix_pool:
            lse, c = after[0][:, 1].log() + after[0][:, 0].detach() - size, c.sum(1)
        else:
            lse = after - size
        gradients = torch.autograd.grad((c * weight.to(dtype)).sum() + lse.sum(), leaves)
        found.append([c, *gradients])
    for low, high in zip(*found, strict=True):
        torch.testing.assert_close(low, high.float(), rtol=1e-4, atol=1e-5)
