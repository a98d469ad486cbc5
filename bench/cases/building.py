"""Shared parts of the cases.

`phase` is "inference" or "training", which computes gradients as well.

Letters of sizes: B batch, T steps, I input, H hidden, L layers, D size of pooled vectors, A attention size, Tq queries,
Tk keys, N rows, O outputs, V vocabulary, E embedding, S tokens of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bench.comparison import LIMIT, Candidate
from bench.timing import Call

__all__ = [
    "COPY",
    "FMA_PEAK",
    "READ_U",
    "READ_WEIGHTS",
    "double",
    "dtype_name",
    "given_targets",
    "limit",
    "size_name",
    "timed_call",
]

# Names of limits of the machine.
FMA_PEAK, READ_U, READ_WEIGHTS, COPY = "FMA peak", "reading U", "reading the weights", "copy"


def size_name(**sizes: int) -> str:
    """Return sizes as in the name of a case, such as "B1-T128"."""
    return "-".join(f"{letter}{size}" for letter, size in sizes.items())


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as in the name of a case, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def given_targets(targets: Mapping[str, float | None]) -> dict[str, float]:
    """Return the targets that are not None."""
    return {name: target for name, target in targets.items() if target is not None}


def double(tensor: Tensor) -> Tensor:
    """Return a float64 leaf with the same values that requires a gradient if `tensor` does."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def timed_call(forward: Callable[[], tuple[Tensor, ...]], inputs: Sequence[Tensor], g: Tensor | None) -> Call:
    """Return the call to time in torch.

    Args:
        forward: the forward pass.
        inputs: tensors whose gradients are computed in training.
        g: gradient of the first result; None for inference, which times `forward` alone.
    """
    if g is None:
        return forward

    def train() -> tuple[Tensor, ...]:
        y = forward()[0]
        return y, *torch.autograd.grad(y, inputs, g)

    return train


def limit(name: str, build: Callable[[], Call]) -> Candidate:
    """Return a limit of the machine as a candidate; its calls return 1."""
    return Candidate(name, LIMIT, build, reference=[torch.ones(())])
