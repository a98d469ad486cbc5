"""Sampling of token ids from scores, with temperature, top-k and top-p."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MOST_TEMPERATURE", "check_sampling", "sample"]

# Its products with noise are finite in float32.
MOST_TEMPERATURE = 1e30


def check_sampling(op: str, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, in the name of `op`, for an option of `sample` out of range."""
    if not 0 <= temperature <= MOST_TEMPERATURE:
        raise ValueError(f"{op}: temperature must be at least 0 and at most {MOST_TEMPERATURE:g}, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be above 0 and at most 1, got {top_p}")


def sample(
    scores: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token id per row from ``softmax(scores / temperature)``.

    Args:
        scores: Next-token scores, ``[B, V]``.
        temperature: Divides the scores; 0 returns the id of the largest score.
        top_k: Draw among the k largest scores only. None: all.
        top_p: Draw among the fewest largest scores whose probabilities sum to at least p. With `top_k`, these are the
            probabilities among the k largest. None: all.
        generator: Source of randomness; None for torch's default generator.

    Returns:
        Ids, ``[B]`` int64.

    Raises:
        ValueError: A number is out of range.

    Source: top-p sampling: Holtzman et al., arXiv 1904.09751.

    Example:
        >>> scores = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 0.5]])
        >>> llm_ext.models.sample(scores, temperature=0)
        tensor([1, 0])
        >>> llm_ext.models.sample(scores, temperature=0.8, top_k=2).shape
        torch.Size([2])
    """
    check_sampling("sample", temperature, top_k, top_p)
    if temperature == 0:
        return scores.argmax(-1)
    if scores.dtype.itemsize == 2:
        scores = scores.float()  # in 16 bits, many scores with added noise would be equal
    ids = None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, ids = scores.topk(top_k)
    elif top_p is not None and top_p < 1:
        scores, ids = scores.sort(-1, descending=True)
    if top_p is not None and top_p < 1:
        probabilities = torch.softmax(scores / temperature, -1)  # in descending order
        # A token stays if the sum of the larger probabilities is below p; the first one always stays.
        scores = scores.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -math.inf)
    # With q_i from Exp(1), argmax_i softmax(s)_i / q_i is distributed as softmax(s); torch.multinomial draws like this.
    # The argmax of the logarithm, s_i - log q_i, needs no softmax.
    noise = torch.empty_like(scores).exponential_(generator=generator).log_()
    drawn = torch.sub(scores, noise, alpha=temperature).argmax(-1)
    return drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
