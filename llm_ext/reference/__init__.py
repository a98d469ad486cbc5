"""The functions of `llm_ext.ops` in plain PyTorch, with the same names, arguments and results.

They are written for reading, run on any device and in any floating-point dtype, and are differentiable by autograd.
In float64 they define the expected results: where an op and its reference differ, the op is wrong.
"""

from llm_ext.reference.attention import additive_attention, attention_step
from llm_ext.reference.linear import linear, linear_argmax
from llm_ext.reference.pooling import attention_pool, prefix_pool
from llm_ext.reference.recurrence import gru, lstm, multilayer_rnn, rnn

__all__ = [
    "additive_attention",
    "attention_pool",
    "attention_step",
    "gru",
    "linear",
    "linear_argmax",
    "lstm",
    "multilayer_rnn",
    "prefix_pool",
    "rnn",
]
