"""Attention in plain torch, in the forms that a user would write without llm_ext."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "additive_product",
    "additive_projected",
    "additive_sum",
    "pool_as_written",
    "pool_folded",
    "pool_sdpa",
    "prefix_cumsum",
    "prefix_mask",
    "prefix_sdpa",
]


def pool_as_written(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling by the formula v·(W e_t), which forms W e_t: e [B, T, D] to c [B, D]."""
    alpha = torch.softmax(F.linear(e, weight) @ v, 1)
    return torch.bmm(alpha[:, None], e)[:, 0]


def pool_folded(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling with u = Wᵀ v computed first: e [B, T, D] to c [B, D]."""
    alpha = torch.softmax(e @ (v @ weight), 1)
    return torch.bmm(alpha[:, None], e)[:, 0]


def pool_sdpa(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling by scaled_dot_product_attention with one constant query: e [B, T, D] to c [B, D]."""
    query = (v @ weight).expand(e.shape[0], 1, -1)
    return F.scaled_dot_product_attention(query, e, e, scale=1.0)[:, 0]


def prefix_cumsum(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Causal pooling by cumulative sums: c [B, T, D]. float32 underflows where scores differ by 88 or more."""
    s = e @ (v @ weight)
    p = torch.exp(s - s.amax(1, keepdim=True))[..., None]
    return (p * e).cumsum(1) / p.cumsum(1)


def prefix_mask(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Causal pooling as a masked T × T matrix product: c [B, T, D]."""
    T = e.shape[1]
    s = (e @ (v @ weight))[:, None].expand(-1, T, -1)
    future = torch.ones(T, T, dtype=torch.bool, device=e.device).triu(1)
    return torch.softmax(s.masked_fill(future, -math.inf), -1) @ e


def prefix_sdpa(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Causal pooling by causal scaled_dot_product_attention with a constant query: c [B, T, D]."""
    return F.scaled_dot_product_attention((v @ weight).expand_as(e), e, e, is_causal=True, scale=1.0)


def additive_projected(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> Tensor:
    """Additive attention of projected queries [B, Tq, A] and keys [B, Tk, A]."""
    return torch.softmax(torch.tanh(query[:, :, None] + keys[:, None]) @ v, -1) @ values


def additive_product(
    query: Tensor, keys: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """Additive attention with the scores as a product with v: query [B, Tq, D], keys [B, Tk, D] to c [B, Tq, D]."""
    return additive_projected(F.linear(query, q_proj_weight), F.linear(keys, k_proj_weight, bias), v, keys)


def additive_sum(
    query: Tensor, keys: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """Additive attention with the scores as a sum, which torch.compile fuses with tanh; else as `additive_product`."""
    hidden = F.linear(query, q_proj_weight)[:, :, None] + F.linear(keys, k_proj_weight, bias)[:, None]
    return torch.softmax((torch.tanh(hidden) * v).sum(-1), -1) @ keys
