"""Random changes of training samples that keep their label."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_ext.ops.packing import within_lengths

__all__ = ["AUGMENTATIONS", "augment_features", "drop_words"]

# The values of --augment.
AUGMENTATIONS = ("mask", "noise", "shift", "warp", "words")

# Fractions of the steps and of the features that a mask covers at most; masks of each kind.
TIME_MASK, FEATURE_MASK, MASKS = 0.15, 0.2, 2
# Standard deviation of the noise at most, in units of that of the features.
NOISE = 0.4
# Fraction of the features by which a row is shifted at most.
SHIFT = 0.08
# Speed and width of the features change by at most this fraction.
SPEED, WIDTH = 0.2, 0.15
# Probability of dropping a token.
DROP = 0.1


def augment_features(
    x: Tensor, lengths: Tensor, names: frozenset[str], layout: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Change a batch of features at random; each sample of the batch is changed in its own way.

    Args:
        x: Normalized features ``[B, S, F]``, 0 beyond the lengths.
        lengths: ``[B]`` int64.
        names: Some of `AUGMENTATIONS`:

            - "warp": play faster or slower, and widen or narrow the vectors, as the length of a vocal tract does.
            - "shift": move the steps and the vectors a little.
            - "noise": add normal noise.
            - "mask": set some runs of steps and some bands of the vectors to their mean, 0.
        layout: A vector of F numbers as rows × width × channels; the width is what is changed.

    Returns:
        The changed features and lengths.

    Source: "mask" is SpecAugment, arXiv 1904.08779, without its time warping; "warp" is vocal tract length
    perturbation, Jaitly and Hinton, 2013, with a linear map.
    """
    B, S, _ = x.shape
    _, size, channels = layout
    if names & {"warp", "shift"}:
        speed, width = (1 + _uniform(B, most if "warp" in names else 0.0) for most in (SPEED, WIDTH))
        delay, shift = (_uniform(B, SHIFT if "shift" in names else 0.0) for _ in range(2))
        new_lengths = (lengths / speed).round().clamp(min=1).to(torch.int64)
        last = (lengths - 1)[:, None].to(x.dtype)
        steps = torch.arange(int(new_lengths.max())) * speed[:, None] + (delay * lengths)[:, None]
        x = _interpolate(x, torch.minimum(steps.clamp(min=0), last), 1)
        lengths, S = new_lengths, x.shape[1]
        middle = (size - 1) / 2
        at = (torch.arange(size) - middle) / width[:, None] + middle + (shift * size)[:, None]
        x = _interpolate(x.reshape(B, -1, size, channels), at.clamp(0, size - 1), 2).reshape(B, S, -1)
    if "noise" in names:
        x = x + torch.rand(B, 1, 1) * NOISE * torch.randn_like(x)
    kept = within_lengths(lengths, S)
    if "mask" in names:
        for _ in range(MASKS):
            kept = kept & ~_runs(lengths, S, TIME_MASK)
            bands = _runs(torch.full((B,), size), size, FEATURE_MASK)[:, None, :, None]
            x = x.reshape(B, -1, size, channels).masked_fill(bands, 0).reshape(B, S, -1)
    return x.masked_fill(~kept[..., None], 0), lengths


def drop_words(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out tokens at random, but never all of a row.

    Args:
        ids: ``[B, S]`` int64, 0 beyond the lengths.
        lengths: ``[B]`` int64.
    """
    kept = torch.rand(ids.shape) >= DROP
    kept &= within_lengths(lengths, ids.shape[1])
    kept[:, 0] |= ~kept.any(1)
    rows = [row[mask] for row, mask in zip(ids, kept, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), kept.sum(1)


def _uniform(count: int, most: float) -> Tensor:
    return (2 * torch.rand(count) - 1) * most


def _interpolate(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """Return `x` at the fractional indices ``[B, N]`` along a dimension."""
    low = at.floor()
    view = [1] * x.dim()
    view[0], view[dim] = at.shape
    shape = [*x.shape]
    shape[dim] = at.shape[1]
    index = low.to(torch.int64)
    following = (index + 1).clamp(max=x.shape[dim] - 1)
    first, second = (x.gather(dim, each.view(view).expand(shape)) for each in (index, following))
    return torch.lerp(first, second, (at - low).view(view))


def _runs(lengths: Tensor, size: int, fraction: float) -> Tensor:
    """Return one random run of each row, ``[B, size]`` bool, that covers at most a fraction of its length."""
    run = torch.rand(len(lengths)) * fraction * lengths
    begin = torch.rand(len(lengths)) * (lengths - run)
    index = torch.arange(size)
    return (index >= begin.round()[:, None]) & (index < (begin + run).round()[:, None])
