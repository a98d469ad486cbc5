"""The same language model in plain PyTorch: torch.nn.RNN, and attention by cumulative sums."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from llm_ext import LLM, RNN, AttentionPool

State = tuple[Tensor, Tensor]


class TorchPrefixPool(nn.Module):
    """Causal attention pooling by cumulative sums, with the parameters of an `AttentionPool`."""

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.weight, self.v, self.bias = pool.weight, pool.v, pool.bias

    def forward(self, e: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Pool each prefix of e [B, T, D]; return c [B, T, D] and the state (L [B, 2], c [B, D]).

        L is the largest score, and the sum of the exponentials relative to it.
        """
        if self.bias is None:
            scores = e @ (self.v @ self.weight)
        else:
            scores = torch.tanh(nn.functional.linear(e, self.weight, self.bias)) @ self.v
        # Shift the scores so that the largest exponential is 1 and the sums neither overflow nor vanish.
        shift = scores.amax(1, keepdim=True)  # [B, 1]
        if state is not None:
            shift = torch.maximum(shift, state[0][:, :1])
        weights = torch.exp(scores - shift)  # [B, T]
        above, below = torch.cumsum(weights[..., None] * e, 1), torch.cumsum(weights, 1)
        if state is not None:
            past = torch.exp(state[0][:, :1] - shift) * state[0][:, 1:]  # [B, 1]
            above, below = above + past[..., None] * state[1][:, None], below + past
        c = above / below[..., None]
        return c, (torch.cat((shift, below[:, -1:]), 1), c[:, -1])


def torch_peer(model: LLM) -> LLM:
    """Copy a model with an Elman network, and replace its llm_ext layers by those of PyTorch."""
    peer = copy.deepcopy(model)
    ours = peer.rnn
    assert isinstance(ours, RNN)
    theirs = nn.RNN(ours.input_size, ours.hidden_size, ours.num_layers, ours.nonlinearity, dropout=ours.dropout)
    theirs.load_state_dict(ours.state_dict())
    peer.rnn = theirs  # type: ignore[assignment]
    if peer.pool is not None:
        peer.pool = TorchPrefixPool(peer.pool)  # type: ignore[assignment]
    return peer.train(model.training)  # the new modules too
