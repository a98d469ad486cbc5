"""The models of llm_ext rebuilt on torch.nn, with the same weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import llm_ext
from bench.torch_attention import prefix_mask

__all__ = ["CausalPool", "EagerAttention", "TorchLayer", "torch_llm", "torch_seq2seq"]


class CausalPool(nn.Module):
    """`llm_ext.AttentionPool(..., causal=True)` in plain torch, with its parameters and state."""

    def __init__(self, pool: llm_ext.AttentionPool) -> None:
        super().__init__()
        self.weight, self.v = pool.weight, pool.v

    def forward(self, e: Tensor, *, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Pool e [B, T, D]; the state is the log-sum-exp of the scores and the pooled vector of what came before."""
        if state is None:
            c = prefix_mask(e, self.weight, self.v)
            return c, (torch.logsumexp(e @ (self.v @ self.weight), 1), c[:, -1])
        if e.shape[1] != 1:
            raise ValueError(f"CausalPool: e must be [B, 1, D] if a state is given, got {list(e.shape)}")
        L, c = state
        s = (e @ (self.v @ self.weight))[:, 0]
        c = torch.lerp(c, e[:, 0], torch.sigmoid(s - L)[:, None])
        return c[:, None], (torch.logaddexp(L, s), c)


class TorchLayer(nn.Module):
    """A recurrent layer of torch.nn with the weights of one of llm_ext, and its argument `lengths`.

    Args:
        layer: the layer of llm_ext.
        torch_class: the class of torch.nn.
        pack: whether to pack by lengths. Where the outputs beyond a length are not used, torch is faster without.
    """

    def __init__(self, layer: Any, torch_class: Any, pack: bool) -> None:
        super().__init__()
        options = {"num_layers": layer.num_layers, "bidirectional": layer.bidirectional}
        dtype = next(layer.parameters()).dtype
        self.layer: Any = torch_class(layer.input_size, layer.hidden_size, dtype=dtype, **options)
        self.layer.load_state_dict(layer.state_dict())
        self.pack = pack

    def forward(self, x: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """Run over x [T, B, I]."""
        if lengths is None or not self.pack:
            return self.layer(x, hx)
        y, last = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        return pad_packed_sequence(y, total_length=len(x))[0], last


class EagerAttention(nn.Module):
    """`llm_ext.AdditiveAttention` in plain torch, which forms the tensor of Tq × Tk × A.

    Args:
        attention: the layer of llm_ext, whose parameters it shares.
        project_once: whether keys are projected once for all steps, or at each step.
    """

    def __init__(self, attention: llm_ext.AdditiveAttention, project_once: bool) -> None:
        super().__init__()
        self.project_once = project_once
        self.q_proj_weight, self.k_proj_weight = attention.q_proj_weight, attention.k_proj_weight
        self.v, self.bias = attention.v, attention.bias

    def project_keys(self, keys: Tensor) -> Tensor:
        """Return W_k keys + b or, if keys are projected at each step, the keys unchanged."""
        return F.linear(keys, self.k_proj_weight, self.bias) if self.project_once else keys

    def forward(
        self,
        query: Tensor,
        keys: None,
        values: Tensor,
        *,
        key_lengths: Tensor | None = None,
        projected_keys: Tensor,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to values; `projected_keys` is the result of `project_keys`."""
        if not self.project_once:
            projected_keys = F.linear(projected_keys, self.k_proj_weight, self.bias)
        q = F.linear(query, self.q_proj_weight)
        scores = torch.tanh(q[:, :, None] + projected_keys[:, None]) @ self.v
        if key_lengths is not None:
            beyond = torch.arange(values.shape[1]) >= key_lengths[:, None, None]
            scores = scores.masked_fill(beyond, -math.inf)
        alpha = torch.softmax(scores, -1)
        return torch.bmm(alpha, values), alpha if need_weights else None


def _replace_linears(model: nn.Module) -> None:
    """Replace each llm_ext.Linear by a torch.nn.Linear with the same parameters."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, llm_ext.Linear):
            other = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            other.weight, other.bias = layer.weight, layer.bias
            setattr(model, name, other)


def torch_llm(model: llm_ext.LLM) -> llm_ext.LLM:
    """Return a copy with the same weights on torch.nn.RNN and plain-torch pooling (linear score)."""
    model = copy.deepcopy(model)
    attributes: Any = model  # the replacements have other classes
    layer = attributes.rnn
    dtype = next(layer.parameters()).dtype
    attributes.rnn = nn.RNN(layer.input_size, layer.hidden_size, layer.num_layers, layer.nonlinearity, dtype=dtype)
    attributes.rnn.load_state_dict(layer.state_dict())
    if model.pool is not None:
        attributes.pool = CausalPool(attributes.pool)
    _replace_linears(model)
    return model


def torch_seq2seq(model: llm_ext.Seq2Seq, *, project_once: bool = True) -> llm_ext.Seq2Seq:
    """Return a copy with the same weights on torch.nn's layers and eager attention; see `EagerAttention`."""
    torch_class = getattr(nn, str(model.config()["cell"]).upper())
    model = copy.deepcopy(model)
    attributes: Any = model  # the replacements have other classes
    attributes.encoder = TorchLayer(model.encoder, torch_class, pack=True)
    attributes.decoder = TorchLayer(model.decoder, torch_class, pack=False)
    attributes.attention = EagerAttention(model.attention, project_once)
    _replace_linears(model)
    return model
