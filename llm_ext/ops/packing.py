"""Padded batches packed row by row, as a PackedSequence has them: the CPU kernels read batch sizes, not lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm_ext.reference.lengths import within_lengths

__all__ = ["Packing", "Pieces", "pack_lengths", "pack_pieces", "within_lengths"]


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
    steps = torch.arange(T, device=lengths.device).unsqueeze(1)
    used = steps < lengths.index_select(0, order)  # [T, B]
    batch_sizes = used.sum(1)
    R, longest = int(lengths.count_nonzero()), int(batch_sizes.count_nonzero())
    return Packing(
        order[:R],
        batch_sizes[:longest],
        steps.expand_as(used).masked_select(used),
        order.expand_as(used).masked_select(used),
    )


class Pieces(NamedTuple):
    """The pieces of batch rows between resets, as the sequences of one packed sequence.

    Attributes:
        packing: index tensors that pack the steps of all pieces; its `rows` are the batch rows that have steps.
        first: state that each of P pieces starts from, an index in the B given states and the B states of a reset.
        last: the last piece of each of `packing.rows`.
    """

    packing: Packing
    first: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Pieces:
        """Return the index tensors on `device`; batch_sizes stay on the CPU."""
        return Pieces(self.packing.to(device), self.first.to(device), self.last.to(device))


def pack_pieces(reset: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> Pieces | None:
    """Return the pieces between resets, or None if no step has a reset; all tensors are on the CPU.

    Args:
        reset: whether the state of a row is reset before a step, bool [T, B], or [N] with `batch_sizes`.
        lengths: steps of each row of a padded batch, [B] int64, or None.
        batch_sizes: rows of each step of a packed sequence, [T] int64, or None. Its rows are then packed as a padded
            batch of N steps and one row.
    """
    if not reset.any():
        return None
    if batch_sizes is not None:
        used = torch.arange(int(batch_sizes[0]), device="cpu") < batch_sizes[:, None]
        reset = torch.zeros_like(used).masked_scatter(used, reset)
    elif lengths is not None:
        used = within_lengths(lengths, len(reset)).T
        reset = reset & used
        if not reset.any():
            return None
    else:
        used = torch.ones_like(reset)
    # Until the last lines the N steps are those of row 0, then those of row 1, and so on.
    batch_rows, steps = used.T.nonzero(as_tuple=True)
    is_reset = reset.T.masked_select(used.T)
    is_start = is_reset | (steps == 0)
    starts, piece = is_start.nonzero().squeeze(1), is_start.cumsum(0) - 1
    N, B, P = len(steps), used.shape[1], len(starts)
    sizes = starts.diff(append=starts.new_tensor([N]))
    order = sizes.argsort(descending=True, stable=True)
    rank = order.argsort()
    piece_batch_sizes = P - sizes.bincount().cumsum(0)[:-1]  # pieces that are longer than t steps
    every_step = torch.arange(N, device="cpu")
    t = every_step - starts.index_select(0, piece)
    begin = piece_batch_sizes.cumsum(0) - piece_batch_sizes
    packed_row = begin.index_select(0, t) + rank.index_select(0, piece)
    source = torch.empty_like(packed_row).index_copy_(0, packed_row, every_step)

    row_of = batch_rows.index_select(0, starts)
    first = (row_of + B * is_reset.index_select(0, starts)).index_select(0, order)
    is_last = row_of.diff(append=row_of.new_tensor([-1])) != 0
    rows, last = row_of.masked_select(is_last), rank.masked_select(is_last)
    if batch_sizes is not None:
        data_row = used.flatten().cumsum(0) - 1
        steps, batch_rows = data_row.index_select(0, steps * B + batch_rows), torch.zeros_like(batch_rows)
    packing = Packing(rows, piece_batch_sizes, steps.index_select(0, source), batch_rows.index_select(0, source))
    return Pieces(packing, first, last)
