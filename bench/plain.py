"""What one would write without llm_ext: the formulas in plain torch, and the model on torch.nn.RNN."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llm_ext


def pool_as_written(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling as its formula stands, with W e_i formed: e [B, T, D] to c [B, D]."""
    alpha = torch.softmax(F.linear(e, weight) @ v, 1)
    return torch.bmm(alpha[:, None], e)[:, 0]


def pool_folded(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling with u = Wᵀ v formed first: e [B, T, D] to c [B, D]."""
    alpha = torch.softmax(e @ (v @ weight), 1)
    return torch.bmm(alpha[:, None], e)[:, 0]


def pool_sdpa(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Attention pooling as torch's attention with one constant query: e [B, T, D] to c [B, D]."""
    query = (v @ weight).expand(e.shape[0], 1, -1)
    return F.scaled_dot_product_attention(query, e, e, scale=1.0)[:, 0]


def prefix_cumsum(e: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Causal pooling by cumulative sums: c [B, T, D]; in float32 it breaks where scores lie 88 apart."""
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
    """Causal pooling as torch's causal attention with the same query everywhere: c [B, T, D]."""
    return F.scaled_dot_product_attention((v @ weight).expand_as(e), e, e, is_causal=True, scale=1.0)


def additive_of_projected(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> Tensor:
    """Additive attention of projected queries and keys."""
    return torch.softmax(torch.tanh(query[:, :, None] + keys[:, None]) @ v, -1) @ values


def additive_product(
    query: Tensor, keys: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """Additive attention with the scores as a product with v: query [B, Tq, D], keys [B, Tk, D] to c [B, Tq, D]."""
    return additive_of_projected(F.linear(query, q_proj_weight), F.linear(keys, k_proj_weight, bias), v, keys)


def additive_sum(
    query: Tensor, keys: Tensor, q_proj_weight: Tensor, k_proj_weight: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    """Additive attention with the scores as a sum, which torch.compile fuses with tanh; else as `additive_product`."""
    hidden = F.linear(query, q_proj_weight)[:, :, None] + F.linear(keys, k_proj_weight, bias)[:, None]
    return torch.softmax((torch.tanh(hidden) * v).sum(-1), -1) @ keys


class CausalPool(nn.Module):
    """`llm_ext.AttentionPool(..., causal=True)` in plain torch, with its parameters and its state."""

    def __init__(self, pool: llm_ext.AttentionPool) -> None:
        super().__init__()
        self.weight, self.v = pool.weight, pool.v

    def forward(self, e: Tensor, *, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pool e [B, T, D]; the state is that of `llm_ext.ops.prefix_pool`."""
        if state is None:
            c = prefix_mask(e, self.weight, self.v)
            return c, (torch.logsumexp(e @ (self.v @ self.weight), 1), c[:, -1])
        if e.shape[1] != 1:
            raise ValueError(f"CausalPool: e must be [B, 1, D] when there is a state, got {list(e.shape)}")
        L, c = state
        s = (e @ (self.v @ self.weight))[:, 0]
        c = torch.lerp(c, e[:, 0], torch.sigmoid(s - L)[:, None])
        return c[:, None], (torch.logaddexp(L, s), c)


def plain_linears(model: nn.Module) -> None:
    """Put torch.nn's layers with the same parameters in the place of those that are llm_ext.Linear."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, llm_ext.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight, plain.bias = layer.weight, layer.bias
            setattr(model, name, plain)


def plain_model(model: llm_ext.LLM) -> llm_ext.LLM:
    """Return a copy with the same weights, on torch.nn.RNN and plain-torch pooling (linear score)."""
    model = copy.deepcopy(model)
    own = model.rnn
    dtype = next(own.parameters()).dtype
    rnn = nn.RNN(own.input_size, own.hidden_size, own.num_layers, own.nonlinearity, dtype=dtype)
    rnn.load_state_dict(own.state_dict())
    model.rnn = rnn  # type: ignore[assignment]
    if model.pool is not None:
        model.pool = CausalPool(model.pool)  # type: ignore[assignment]
    plain_linears(model)
    return model
