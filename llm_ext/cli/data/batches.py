"""Batches of samples and of encoded pairs of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_ext.cli.data.pairs import EncodedPairs, Indices
from llm_ext.cli.data.tokenizer import Ids
from llm_ext.cli.errors import CommandError
from llm_ext.ops.packing import within_lengths

__all__ = ["Batches", "PairBatch", "PairBatches", "make_batch", "make_targets", "order_by_length", "pad_lines"]

# Pairs are sorted by length within this many batches: enough that almost all targets of a batch have the same length,
# and few enough that batches differ from pass to pass.
POOL = 100


class PairBatch(NamedTuple):
    """Pairs of one step, padded with end ids.

    Attributes:
        source: [B, S] int64, each row with its end.
        target: [B, T] int64, each row begins with an end id.
        source_lengths: [B] int64, or None if all sources have S tokens.
        target_lengths: [B] int64, or None if all targets have T tokens.
        keep: Positions that have a token to predict, [B, T] bool.
        expected: The tokens to predict, [N] int64, N = keep.sum().
    """

    source: Tensor
    target: Tensor
    source_lengths: Tensor | None
    target_lengths: Tensor | None
    keep: Tensor
    expected: Tensor


def make_targets(lines: Sequence[Ids], end: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return targets for teacher forcing.

    Args:
        lines: The ids of each line.
        end: The id that begins and ends every target, and fills it.

    Returns:
        The ids to read and the ids to predict, ``[B, T]`` int64; the lengths ``[B]`` int64, or None if all have T; and
        the positions before the padding, ``[B, T]`` bool.
    """
    expected, lengths = pad_lines(lines, end)
    target = torch.cat((expected.new_full((len(expected), 1), end), expected[:, :-1]), 1)
    keep = torch.ones_like(expected, dtype=torch.bool)
    return target, expected, lengths, keep if lengths is None else within_lengths(lengths, expected.shape[1])


def make_batch(pairs: EncodedPairs, indices: Indices, ends: tuple[int, int]) -> PairBatch:
    """Read pairs into a batch.

    Args:
        pairs: All pairs.
        indices: The pairs to read, [B].
        ends: The ids that end a source and a target.
    """
    source, source_lengths = pad_lines([pairs.source(i) for i in indices.tolist()], ends[0])
    target, expected, target_lengths, keep = make_targets([pairs.target(i) for i in indices.tolist()], ends[1])
    return PairBatch(source, target, source_lengths, target_lengths, keep, expected[keep])


def pad_lines(lines: Sequence[Ids | Sequence[int]], end: int) -> tuple[Tensor, Tensor | None]:
    """Put lines side by side.

    Args:
        lines: Ids of B lines.
        end: The id appended to each line and used as padding.

    Returns:
        Ids [B, S] int64, and lengths [B] int64 with the end included, or None if all lines have S ids.
    """
    lengths = torch.tensor([len(line) + 1 for line in lines], dtype=torch.int64)
    ids = torch.full((len(lines), int(lengths.max()) if lines else 0), end)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = torch.from_numpy(np.asarray(line, dtype=np.int64))
    return ids, lengths if bool((lengths < ids.shape[1]).any()) else None


class Batches:
    """Indices of samples of similar length; those of a step are a function of the step alone.

    Each pass shuffles the samples, sorts them by length within pools of `POOL` batches, and shuffles the batches. The
    last batch of a pass is completed with the first samples of its shuffle.

    Args:
        chosen: Indices of the samples to train on.
        size: B, samples per batch of all processes together.
        seed: Seed of the shuffles.
        order: Returns the order that sorts the samples of some indices by length.
        what: Word for the samples in the message.

    Raises:
        CommandError: There are fewer samples than one batch needs.
    """

    def __init__(
        self, chosen: Indices, size: int, seed: int, order: Callable[[Indices], Indices], what: str = "samples"
    ) -> None:
        if len(chosen) < size:
            raise CommandError(
                f"there must be at least one batch of {size} {what} to train on, got {len(chosen)}; "
                f"give more {what}, or a smaller --batch"
            )
        self.chosen, self.size, self.seed, self.order = chosen, size, seed, order
        self.steps_per_pass = -(-len(chosen) // size)
        self._pass, self._order = -1, np.empty((0, size), dtype=np.int64)

    def indices(self, step: int) -> Indices:
        """Return the samples of a step, [B], in the order of `order`."""
        number, index = divmod(step, self.steps_per_pass)
        if number != self._pass:
            generator = np.random.default_rng((self.seed, number))
            order = np.resize(generator.permutation(self.chosen), self.steps_per_pass * self.size)
            for begin in range(0, len(order), POOL * self.size):
                pool = order[begin : begin + POOL * self.size]
                pool[:] = pool[self.order(pool)]
            self._pass, self._order = number, generator.permutation(order.reshape(-1, self.size))
        indices: Indices = self._order[index]
        return indices


class PairBatches(Batches):
    """Batches of pairs of similar length, longest target first.

    Args:
        pairs: All pairs.
        chosen: Indices of the pairs to train on.
        size: B, pairs per batch of all processes together.
        seed: Seed of the shuffles.
        ends: The ids that end a source and a target.

    Raises:
        CommandError: There are fewer pairs than one batch needs.
    """

    def __init__(self, pairs: EncodedPairs, chosen: Indices, size: int, seed: int, ends: tuple[int, int]) -> None:
        super().__init__(chosen, size, seed, lambda indices: order_by_length(pairs, indices), "pairs")
        self.pairs, self.ends = pairs, ends

    def read(self, step: int, mine: slice) -> tuple[PairBatch, int]:
        """Return the rows `mine` of a step, and the number of target tokens of the whole step."""
        indices = self.indices(step)
        tokens = int(self.pairs.target_lengths[indices].sum()) + len(indices)
        return make_batch(self.pairs, indices[mine], self.ends), tokens


def order_by_length(pairs: EncodedPairs, indices: Indices) -> Indices:
    """Return the order that sorts pairs by target length, then by source length, longest first."""
    order: Indices = np.lexsort((pairs.source_lengths[indices], pairs.target_lengths[indices]))[::-1]
    return order
