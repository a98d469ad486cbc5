"""Beam search over targets of several sources at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MOST_LENGTH_PENALTY", "BeamHypothesis", "BeamSearch", "length_limits"]

# With it, the power of a length of ten million is finite in float32.
MOST_LENGTH_PENALTY = 5


class BeamHypothesis(NamedTuple):
    """A target found by beam search.

    Attributes:
        ids: Token ids, ``[T]`` int64, without the end id.
        score: Log-probability divided by length to the power of the length penalty.
    """

    ids: Tensor
    score: float


class BeamSearch:
    """The state of a beam search: K open targets for each of B sources, and the K best finished ones.

    Args:
        B: Number of sources.
        K: Width of the beam.
        end: The id that begins and ends every target.
        limits: Largest number of ids of a target of each source, ``[B]`` int64.
        length_penalty: Power of the length by which the log-probability of a target is divided.
        no_repeat_ngram_size: No n-gram of this many ids occurs twice in a target; 0 allows all.
        device: Device of the scores.
    """

    def __init__(
        self,
        B: int,
        K: int,
        end: int,
        limits: Tensor,
        length_penalty: float,
        no_repeat_ngram_size: int,
        device: torch.device,
    ) -> None:
        self.end = end
        self.limits = limits
        self.length_penalty = length_penalty
        self.no_repeat_ngram_size = no_repeat_ngram_size
        self.length = 0
        longest = int(limits.max()) if B else 0
        # All K targets begin equal, so that only the first one is open.
        self.log_probabilities = torch.full((B, K), -math.inf, device=device)
        self.log_probabilities[:, 0] = 0
        self.paths = torch.full((B, K, longest), end, device=device)
        self.finished_scores = torch.full((B, K), -math.inf, device=device)
        self.finished_paths = self.paths.clone()
        self.closed = limits <= 0

    @property
    def done(self) -> bool:
        """Whether the search of every source has ended."""
        return bool(self.closed.all())

    @property
    def ids(self) -> Tensor:
        """The last id of each open target, ``[B, K]``."""
        if self.length == 0:
            return torch.full(self.log_probabilities.shape, self.end, device=self.log_probabilities.device)
        return self.paths[:, :, self.length - 1]

    def advance(self, scores: Tensor) -> Tensor:
        """Extend the open targets by one id.

        Args:
            scores: Next-token scores of the open targets, ``[B, K, V]``.

        Returns:
            For each open target after the step, the row of the one that it extends, ``[B K]`` int64.
        """
        B, K, V = scores.shape
        if self.log_probabilities.dtype != scores.dtype:
            dtype = torch.promote_types(self.log_probabilities.dtype, scores.dtype)
            self.log_probabilities = self.log_probabilities.to(dtype)
        dtype = self.log_probabilities.dtype
        totals = self.log_probabilities.unsqueeze(-1) + F.log_softmax(scores, -1, dtype=dtype)
        if 0 < self.no_repeat_ngram_size <= self.length:
            self._forbid_repeats(totals)
        # At most K of the 2 K best candidates end, one for each open target: K others remain to continue with.
        best, indices = totals.flatten(1).topk(min(2 * K, K * V))
        origins, tokens = indices // V, indices % V
        self.length += 1
        paths = self.paths.gather(1, origins.unsqueeze(-1).expand(-1, -1, self.paths.shape[-1]))
        paths[:, :, self.length - 1] = tokens

        ends = tokens == self.end
        divisor = self.length**self.length_penalty
        # A target at its limit is finished without an end id.
        at_limit = (self.limits <= self.length).unsqueeze(-1)
        finishes = (ends | at_limit)[:, :K] & ~self.closed.unsqueeze(-1)
        candidates = (best[:, :K] / divisor).masked_fill(~finishes, -math.inf)
        self.finished_scores, chosen = torch.cat((self.finished_scores.to(best.dtype), candidates), 1).topk(K)
        everything = torch.cat((self.finished_paths, paths[:, :K]), 1)
        self.finished_paths = everything.gather(1, chosen.unsqueeze(-1).expand(-1, -1, everything.shape[-1]))

        # The first K candidates without an end id stay open, in their order.
        order = (ends.to(torch.int64) * 2 * K + torch.arange(ends.shape[1], device=ends.device)).argsort(-1)[:, :K]
        self.log_probabilities = best.gather(1, order).masked_fill(ends.gather(1, order), -math.inf)
        self.paths = paths.gather(1, order.unsqueeze(-1).expand(-1, -1, paths.shape[-1]))
        worst_finished = self.finished_scores[:, -1]
        overtaken = worst_finished >= self.log_probabilities[:, 0] / divisor
        self.closed = self.closed | at_limit.squeeze(-1) | (overtaken & (worst_finished > -math.inf))
        first_rows = torch.arange(B, device=indices.device).unsqueeze(-1) * K
        return (first_rows + origins.gather(1, order)).flatten()

    def _forbid_repeats(self, totals: Tensor) -> None:
        """Set the log-probabilities ``[B, K, V]`` of ids that would repeat an n-gram to -inf."""
        n = self.no_repeat_ngram_size
        paths = self.paths[:, :, : self.length]
        grams = paths.unfold(-1, n, 1)  # [B, K, length - n + 1, n]
        last = paths[:, :, self.length - n + 1 :].unsqueeze(2)
        repeats = (grams[..., :-1] == last).all(-1)
        forbidden = torch.zeros_like(repeats, dtype=totals.dtype).masked_fill(repeats, -math.inf)
        totals.scatter_add_(-1, grams[..., -1], forbidden)

    def best(self, count: int) -> list[list[BeamHypothesis]]:
        """Return the `count` best finished targets of each source, best first; fewer where there are no more."""
        found = []
        for scores, paths in zip(self.finished_scores.tolist(), self.finished_paths.cpu(), strict=True):
            hypotheses = []
            for score, path in zip(scores[:count], paths, strict=False):
                if score > -math.inf:
                    # A copy: a view would keep all paths, and could not take part in training after inference mode.
                    hypotheses.append(BeamHypothesis(path[: int((path != self.end).sum())].clone(), score))
            found.append(hypotheses)
        return found


def length_limits(source: Tensor, lengths: Tensor | None, max_length: int | None) -> Tensor:
    """Return the largest number of ids of a target of each source, ``[B]`` int64.

    Args:
        source: Token ids, ``[B, S]``.
        lengths: Tokens of each source, ``[B]`` int64. None: all have S.
        max_length: The limit of all sources. None: 10 more than twice the tokens of each source.
    """
    if max_length is not None:
        return torch.full((len(source),), max_length, device=source.device)
    if lengths is None:
        lengths = torch.full((len(source),), source.shape[1], device=source.device)
    return 2 * lengths + 10
