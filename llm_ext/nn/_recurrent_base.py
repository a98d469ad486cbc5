"""Parameters that recurrent layers and cells have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_ext.ops import argument_checks

Device = torch.device | str | int | None


class RecurrentBase(nn.Module):
    """Parameters of one or more cells, in the names, shapes and order of torch.nn."""

    mode: str
    input_size: int
    hidden_size: int
    bias: bool
    proj_size: int

    def __init__(self, mode: str, input_size: int, hidden_size: int, bias: bool, proj_size: int = 0) -> None:
        super().__init__()
        self._check_size("input_size", input_size)
        self._check_size("hidden_size", hidden_size)
        self._check_flag("bias", bias)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.proj_size = proj_size
        # Names of the parameters of each layer and direction: (w_ih, w_hh[, b_ih, b_hh][, w_hr]).
        self._weight_names: list[tuple[str, ...]] = []

    def _check_size(self, name: str, size: int, least: int = 1) -> None:
        if not isinstance(size, int):
            raise TypeError(f"{type(self).__name__}: {name} must be an int, got {type(size).__name__}")
        if size < least:
            raise ValueError(f"{type(self).__name__}: {name} must be at least {least}, got {size}")

    def _check_flag(self, name: str, flag: bool) -> None:
        if not isinstance(flag, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be a bool, got {type(flag).__name__}")

    def _add_weights(self, suffix: str, input_size: int, device: Device, dtype: torch.dtype | None) -> None:
        """Create the parameters of one more cell."""
        gates, outputs = argument_checks.gates_of(self.mode) * self.hidden_size, self.proj_size or self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, input_size), "weight_hh": (gates, outputs)}
        if self.bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        if self.proj_size:
            shapes["weight_hr"] = (outputs, self.hidden_size)
        for name, shape in shapes.items():
            setattr(self, name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._weight_names.append(tuple(name + suffix for name in shapes))

    def _weights(self) -> Sequence[Sequence[Tensor]]:
        """Return the weights of each layer and direction.

        They are looked up in every call, because functional_call and parametrizations replace them.
        """
        found: Any = self._parameters
        names = self._weight_names
        try:
            if len(names) == 1 and len(names[0]) == 4:
                # One direction of one layer is written out: a loop costs a tenth of the time of one step.
                w_ih, w_hh, b_ih, b_hh = names[0]
                return [(found[w_ih], found[w_hh], found[b_ih], found[b_hh])]
            return [[found[name] for name in row] for row in names]
        except KeyError:  # a parametrization or weight_norm has replaced a parameter by an attribute
            return [[getattr(self, name) for name in row] for row in names]

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order of torch.nn."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _check_hidden(self, hx: Any, leading: tuple[int | None, ...], letters: tuple[str, ...]) -> None:
        """Raise unless hx is a state of this module, each tensor [*leading, features]; `letters` name `leading`."""
        name = type(self).__name__
        if self.mode == "LSTM" and (not isinstance(hx, tuple) or len(hx) != 2):
            got = f"{len(hx)} tensors" if isinstance(hx, tuple) else type(hx).__name__
            raise TypeError(f"{name}: hx must be a tuple (h, c), got {got}")
        state = hx if self.mode == "LSTM" else (hx,)
        labels = ("hx[0]", "hx[1]") if self.mode == "LSTM" else ("hx",)
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        argument_checks.layer_states(name, self.mode, state, leading, letters, (P, H), labels)
