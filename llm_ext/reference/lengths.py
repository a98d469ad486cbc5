"""Lengths of padded batches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["within_lengths"]


def within_lengths(lengths: Tensor, T: int) -> Tensor:
    """Return whether position t belongs to row b, ``t < lengths[b]``: bool ``[B, T]``."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]
