"""Copying from a source: the mixture of a pointer-generator network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_ext.ops import argument_checks

__all__ = ["first_positions", "pointer_generator"]


def first_positions(ids: Tensor) -> Tensor:
    """Return for each id of a row the first position of the row with the same id.

    Args:
        ids: ``[*, S]`` int64 or int32.

    Returns:
        ``[*, S]`` int64.

    Example:
        >>> first_positions(torch.tensor([[7, 4, 7, 7, 4, 2]]))
        tensor([[0, 1, 0, 0, 1, 5]])
    """
    ordered, order = ids.sort(stable=True, dim=-1)
    begins = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
    index = torch.arange(ids.shape[-1], device=ids.device)
    # Equal ids are in the order of their positions: the first of a run has the first position.
    run = torch.where(begins, index, 0).cummax(-1).values
    return torch.empty_like(order).scatter(-1, order, order.gather(-1, run))


def pointer_generator(scores: Tensor, gate: Tensor, weights: Tensor, ids: Tensor, first: Tensor) -> Tensor:
    """Return scores whose softmax is a mixture of generating a token and copying one from a source.

    ``softmax(out) = p softmax(scores) + (1 - p) c`` with ``p = σ(gate)`` and ``c_v = sum_s weights_s [ids_s = v]``.
    Only S of the V scores differ from those without copying, up to a constant.

    Args:
        scores: ``[*, V]``.
        gate: ``[*]``.
        weights: Attention weights of the source, ``[*, S]``; they sum to 1, or are 0 for an empty source.
        ids: Token ids of the source, ``[*, S]`` int64, from 0 to V - 1.
        first: The result of :func:`first_positions`, ``[*, S]``.

    Returns:
        ``[*, V]``.

    Source: See et al., "Get to the point: summarization with pointer-generator networks", arXiv 1704.04368.

    Example:
        >>> scores, gate, weights = torch.randn(8, 100), torch.randn(8), torch.randn(8, 20).softmax(-1)
        >>> ids = torch.randint(100, (8, 20))
        >>> pointer_generator(scores, gate, weights, ids, first_positions(ids)).shape
        torch.Size([8, 100])
    """
    compute = argument_checks.compute_dtype(scores.dtype)
    generated = F.log_softmax(scores, -1, dtype=compute)
    # The first position of a token gets the weights of all of them.
    copied = torch.zeros_like(weights, dtype=compute).scatter_add(-1, first, weights.to(compute))
    # out = log(exp(generated) + copied (1 - p) / p), which has the softmax of the mixture without its factor p.
    raised = copied.clamp_min(torch.finfo(compute).tiny).log() - gate.to(compute).unsqueeze(-1)
    change = -F.logsigmoid(generated.gather(-1, ids) - raised)
    return generated.scatter_add(-1, ids, change.masked_fill(copied == 0, 0)).to(scores.dtype)
