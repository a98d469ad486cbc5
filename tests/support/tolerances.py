"""The table of tolerances: the largest error of each op and dtype against the float64 reference."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64)
# Recurrences are computed in float32 where tensors are stored in these.
HALF_DTYPES = (torch.bfloat16, torch.float16)
ALL_DTYPES = DTYPES + HALF_DTYPES

_RECURRENCES = ("rnn", "gru", "lstm")
_POOLS = ("attention_pool", "prefix_pool")

# Largest error against the float64 reference, in units of max(1, largest expected magnitude): the error of a long sum
# scales with its largest terms, not with its result. Never raised inside a test.
TOLERANCE = {
    # Up to 1024 steps, each rounding a dot product of I + H terms; the recurrence contracts, so old errors fade. The
    # cell state of an LSTM is a sum, whose old terms fade as well.
    **{(op, torch.float32): 5e-5 for op in _RECURRENCES},
    # The same errors, through weight gradients that sum over T * B rows.
    **{(f"{op}_backward", torch.float32): 1e-4 for op in _RECURRENCES},
    # Results are rounded to 8 or 11 bits. States stay in float32 from step to step, but the avx512_bf16 kernels round
    # the operands of a product to bfloat16.
    **{(op, torch.bfloat16): 8e-3 for op in _RECURRENCES},
    **{(op, torch.float16): 5e-4 for op in _RECURRENCES},
    # Gradients are computed from rounded states and gates, and are rounded themselves. A derivative such as 1 - h^2
    # has the error of h, which a chain of steps multiplies.
    **{(f"{op}_backward", torch.bfloat16): 2.4e-2 for op in _RECURRENCES},
    **{(f"{op}_backward", torch.float16): 3e-3 for op in _RECURRENCES},
    # The product also reads states and dz rounded, as matrix units do.
    **{(f"{op}_rounded", torch.bfloat16): 8e-3 for op in _RECURRENCES},
    **{(f"{op}_rounded", torch.float16): 1e-3 for op in _RECURRENCES},
    **{(f"{op}_rounded_backward", torch.bfloat16): 2.4e-2 for op in _RECURRENCES},
    **{(f"{op}_rounded_backward", torch.float16): 3e-3 for op in _RECURRENCES},
    # Operands of a product are rounded to 11 bits, as in float16; stored tensors are not.
    **{(f"{op}_tf32", torch.float32): 1e-3 for op in _RECURRENCES},
    **{(f"{op}_tf32_backward", torch.float32): 3e-3 for op in _RECURRENCES},
    # One softmax and one weighted mean: no error grows with T.
    ("attention_pool", torch.float32): 1e-5,
    ("attention_pool_backward", torch.float32): 5e-5,
    # L and c pass through T steps, each of which rounds once.
    ("prefix_pool", torch.float32): 5e-5,
    ("prefix_pool_backward", torch.float32): 1e-4,
    # Results are rounded to 8 or 11 bits; sums and the state are not.
    **{(op, torch.bfloat16): 4e-3 for op in _POOLS},
    **{(op, torch.float16): 5e-4 for op in _POOLS},
    # Gradients are rounded, and are dot products of up to 1000 terms with the rounded c.
    **{(f"{op}_backward", torch.bfloat16): 3e-2 for op in _POOLS},
    **{(f"{op}_backward", torch.float16): 6e-3 for op in _POOLS},
    # A sum over A, one softmax and one weighted mean.
    ("additive_attention", torch.float32): 1e-5,
    ("additive_attention_backward", torch.float32): 5e-5,
    # Computed in float32; results and incoming gradients are rounded to 8 or 11 bits.
    ("additive_attention", torch.bfloat16): 4e-3,
    ("additive_attention_backward", torch.bfloat16): 1.6e-2,
    ("additive_attention", torch.float16): 5e-4,
    ("additive_attention_backward", torch.float16): 2e-3,
    # The reference has the same weights. A factor that lies between two integers may be rounded to the other one, if a
    # float32 rounding moves it. Those of inputs have 14 bits or more. Those of states have 7 and would be off by more,
    # but none is in the tests.
    ("recurrence_int8", torch.float32): 1e-4,
    # As of the recurrences in float32.
    ("recurrence_bfloat16", torch.float32): 5e-5,
    # int8 layers against float32 layers of the same weights: states of 7 bits, each number off by 1/126 of the largest.
    ("recurrence_rounded_states", torch.float32): 3e-2,
    # AVX512-BF16 rounds inputs and states to 8 bits.
    ("recurrence_bfloat16_pairs", torch.float32): 8e-3,
    ("linear_pairs", torch.float32): 8e-3,
    # A dot product, and sums over rows.
    ("linear", torch.float32): 2e-5,
    ("linear_backward", torch.float32): 5e-5,
    # Several of the above, one after the other.
    ("model", torch.float32): 1e-4,
    # float64 differs from the reference in the order of sums only.
    **{(op, torch.float64): 1e-12 for op in (*_RECURRENCES, "prefix_pool")},
    **{(f"{op}_backward", torch.float64): 1e-11 for op in (*_RECURRENCES, "prefix_pool")},
    **{(op, torch.float64): 1e-13 for op in ("attention_pool", "additive_attention", "linear")},
    **{(f"{op}_backward", torch.float64): 1e-12 for op in ("attention_pool", "additive_attention", "linear")},
    ("model", torch.float64): 1e-11,
}
# Larger tolerances of one device. In 16 bits the CUDA kernels read pre-activations, states and dz rounded, because
# matrix units take them so; in float16 an LSTM that forgets little adds up the errors of many steps.
TOLERANCE_ON = {
    "cuda": {
        **{(op, torch.bfloat16): 2e-2 for op in _RECURRENCES},
        **{(op, torch.float16): 2.5e-3 for op in _RECURRENCES},
        **{(f"{op}_backward", torch.float16): 1e-2 for op in _RECURRENCES},
    }
}


def tolerance(op: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest error of `op` in units of max(1, largest expected magnitude)."""
    return TOLERANCE_ON.get(device, {}).get((op, dtype), TOLERANCE[op, dtype])
