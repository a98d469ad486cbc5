"""Padding on any side: attention masks of transformers as rows whose tokens come first, and their lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Padding", "find_padding"]


class Padding(NamedTuple):
    """Where the tokens of padded rows are.

    Attributes:
        used: Whether a position has a token, ``[B, T]`` bool.
        lengths: Tokens of each row, ``[B]`` int64.
        order: Positions of each row, those of tokens first, ``[B, T]`` int64; None if they are already.
        ranks: For each position the number of tokens before the last one up to it, ``[B, T]`` int64; None likewise.
    """

    used: Tensor
    lengths: Tensor
    order: Tensor | None = None
    ranks: Tensor | None = None

    def align(self, x: Tensor) -> Tensor:
        """Return x ``[B, T, *]`` with the tokens of each row first."""
        return x if self.order is None else _select(x, self.order)

    def restore(self, y: Tensor, positions: slice | Tensor) -> Tensor:
        """Return the rows of y, aligned ``[B, T, *]``, that belong to positions ``0 .. T - 1`` of the padded rows."""
        return y[:, positions] if self.ranks is None else _select(y, self.ranks[:, positions])

    def unpredicted(self, labels: Tensor) -> Tensor:
        """Return labels ``[B, T]`` with -100 after each position of padding, which predicts nothing."""
        return torch.cat((labels[:, :1], labels[:, 1:].masked_fill(~self.used[:, :-1], -100)), 1)


def find_padding(mask: Tensor | None, tokens: Tensor) -> Padding | None:
    """Return where the tokens of a batch are, or None if no position is padding.

    Args:
        mask: Nonzero at tokens, ``[B, T']`` with T' at least T; the last T columns belong to `tokens`. None: no
            padding.
        tokens: ``[B, T]`` or ``[B, T, *]``.

    Raises:
        ValueError: The mask has another number of rows, or fewer columns than `tokens`.
    """
    if mask is None:
        return None
    B, T = tokens.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"attention_mask must be [B, T] = [{B}, {T}] or longer, got {list(mask.shape)}")
    used = mask[:, mask.shape[1] - T :] != 0
    if used.all():
        return None
    lengths = used.sum(1)
    if not (used[:, 1:] & ~used[:, :-1]).any():
        return Padding(used, lengths)
    order = used.int().argsort(dim=1, descending=True, stable=True)
    return Padding(used, lengths, order, (used.cumsum(1) - 1).clamp_min(0))


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[b, index[b]]`` for each row b of x ``[B, T, *]``."""
    expanded = index.reshape(index.shape + (1,) * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, expanded)
