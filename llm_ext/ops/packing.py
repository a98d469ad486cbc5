"""Padded batches packed row by row, as a PackedSequence has them: the CPU kernels read batch sizes, not lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_ext.reference.lengths import within_lengths

__all__ = ["Packing", "pack_lengths", "within_lengths"]


class Packing(NamedTuple):
    """Index tensors that pack a padded batch [T, B, *] of R non-empty rows and N steps in all.

    Attributes:
        rows: the batch rows that have steps, the longest first, [R] int64.
        batch_sizes: rows of each step, [T'] int64; T' is the largest length.
        steps: the step of each packed row, [N] int64.
        batch_rows: the batch row of each packed row, [N] int64.
    """

    rows: Tensor
    batch_sizes: Tensor
    steps: Tensor
    batch_rows: Tensor

    def to(self, device: torch.device) -> Packing:
        """Return the index tensors on `device`; batch_sizes stay on the CPU."""
        return Packing(self.rows.to(device), self.batch_sizes, self.steps.to(device), self.batch_rows.to(device))

    def pack(self, x: Tensor) -> Tensor:
        """Return the packed rows [N, *] of x [T, B, *]."""
        T, B = x.shape[:2]
        if x.is_contiguous():
            return x.flatten(0, 1).index_select(0, self.steps * B + self.batch_rows)
        # A batch-first tensor is contiguous with time and batch swapped.
        return x.transpose(0, 1).flatten(0, 1).index_select(0, self.batch_rows * T + self.steps)

    def pad(self, data: Tensor, T: int, B: int) -> Tensor:
        """Return packed rows [N, *] as [T, B, *], with zeros beyond each length."""
        padded = data.new_zeros(T * B, *data.shape[1:])
        return padded.index_copy(0, self.steps * B + self.batch_rows, data).view(T, B, *data.shape[1:])


def pack_lengths(lengths: Tensor, T: int) -> Packing:
    """Return the packing of a batch of T steps with these lengths, [B] int64 on the CPU."""
    order = lengths.argsort(descending=True, stable=True)
    steps = torch.arange(T).unsqueeze(1)
    used = steps < lengths.index_select(0, order)  # [T, B]
    batch_sizes = used.sum(1)
    R, longest = int(lengths.count_nonzero()), int(batch_sizes.count_nonzero())
    return Packing(
        order[:R],
        batch_sizes[:longest],
        steps.expand_as(used).masked_select(used),
        order.expand_as(used).masked_select(used),
    )
