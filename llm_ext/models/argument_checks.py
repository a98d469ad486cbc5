"""Checks of arguments that both models share. `model` is the name that begins each message."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_ext.models.recurrent_layers import CELLS

__all__ = ["check_cell", "check_dropout", "check_id_dtype", "check_ids", "check_sizes"]


def check_sizes(model: str, **sizes: int) -> None:
    """Raise ValueError unless every size is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {size}")


def check_dropout(model: str, dropout: float) -> None:
    """Raise ValueError unless `dropout` is a probability."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"{model}: dropout must be a probability from 0 to 1, got {dropout}")


def check_cell(model: str, cell: str) -> None:
    """Raise ValueError unless `cell` is one of `CELLS`."""
    if cell not in CELLS:
        raise ValueError(f"{model}: cell must be one of {', '.join(CELLS)}, got {cell!r}")


def check_ids(model: str, name: str, ids: Tensor, letters: str) -> None:
    """Raise ValueError unless `ids` has the two dimensions named by `letters`; TypeError for a wrong dtype."""
    if ids.dim() != 2:
        raise ValueError(f"{model}: {name} must be [{letters}], got {list(ids.shape)}")
    check_id_dtype(model, name, ids)


def check_id_dtype(model: str, name: str, ids: Tensor) -> None:
    """Raise TypeError unless token ids are of an integer dtype that torch.nn.functional.embedding takes."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{model}: {name} must be int64, got {ids.dtype}".replace("torch.", ""))
