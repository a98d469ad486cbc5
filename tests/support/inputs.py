"""Random inputs, packed rows, and memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor

# Empty, one, odd, and one above a vector of 16 or 32 elements.
SIZES = (0, 1, 3, 17, 33)


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Random normal numbers that require a gradient; the same numbers for every dtype, up to rounding."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()


def noncontiguous(tensor: Tensor) -> Tensor:
    """The same values with swapped strides and gaps that hold NaN."""
    base = tensor.new_full([2 * size + 1 for size in reversed(tensor.shape)], float("nan"))
    slices = tuple(slice(1, 2 * size + 1, 2) for size in reversed(tensor.shape))
    view = base[slices].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor.detach())


def batch_sizes_of(lengths: list[int]) -> Tensor:
    """For each step t, the number of sequences longer than t: PackedSequence.batch_sizes."""
    return torch.tensor([sum(n > t for n in lengths) for t in range(max(lengths))], dtype=torch.int64)


def pack(x: Tensor, batch_sizes: Tensor) -> Tensor:
    """The first batch_sizes[t] rows of each step of x [T, B, ...], concatenated."""
    return torch.cat([step[:size] for step, size in zip(x, batch_sizes.tolist(), strict=True)])
