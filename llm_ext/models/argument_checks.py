"""Checks of arguments that the models share. `model` is the name that begins each message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_ext.models.recurrent_layers import CELLS, RecurrentLayer
from llm_ext.ops import argument_checks
from llm_ext.ops._registration import is_autocast_on

__all__ = [
    "check_cell",
    "check_dropout",
    "check_id_dtype",
    "check_ids",
    "check_keep",
    "check_lengths",
    "check_sequence",
    "check_state",
]


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


def check_sequence(model: str, name: str, x: Tensor, feature_dim: int | None, layer: nn.Linear) -> None:
    """Raise unless `x` is ``[B, S]`` of ids, or ``[B, S, F]`` of a floating dtype with F = `feature_dim`.

    The weight of `layer` has the dtype that the message names.
    """
    if feature_dim is None:
        check_ids(model, name, x, "B, S")
        return
    if x.dim() != 3 or x.shape[2] != feature_dim:
        raise ValueError(f"{model}: {name} must be [B, S, F] = [*, *, {feature_dim}], got {list(x.shape)}")
    if not x.is_floating_point():
        expected = layer.weight.dtype  # looked up here: a quantized layer computes its weight
        raise TypeError(f"{model}: {name} must be features of dtype {expected}, got {x.dtype}".replace("torch.", ""))


def check_id_dtype(model: str, name: str, ids: Tensor) -> None:
    """Raise TypeError unless token ids are of an integer dtype that torch.nn.functional.embedding takes."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{model}: {name} must be int64 or int32, got {ids.dtype}".replace("torch.", ""))


def check_lengths(model: str, name: str, lengths: Tensor | None, ids: Tensor, letter: str) -> None:
    """Raise unless `lengths` is None, or a length for each row of `ids`; `letter` names the number of columns.

    Values on a GPU are not read.
    """
    if lengths is not None:
        B, T = ids.shape[:2]
        argument_checks.lengths_of(model, name, lengths, B, letter, T, ("the ids", ids))


def check_keep(model: str, keep: Tensor | None, ids: Tensor) -> None:
    """Raise unless `keep` is None, or a bool for each of `ids` [B, T]."""
    if keep is None:
        return
    if keep.shape != ids.shape:
        raise ValueError(f"{model}: keep must be [B, T] = {list(ids.shape)}, got {list(keep.shape)}")
    if keep.dtype != torch.bool:
        raise TypeError(f"{model}: keep must be bool, got {keep.dtype}".replace("torch.", ""))


def check_state(model: str, layer: RecurrentLayer, hidden: Any, cell: Any, N: int) -> None:
    """Raise unless the fields `hidden` and `cell` of a model's state are a state of `layer` for N rows.

    The dtype is that of the weights, or any under autocast.
    """
    if not isinstance(layer, nn.RNNBase):  # a user has replaced it
        return
    if cell is not None and layer.mode != "LSTM":
        raise TypeError(f"{model}: state.cell must be None, got {type(cell).__name__}")
    state = (hidden, cell) if layer.mode == "LSTM" else (hidden,)
    H, weight = layer.hidden_size, layer.all_weights[0][1]
    leading, letters, names = (layer.num_layers, N), ("L", "N"), ("state.hidden", "state.cell")
    dtypes = argument_checks.DTYPES if is_autocast_on(weight.device.type) else (weight.dtype,)
    like = ("the weights", weight)
    argument_checks.layer_states(model, layer.mode, state, leading, letters, (H, H), names, dtypes, like)
