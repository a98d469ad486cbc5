"""Additive attention in plain PyTorch, and one step of a decoder that uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext.reference.lengths import within_lengths
from llm_ext.reference.recurrence import multilayer_rnn

__all__ = ["additive_attention", "attention_step"]


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Additive attention over keys.

    ``s_qk = v · tanh(query_q + keys_k)``, ``α_q = softmax_k(s_qk)``, ``c_q = Σ_k α_qk values_k``.

    Args:
        query: Projected queries, ``[B, Tq, A]``.
        keys: Projected keys, ``[B, Tk, A]``. A bias is part of either of the two.
        v: ``[A]``.
        values: ``[B, Tk, Dv]``.
        key_lengths: int64 ``[B]``; keys ``k >= key_lengths[b]`` are masked.
        mask: bool ``[B, Tk]`` or ``[B, Tq, Tk]``, False for masked keys. A key is attended to if both lengths and mask
            allow it.
        need_weights: Return α as well.

    Returns:
        c ``[B, Tq, Dv]``, and α ``[B, Tq, Tk]`` or None; 0 for a query whose keys are all masked.

    Source: "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.
    """
    (B, Tq, _), Tk = query.shape, keys.shape[1]
    unmasked = torch.ones(B, Tq, Tk, dtype=torch.bool, device=query.device)
    if mask is not None:
        unmasked = unmasked & (mask[:, None] if mask.dim() == 2 else mask)
    if key_lengths is not None:
        unmasked = unmasked & within_lengths(key_lengths, Tk)[:, None]
    # Values of keys that no query attends to, even NaN, reach no result and no gradient.
    unused = ~unmasked.any(1)[..., None]
    keys, values = keys.masked_fill(unused, 0), values.masked_fill(unused, 0)
    s = (torch.tanh(query[:, :, None] + keys[:, None]) @ v).masked_fill(~unmasked, -math.inf)
    empty = (s == -math.inf).all(2, keepdim=True)
    alpha = torch.softmax(s.masked_fill(empty, 0), 2).masked_fill(empty, 0)
    return alpha @ values, alpha if need_weights else None


def attention_step(
    mode: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Sequence[Tensor]],
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    input_projections: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of a decoder with attention: recurrent layers, then ``out = tanh(W_out y + b_out + context)``.

    The context is that of `additive_attention` with the query ``W_query y``.

    Args:
        mode: See `multilayer_rnn`.
        x: Input of N rows, ``[1, N, I]``. With `input_projections`, int64 ids ``[1, N]``.
        state: ``(h0,)``, or ``(h0, c0)`` for an LSTM, each ``[L, N, H]``.
        weights: ``(w_ih, w_hh[, b_ih, b_hh])`` of each layer.
        w_query: W_query, ``[A, H]``.
        keys: Projected keys of B sources, ``[B, Tk, A]``; N / B consecutive rows attend to each source.
        v: ``[A]``.
        values: ``[B, Tk, D]``.
        w_out: W_out, ``[D, H]``.
        b_out: ``[D]``. None means zeros.
        input_projections: ``W_ih x + b_ih`` of every id for the first layer, ``[V, G H]``, or None.
        key_lengths: int64 ``[B]``; keys ``k >= key_lengths[b]`` of source b are masked.

    Returns:
        out ``[N, D]``, and the new state, each ``[L, N, H]``.

    Source: attention after the recurrence: Luong et al., arXiv 1508.04025.
    """
    projections = None if input_projections is None else [input_projections]
    y, state = multilayer_rnn(mode, x, state, weights, input_projections=projections)
    B, N = len(keys), x.shape[1]
    query = F.linear(y[0], w_query).view(B, N // max(B, 1), keys.shape[2])
    context, _ = additive_attention(query, keys, v, values, key_lengths=key_lengths)
    return torch.tanh(F.linear(y[0], w_out, b_out) + context.flatten(0, 1)), state
