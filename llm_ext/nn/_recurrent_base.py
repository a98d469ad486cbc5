"""Parameters that recurrent layers and cells have in common."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from llm_ext.nn.scripting import as_type, refuse_script
from llm_ext.nn.torch_ao import WarnsTorchAo
from llm_ext.ops import argument_checks

Device = torch.device | str | int | None


def hidden_of(state: tuple[Tensor, ...]) -> Any:
    """Return a state as a user sees it: h, or (h, c) of an LSTM. `RecurrentBase._state` is the inverse."""
    return state if len(state) > 1 else state[0]


class RecurrentBase(WarnsTorchAo, nn.Module):
    """Parameters of one or more cells, in the names, shapes and order of torch.nn.

    It comes before a class of torch.nn in the bases of a layer or cell. All of the state in an instance is that of the
    class of torch.nn, so that :mod:`llm_ext.conversion` only has to replace the class of a module.
    """

    mode: str
    input_size: int
    hidden_size: int
    bias: bool
    proj_size: int
    # The class of torch.nn with the same parameters and results.
    _torch_type: ClassVar[type[nn.Module]]

    def _add_weights(self, suffix: str, input_size: int, device: Device, dtype: torch.dtype | None) -> list[str]:
        """Create the parameters of one more cell and return their names."""
        gates, outputs = argument_checks.gates_of(self.mode) * self.hidden_size, self.proj_size or self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, input_size), "weight_hh": (gates, outputs)}
        if self.bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        if self.proj_size:
            shapes["weight_hr"] = (outputs, self.hidden_size)
        for name, shape in shapes.items():
            setattr(self, name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        return [name + suffix for name in shapes]

    def _scriptable(self) -> nn.Module:
        """Return the module of torch.nn with the same parameters and results, for torch.jit.script."""
        if self.mode == "RNN_SIGMOID":
            refuse_script(self, "with nonlinearity='sigmoid'")
        return as_type(self, self._torch_type)

    def _state(self, hx: Any, name: str = "hx") -> tuple[Tensor, ...]:
        """Return hx as a tuple of tensors; raise unless it is a Tensor, or for an LSTM a tuple or list of two."""
        if self.mode != "LSTM":
            if isinstance(hx, Tensor):
                return (hx,)
            self._fail_hidden(name, "a Tensor", hx)
        if not isinstance(hx, (tuple, list)):
            self._fail_hidden(name, "a tuple (h, c)", hx)
        if len(hx) != 2:
            got = f"a {type(hx).__name__} of {len(hx)}"
            raise TypeError(f"{type(self).__name__}: {name} must be a tuple (h, c), got {got}")
        h, c = hx
        if not isinstance(h, Tensor) or not isinstance(c, Tensor):
            i = 1 if isinstance(h, Tensor) else 0
            self._fail_hidden(f"{name}[{i}]", "a Tensor", hx[i])
        return h, c

    def _zeros(self, like: Tensor, *leading: int) -> tuple[Tensor, ...]:
        """Return a state of zeros, each tensor [*leading, features]."""
        h = like.new_zeros(*leading, self.proj_size or self.hidden_size)
        return (h, like.new_zeros(*leading, self.hidden_size)) if self.mode == "LSTM" else (h,)

    def _fail_hidden(self, name: str, expected: str, got: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: {name} must be {expected}, got {type(got).__name__}")

    def _check_state(
        self, state: tuple[Tensor, ...], leading: tuple[int | None, ...], letters: tuple[str, ...]
    ) -> None:
        """Raise unless each tensor of a state is [*leading, features]; `letters` name `leading`."""
        labels = ("hx[0]", "hx[1]") if self.mode == "LSTM" else ("hx",)
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        argument_checks.layer_states(type(self).__name__, self.mode, state, leading, letters, (P, H), labels)

    def _checked_resets(
        self,
        reset: Tensor | None,
        reset_to: Any,
        letters: str,
        sizes: tuple[int, ...],
        leading: dict[str, int],
        like: Tensor,
        dtypes: tuple[torch.dtype, ...] = argument_checks.DTYPES,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return reset, and reset_to as a tuple; raise, in the words of the module's own arguments, unless they fit.

        Args:
            reset: The argument of that name.
            reset_to: The argument of that name.
            letters: Names of the sizes of `reset`.
            sizes: These sizes.
            leading: Sizes of `reset_to` before the features, by letter; B may be 1.
            like: The input, on whose device the arguments must be.
            dtypes: Dtypes that `reset_to` may have.
        """
        to = None if reset_to is None else self._state(reset_to, "reset_to")
        name, features = type(self).__name__, (self.proj_size or self.hidden_size, self.hidden_size)
        expected = letters, sizes, tuple(leading.values()), tuple(leading)
        argument_checks.resets(name, self.mode, reset, to, *expected, features, dtypes, ("input", like))
        assert reset is not None
        return reset, to
