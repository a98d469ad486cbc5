"""Embeddings with a bias."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.nn.arguments import as_size
from llm_ext.nn.scripting import refuse_script
from llm_ext.ops.argument_checks import ArgumentError

__all__ = ["AffineEmbedding"]


class AffineEmbedding(nn.Module):
    """Look up ``W[id] + b``: an affine map of one-hot vectors.

    Args:
        num_embeddings: V, number of ids.
        embedding_dim: E, size of each embedding.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: W, ``[V, E]``.
        bias: b, ``[E]``.

    Example:
        >>> embedding = llm_ext.nn.AffineEmbedding(1000, 64)
        >>> embedding(torch.randint(1000, (20, 8))).shape
        torch.Size([20, 8, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings = as_size("AffineEmbedding", "num_embeddings", num_embeddings, 0)
        self.embedding_dim = embedding_dim = as_size("AffineEmbedding", "embedding_dim", embedding_dim, 0)
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W from N(0, 1), as torch.nn.Embedding does, and set b to zero."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def fold(self) -> Tensor:
        """Return W + b, ``[V, E]``: the embedding of every id."""
        return self.weight + self.bias

    def _look_up(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def forward(self, ids: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the embeddings ``[*, E]`` of ids ``[*]``.

        Args:
            ids: int64 or int32 ids.
            table: The result of :meth:`fold`, for several calls with the same weights; ``None``: it is computed here.

        Raises:
            IndexError: An id is not from 0 to V - 1. Other devices than the CPU report this as torch does.
            ValueError: ids are on another device than the weights.
        """
        # torch returns uninitialized memory for ids on the meta device.
        if ids.device != self.bias.device:
            raise ArgumentError(
                f"AffineEmbedding: ids must be on {self.bias.device} like the weights, got {ids.device}"
            )
        try:
            return self._look_up(ids) + self.bias if table is None else F.embedding(ids, table)
        except IndexError:
            expected, got = f"0 to {self.num_embeddings - 1}", f"{ids.min().item()} to {ids.max().item()}"
            raise IndexError(f"AffineEmbedding: ids must be from {expected}, got values from {got}") from None
