"""Initialization of recurrent layers that lets deep and long networks train from the first step."""

from __future__ import annotations

import torch
from torch import nn

from llm_ext.models.recurrent_layers import RecurrentLayer
from llm_ext.nn import LSTM

__all__ = ["init_recurrent_"]


def init_recurrent_(layer: RecurrentLayer) -> None:
    """Make U orthogonal, gate by gate, and the biases zero, in place; the forget gates of an LSTM get a bias of 1.

    An orthogonal U keeps the norm of the hidden state. W is not changed.

    Args:
        layer: RNN, GRU or LSTM.

    Source: Saxe et al., arXiv 1312.6120; the forget gate: Gers et al., "Learning to forget", 2000.
    """
    for name, parameter in layer.named_parameters():
        gates = torch.split(parameter.detach(), layer.hidden_size)
        if name.startswith("weight_hh"):
            for gate in gates:
                # The QR decomposition of LAPACK has no 16-bit version.
                dtype = torch.float32 if gate.dtype.itemsize == 2 else gate.dtype
                gate.copy_(nn.init.orthogonal_(torch.empty_like(gate, dtype=dtype)))
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih") and isinstance(layer, LSTM):
                # The order is i, f, g, o. A bias of 0 would halve c, and its gradient, at each step.
                nn.init.ones_(gates[1])
