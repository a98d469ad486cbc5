"""Layers: modules that hold parameters and call :mod:`llm_ext.ops`."""

from llm_ext.nn.attention import AdditiveAttention, AttentionPool
from llm_ext.nn.cells import GRUCell, LSTMCell, RNNCell
from llm_ext.nn.embedding import AffineEmbedding
from llm_ext.nn.linear import Linear
from llm_ext.nn.quantized import (
    QuantizedAffineEmbedding,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLinear,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)
from llm_ext.nn.recurrent import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AffineEmbedding",
    "AttentionPool",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "QuantizedAffineEmbedding",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "RNNCell",
]
