"""Parameters that recurrent layers and cells have in common."""

from __future__ import annotations

import math
from typing import Any, cast

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

    def _weights(self) -> list[tuple[Tensor, ...]]:
        """Return the weights of each layer and direction.

        They are looked up in every call, because functional_call and parametrizations replace them.
        """
        found = self._parameters
        try:
            # The usual case is written out: a loop costs a microsecond, a tenth of the time of one step.
            if self.bias and not self.proj_size:
                return [
                    (found[w_ih], found[w_hh], found[b_ih], found[b_hh])  # type: ignore[misc]
                    for w_ih, w_hh, b_ih, b_hh in self._weight_names
                ]
            return [tuple([found[name] for name in names]) for names in self._weight_names]  # type: ignore[misc]
        except KeyError:  # a parametrization or weight_norm has replaced a parameter by an attribute
            return [tuple([getattr(self, name) for name in names]) for names in self._weight_names]

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/√H, 1/√H), in the order of torch.nn."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _to_state(self, hx: Any) -> tuple[Tensor, ...] | None:
        """Return the state that a user gave as a tuple of tensors."""
        if self.mode != "LSTM":
            return None if hx is None else (hx,)
        if isinstance(hx, list):  # torch.nn takes one as well
            return tuple(hx)
        if not isinstance(hx, tuple) and hx is not None:
            self._check_hidden(hx, (), ())
        return cast("tuple[Tensor, ...] | None", hx)

    def _check_hidden(self, hx: Any, leading: tuple[int | None, ...], letters: tuple[str, ...]) -> None:
        """Raise unless hx is a state of this module, each tensor [*leading, features]; `letters` name `leading`."""
        name = type(self).__name__
        if self.mode == "LSTM":
            if not isinstance(hx, tuple) or len(hx) != 2:
                got = f"{len(hx)} tensors" if isinstance(hx, tuple) else type(hx).__name__
                raise TypeError(f"{name}: hx must be a tuple (h, c), got {got}")
            state, labels = hx, ("hx[0]", "hx[1]")
        else:
            state, labels = (hx,), ("hx",)
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        argument_checks.layer_states(name, self.mode, state, leading, letters, (P, H), labels)
