"""Affine maps of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import llm_ext
from bench import limits
from bench.cases.building import FMA_PEAK, double, limit, size_name, timed_call
from bench.comparison import OURS, Candidate, Case, Comparison, tensors
from bench.timing import Call

__all__ = ["linear"]


def linear(phase: str, N: int, I: int, O: int) -> Case:  # noqa: E741
    """An affine map of N rows; training computes its three gradients as well."""
    training = phase == "training"
    work = 2 * N * I * O * (3 if training else 1) / 1e9

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        other = torch.nn.Linear(I, O, dtype=dtype)
        ours = llm_ext.Linear(I, O, dtype=dtype)
        ours.load_state_dict(other.state_dict())
        x = torch.randn(N, I, dtype=dtype, requires_grad=training)
        g = torch.randn(N, O, dtype=dtype) if training else None
        doubles = [double(tensor) for tensor in (x, other.weight, other.bias)]
        with torch.set_grad_enabled(training):
            expected = timed_call(lambda: (F.linear(*doubles),), doubles, None if g is None else g.double())()

        def linear_call(layer: torch.nn.Linear) -> Callable[[], Call]:
            return lambda: timed_call(lambda: (layer(x),), [x, layer.weight, layer.bias], g)

        return Comparison(
            tensors(expected),
            Candidate("llm_ext.Linear", OURS, linear_call(ours)),
            [
                Candidate("torch.nn.Linear", "torch", linear_call(other)),
                limit(FMA_PEAK, lambda: limits.multiply_add(work, threads)),
            ],
        )

    return Case(f"linear/{phase}/{size_name(N=N, I=I, O=O)}", build, training, work, "GFLOP")
