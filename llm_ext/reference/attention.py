"""Additive attention in plain PyTorch, and one step of a decoder that uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Additive attention, `s_qk = v·tanh(query_q + keys_k)`, `α_q = softmax_k(s_qk)`, `c_q = Σ_k α_qk values_k`.

    Args:
        query: projected queries, [B, Tq, A].
        keys: projected keys, [B, Tk, A]; a bias is part of either of the two.
        v: [A].
        values: [B, Tk, Dv].
        key_lengths: [B] int64; key k of row b takes part in the softmax if k < key_lengths[b].
        mask: [B, Tk] or [B, Tq, Tk] bool; a key takes part where it is True. With both, it must satisfy both.
        need_weights: return α as well.

    Returns:
        c [B, Tq, Dv], and α [B, Tq, Tk] or None; 0 for a query without an unmasked key.

    Source: "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473.
    """
    (B, Tq, _), Tk = query.shape, keys.shape[1]
    unmasked = torch.ones(B, Tq, Tk, dtype=torch.bool, device=query.device)
    if mask is not None:
        unmasked &= mask[:, None] if mask.dim() == 2 else mask
    if key_lengths is not None:
        unmasked &= torch.arange(Tk, device=query.device) < key_lengths[:, None, None]
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
    """One step of a decoder with attention: recurrent layers, then `out = tanh(W_out y + b_out + context)`.

    The context is that of `additive_attention` with the query `W_query y`.

    Args:
        mode: as in `multilayer_rnn`.
        x: [1, N, I]; with `input_projections` row indices into it, [1, N] int64.
        state: (h0,), or (h0, c0) of an LSTM, each [L, N, H].
        weights: of each layer, as in `multilayer_rnn`.
        w_query: W_query, [A, H].
        keys: projected keys of B sources, [B, Tk, A]; N / B consecutive rows attend to each source.
        v: [A].
        values: [B, Tk, D].
        w_out: W_out, [D, H].
        b_out: [D], or None for zeros.
        input_projections: `W_ih x_v + b_ih` of every possible input, [V, G H], or None.
        key_lengths: [B] int64; key k of source b takes part in the softmax if k < key_lengths[b].

    Returns:
        out [N, D], and the new state, each tensor [L, N, H].

    Source: attention after the recurrence: Luong et al., arXiv 1508.04025.
    """
    projections = None if input_projections is None else [input_projections]
    y, state = multilayer_rnn(mode, x, state, weights, input_projections=projections)
    B, N = len(keys), x.shape[1]
    query = F.linear(y[0], w_query).view(B, N // max(B, 1), keys.shape[2])
    context, _ = additive_attention(query, keys, v, values, key_lengths=key_lengths)
    return torch.tanh(F.linear(y[0], w_out, b_out) + context.flatten(0, 1)), state
