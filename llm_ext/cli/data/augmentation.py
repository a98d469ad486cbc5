"""Random changes of training samples that keep their label."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_ext.ops.packing import within_lengths

__all__ = ["AUGMENTATIONS", "augment_features", "augmentations_of", "drop_words", "mix_samples"]

# The values of --augment.
AUGMENTATIONS = ("mask", "noise", "shift", "warp", "background", "channel", "mix", "words")
_AUDIO = {"background", "channel"}
_TEXT = {"words"}

# Fractions of the steps and of the features that a mask covers at most; masks of each kind.
TIME_MASK, FEATURE_MASK, MASKS = 0.15, 0.2, 2
# Standard deviation of the noise at most, in units of that of the features.
NOISE = 0.4
# Fraction of the features by which a row is shifted at most.
SHIFT = 0.08
# Speed and width of the features change by at most this fraction.
SPEED, WIDTH = 0.2, 0.25
# Background noise: decibels below the loudest tenth of a sample, at least and at most; nats by which its spectrum rises
# or falls at most, from the middle to an end.
BACKGROUND, TILT = (15.0, 60.0), 2.0
# Standard deviation of each cosine of a channel's gain, in nats of power, and their number.
GAIN, COSINES = 0.5, 5
# Probability of dropping a token.
DROP = 0.1


def augmentations_of(kind: str) -> frozenset[str]:
    """Return the augmentations that samples of a kind can have."""
    if kind == "text":
        return frozenset(_TEXT)
    return frozenset(AUGMENTATIONS) - _TEXT - (frozenset() if kind == "audio" else _AUDIO)


def augment_features(
    x: Tensor,
    lengths: Tensor,
    names: frozenset[str],
    layout: tuple[int, int, int],
    normalization: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Change a batch of features at random; each sample of the batch is changed in its own way.

    Args:
        x: Normalized features ``[B, S, F]``, 0 beyond the lengths.
        lengths: ``[B]`` int64.
        names: Some of `AUGMENTATIONS`:

            - "warp": play faster or slower, and widen or narrow the vectors, as the length of a vocal tract does.
            - "shift": move the steps and the vectors a little.
            - "background": add noise of a random level and spectrum to the power of a log-mel spectrogram.
            - "channel": multiply its power by a random smooth gain, as another microphone or room does.
            - "noise": add normal noise.
            - "mask": set some runs of steps and some bands of the vectors to their mean, 0.

            Others are ignored.
        layout: A vector of F numbers as rows × width × channels; the width is what is changed.
        normalization: Mean and standard deviation of the features before their normalization, both ``[F]``; needed for
            "background" and "channel".

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
    kept = within_lengths(lengths, S)
    if names & _AUDIO:
        assert normalization is not None
        mean, std = normalization
        power = (x * std + mean).reshape(B, -1, size)
        if "background" in names:
            power = _add_background(power, kept)
        if "channel" in names:
            band = torch.linspace(0, math.pi, size)
            power = power + GAIN * sum(torch.randn(B, 1, 1) * torch.cos(n * band) for n in range(COSINES))
        x = (power.reshape(x.shape) - mean) / std
    if "noise" in names:
        x = x + torch.rand(B, 1, 1) * NOISE * torch.randn_like(x)
    if "mask" in names:
        for _ in range(MASKS):
            kept = kept & ~_runs(lengths, S, TIME_MASK)
            bands = _runs(torch.full((B,), size), size, FEATURE_MASK)[:, None, :, None]
            x = x.reshape(B, -1, size, channels).masked_fill(bands, 0).reshape(B, S, -1)
    return x.masked_fill(~kept[..., None], 0), lengths


def mix_samples(x: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each sample of a batch by a weighted mean with another one, and its target likewise.

    Args:
        x: Normalized features ``[B, S, F]``, 0 beyond the lengths.
        lengths: ``[B]`` int64.
        targets: Probability of each class, ``[B, C]``.

    Source: Zhang et al., "mixup: Beyond empirical risk minimization", arXiv 1710.09412, with uniform weights.
    """
    weight, partner = torch.rand(len(x)), torch.randperm(len(x))
    mixed = torch.lerp(x, x[partner], weight[:, None, None])
    return mixed, torch.maximum(lengths, lengths[partner]), torch.lerp(targets, targets[partner], weight[:, None])


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


def _add_background(power: Tensor, kept: Tensor) -> Tensor:
    """Add noise to logarithms of the power, ``[B, N, size]`` with N a multiple of the steps; `kept` is ``[B, S]``."""
    B, S = kept.shape
    each_step = power.reshape(B, S, -1)
    # Not torch.quantile, which takes at most 16 million numbers.
    loudest_first = each_step.masked_fill(~kept[..., None], -math.inf).flatten(1).sort(1, descending=True)[0]
    loud = loudest_first.gather(1, (kept.sum(1) * each_step.shape[2] // 10)[:, None])[:, 0]
    least, most = BACKGROUND
    level = loud - (least + (most - least) * torch.rand(B)) * (math.log(10) / 10)
    tilt = _uniform(B, TILT)[:, None, None] * torch.linspace(-1, 1, power.shape[-1])
    # The power of noise in a band varies from step to step.
    return torch.logaddexp(power, level[:, None, None] + tilt + 0.6 * torch.randn_like(power))


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
