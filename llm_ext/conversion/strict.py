"""Layers of llm_ext that are also instances of torch.nn.RNN, GRU and LSTM, for code that asks for these.

torch.compile refuses instances of the three classes, whatever they compute, unless `torch._dynamo.config.allow_rnn` is
set. So they are not what `convert` chooses by itself.
"""

from __future__ import annotations

from torch import nn

import llm_ext.nn

__all__ = ["GRU", "LSTM", "RNN"]


class RNN(llm_ext.nn.RNN, nn.RNN):
    __doc__ = llm_ext.nn.RNN.__doc__


class GRU(llm_ext.nn.GRU, nn.GRU):
    __doc__ = llm_ext.nn.GRU.__doc__


class LSTM(llm_ext.nn.LSTM, nn.LSTM):
    __doc__ = llm_ext.nn.LSTM.__doc__
