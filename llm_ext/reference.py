"""The truth: what every op of `llm_ext.ops` computes, in plain torch, written for reading."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Elman recurrence over a whole sequence, `h_t = σ(W x_t + b_ih + U h_{t-1} + b_hh)`.

    Args:
        x: [T, B, I]; with `batch_sizes` the packed rows [N, I] of all steps, one step after the other.
        h0: [B, H] or [1, B, H], or None for zeros; required with `batch_sizes`.
        w_ih: W, [H, I].
        w_hh: U, [H, H].
        b_ih: [H] or None.
        b_hh: [H] or None.
        batch_sizes: [T] int64, not increasing: how many rows step t has; N is their sum.
        nonlinearity: σ, one of "tanh", "relu", "sigmoid".
        reverse: run t from T-1 down to 0; y[t] still belongs to x[t].

    Returns:
        y, shaped like x with H in place of I, and h_n in the shape of h0, each row after its own last step.

    Source: J. Elman, "Finding structure in time", 1990.
    """
    activation = ACTIVATIONS[nonlinearity]
    H = w_hh.shape[0]
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    steps = torch.split(F.linear(x.reshape(sum(sizes), x.shape[-1]), w_ih, b_ih), sizes)
    h = x.new_zeros(x.shape[1], H) if h0 is None else h0.reshape(h0.shape[-2:])
    y = [x.new_empty(0, H)] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        y[t] = activation(steps[t] + F.linear(h[: sizes[t]], w_hh, b_hh))
        # Rows beyond this step's size wait: forward they have ended and hold h_n, in reverse they hold h0.
        h = torch.cat((y[t], h[sizes[t] :]))
    h_n = (h if h0 is None else h.reshape(h0.shape)).clone()
    return torch.cat((x.new_empty(0, H), *y)).view(*x.shape[:-1], H), h_n


def _admitted(e: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which positions take part, [B, T] bool."""
    admitted = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
    if lengths is not None:
        admitted &= torch.arange(e.shape[1], device=e.device) < lengths[:, None]
    return admitted if mask is None else admitted & mask


def _scores(e: Tensor, u: Tensor | None, scores: Tensor | None) -> Tensor:
    if (u is None) == (scores is None):
        raise ValueError("exactly one of u and scores must be given")
    return scores if u is None else e @ u  # type: ignore[return-value]


def attention_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention pooling, `α_i = softmax_i(s_i)`, `c = Σ α_i e_i`, over the positions that take part.

    Args:
        e: [B, T, D].
        u: [D], for the scores `s_i = u·e_i`; exactly one of `u` and `scores` is given.
        scores: s, [B, T].
        lengths: [B] int64: position i of row b takes part if i < lengths[b].
        mask: [B, T] bool: True takes part.

    Returns:
        c [B, D] and the log-sum-exp of the scores [B]; 0 and -inf in rows where nothing takes part.
    """
    admitted = _admitted(e, lengths, mask)
    # Replaced before use: whatever stands in padding, even NaN, reaches no result and no gradient.
    e = e.masked_fill(~admitted[..., None], 0)
    s = _scores(e, u, scores).masked_fill(~admitted, -math.inf)
    empty = (s == -math.inf).all(1)
    lse = torch.logsumexp(s.masked_fill(empty[:, None], 0), 1)
    alpha = torch.exp(s - lse[:, None])
    return torch.einsum("bt,btd->bd", alpha, e), lse.masked_fill(empty, -math.inf)


def prefix_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention pooling, c_t over the positions i ≤ t, as a recurrence of two numbers (L, c).

    No exponential of a score is formed, so none can overflow:
    `a_t = sigmoid(s_t - L_{t-1})`, `L_t = logaddexp(L_{t-1}, s_t)`, `c_t = c_{t-1} + a_t (e_t - c_{t-1})`.

    Args:
        e: [B, T, D].
        u: [D], for the scores `s_t = u·e_t`; exactly one of `u` and `scores` is given.
        scores: s, [B, T].
        lengths: [B] int64: position t of row b takes part if t < lengths[b].
        mask: [B, T] bool: True takes part; a position that does not leaves the state as it is.
        state: (L [B], c [B, D]) of everything before e, or None for the empty past (-inf, 0).

    Returns:
        c [B, T, D] and the state (L [B], c [B, D]) after the last position.

    Source: "Attention as an RNN", arXiv 2405.13956.
    """
    B, _, D = e.shape
    admitted = _admitted(e, lengths, mask)
    e = e.masked_fill(~admitted[..., None], 0)
    s = _scores(e, u, scores)
    admitted &= s != -math.inf
    # The step is computed where nothing takes part too, and not taken: any finite score will do there.
    s = s.masked_fill(~admitted, 0)
    if state is None:
        L, c = e.new_full((B,), -math.inf), e.new_zeros(B, D)
    else:
        L, c = state[0].clone(), state[1].clone()
    outputs = [e.new_empty(B, 0, D)]
    for e_t, s_t, admitted_t in zip(e.unbind(1), s.unbind(1), admitted.unbind(1), strict=True):
        a = torch.sigmoid(s_t - L)[:, None]
        c = torch.where(admitted_t[:, None], c + a * (e_t - c), c)
        L = torch.where(admitted_t, torch.logaddexp(L, s_t), L)
        outputs.append(c[:, None])
    return torch.cat(outputs, 1), (L, c)
