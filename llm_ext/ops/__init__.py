"""Functions with fused CPU and CUDA kernels, as registered torch ops with autograd.

They take float32, float64, bfloat16 and float16, compute 16-bit dtypes in float32, follow autocast, and stay one graph
node each under ``torch.compile(fullgraph=True)``. :mod:`llm_ext.reference` has the same functions in plain torch.

Shapes use these letters: T steps, B batch, N packed rows, I input size, H hidden size, P output size (H, or the size an
LSTM projects to), G gates, R layers times directions, D vector size, A attention size, O output size, V ids.
"""

from llm_ext.ops import _flops as _flops  # registers the formulas
from llm_ext.ops.attention import additive_attention, attention_step
from llm_ext.ops.linear import linear, linear_argmax
from llm_ext.ops.pooling import attention_pool, prefix_pool
from llm_ext.ops.recurrence import gru, lstm, multilayer_rnn, rnn

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
