"""Attention pooling in plain PyTorch: over a whole sequence, and over each of its prefixes.

Both functions share these arguments:

- `e`: Vectors ``[B, T, D]``.
- `u`: ``[D]``, for the scores ``s_t = u · e_t``, or `scores`: s, ``[B, T]``. Exactly one of them must be given.
- `lengths`: int64 ``[B]``; positions ``t >= lengths[b]`` are masked.
- `mask`: bool ``[B, T]``, False for masked positions. A position is attended to if both lengths and mask allow it.

Values of `e` and `scores` at masked positions, even NaN, reach no result and no gradient. A score of -inf masks its
position, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_ext.reference.lengths import within_lengths

__all__ = ["attention_pool", "prefix_pool"]


def attention_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention pooling, ``α = softmax(s)``, ``c = Σ_t α_t e_t``, over the unmasked positions.

    Returns:
        c ``[B, D]``, and the log-sum-exp of the unmasked scores ``[B]``; 0 and -inf in a fully masked row.
    """
    e, s, unmasked = mask_positions(e, u, scores, lengths, mask)
    empty = ~unmasked.any(1)
    s = s.masked_fill(~unmasked, -math.inf).masked_fill(empty[:, None], 0)
    alpha = torch.softmax(s, 1).masked_fill(empty[:, None], 0)
    return torch.einsum("bt,btd->bd", alpha, e), log_sum_exp(s).masked_fill(empty, -math.inf)


def prefix_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention pooling: c_t pools over the unmasked positions up to t, as a recurrence of (L, c).

    ``a_t = sigmoid(s_t - L_{t-1})``, ``L_t = logaddexp(L_{t-1}, s_t)``, ``c_t = c_{t-1} + a_t (e_t - c_{t-1})``.
    L is held in two numbers, ``L = m + log z``: m is the largest score, and z the sum of ``exp(s - m)``. One number of
    the size of the scores would round away the logarithm of z. No exponential of a positive number is formed, so none
    overflows. A masked position leaves the state unchanged.

    `state` is ``(L [B, 2], c [B, D])`` of the positions before e, where L is m and z. None means ``((-inf, 0), 0)``.

    Returns:
        c ``[B, T, D]``, and the state ``(L [B, 2], c [B, D])`` after the last position. Its m has no gradient: that of
        L belongs to z.

    Source: "Attention as an RNN", arXiv 2405.13956.
    """
    B, _, D = e.shape
    e, s, unmasked = mask_positions(e, u, scores, lengths, mask)
    # The step is computed at masked positions too, and discarded: any finite score will do.
    s = s.masked_fill(~unmasked, 0)
    if state is None:
        m, z, c = e.new_full((B,), -math.inf), e.new_zeros(B), e.new_zeros(B, D)
    else:
        (m, z), c = state[0].unbind(1), state[1].clone()
        # From here on m is a constant, and z has the gradient of L.
        none = (z == 0) | (m == -math.inf)
        m = m.masked_fill(none, 0)
        z = z.masked_fill(none, 0) * torch.exp(m - m.detach())
        m = m.detach().masked_fill(none, -math.inf)
    outputs = [e.new_empty(B, 0, D)]
    for e_t, s_t, unmasked_t in zip(e.unbind(1), s.unbind(1), unmasked.unbind(1), strict=True):
        high = torch.maximum(m, s_t.detach())
        weight = torch.exp(s_t - high)
        total = z * torch.exp(m - high) + weight
        c = torch.where(unmasked_t[:, None], c + (weight / total)[:, None] * (e_t - c), c)
        m, z = torch.where(unmasked_t, high, m), torch.where(unmasked_t, total, z)
        outputs.append(c[:, None])
    return torch.cat(outputs, 1), (torch.stack((m, z), 1), c)


def log_sum_exp(s: Tensor) -> Tensor:
    """Return the log-sum-exp over the last dimension.

    The gradient of torch.logsumexp is ``exp(s - lse)``, which has the rounding error of lse; here it is normalized.
    """
    shift = torch.logsumexp(s, -1, keepdim=True).detach()
    shift = shift.masked_fill(shift.isinf(), 0)
    return shift.squeeze(-1) + torch.exp(s - shift).sum(-1).log()


def mask_positions(
    e: Tensor, u: Tensor | None, scores: Tensor | None, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return e with 0 at masked positions, the scores, and the unmasked positions, bool ``[B, T]``."""
    unmasked = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
    if lengths is not None:
        unmasked = unmasked & within_lengths(lengths, e.shape[1])
    if mask is not None:
        unmasked = unmasked & mask
    e = e.masked_fill(~unmasked[..., None], 0)
    if u is not None and scores is None:
        s = e @ u
    elif scores is not None and u is None:
        s = scores
    else:
        raise ValueError("exactly one of u and scores must be given")
    return e, s, unmasked & (s != -math.inf)
