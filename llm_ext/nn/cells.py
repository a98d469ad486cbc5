"""Recurrent cells: drop-ins for `torch.nn.RNNCell`, `GRUCell` and `LSTMCell`."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from llm_ext.nn._recurrent_base import Device, RecurrentBase, hidden_of
from llm_ext.nn.arguments import as_flag, as_size
from llm_ext.ops import argument_checks
from llm_ext.ops._registration import is_autocast_on
from llm_ext.ops.argument_checks import ArgumentError
from llm_ext.ops.recurrence import run_step

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

# The state that a user sees: h, or (h, c) of an LSTM.
Hidden = TypeVar("Hidden", Tensor, tuple[Tensor, Tensor])


class _Cell(RecurrentBase, nn.RNNCellBase, Generic[Hidden]):
    """One cell, called for one step."""

    proj_size = 0

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, device: Device, dtype: torch.dtype | None
    ) -> None:
        name = type(self).__name__
        nn.Module.__init__(self)  # that of RNNCellBase would draw the parameters itself
        self.input_size = as_size(name, "input_size", input_size, 0)
        self.hidden_size = as_size(name, "hidden_size", hidden_size, 0)
        self.bias = as_flag(name, "bias", bias)
        self._add_weights("", self.input_size, device, dtype)
        if not self.bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def _weights(self) -> tuple[Any, ...]:
        """Return the weights of the cell: (w_ih, w_hh, b_ih, b_hh).

        They are looked up in every call, because functional_call and parametrizations replace them.
        """
        found = self._parameters
        try:
            return found["weight_ih"], found["weight_hh"], found["bias_ih"], found["bias_hh"]
        except KeyError:  # a parametrization or weight_norm has replaced a parameter by an attribute
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the cell of torch.nn with the same parameters, which torch.jit.script compiles instead."""
        return self._scriptable() if type(self).forward is _Cell.forward else self

    def forward(
        self,
        input: Tensor,
        hx: Hidden | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
    ) -> Hidden:
        """Apply the cell to one step.

        Args:
            input: Input ``[B, I]``, or ``[I]`` without a batch.
            hx: State before the step, ``[B, H]``, or ``[H]`` without a batch; for an LSTM the tuple or list of the
                hidden state and the cell state. ``None`` means zeros.
            reset: Rows whose state is replaced before the step, bool ``[B]``, or ``[]`` without a batch.
            reset_to: State that replaces it, in the form of `hx`, or ``[1, H]`` for all rows. ``None`` means zeros.

        Returns:
            The state after the step, in the layout of `hx`.

        Raises:
            ValueError: A shape, dtype or device does not fit.
            TypeError: An argument has the wrong type.
        """
        batched = input.dim() == 2
        given = None if hx is None else self._state(hx)
        if given is None:  # zeros have the layout of the result, which is then no view: it may be detached in place
            state = self._zeros(input, *input.shape[:-1])
        else:
            state = given
            if state[0].dim() != input.dim() or state[-1].dim() != input.dim():  # the op also takes [1, B, H]
                self._check_arguments(input, state)
        if reset is not None or reset_to is not None:
            state = self._after_reset(input, state, reset, reset_to)
        if not batched:
            state = tuple([tensor.unsqueeze(0) for tensor in state])
        try:
            last = run_step(self.mode, input if batched else input.unsqueeze(0), state, self._weights())
        except (ArgumentError, TypeError):
            self._check_arguments(input, given)
            raise
        if not batched:
            last = tuple([tensor.squeeze(0).clone() for tensor in last])
        return hidden_of(last)  # type: ignore[no-any-return]

    def _after_reset(
        self, input: Tensor, state: tuple[Tensor, ...], reset: Tensor | None, reset_to: Hidden | None
    ) -> tuple[Tensor, ...]:
        """Return the state with the rows replaced that `reset` selects."""
        self._check_arguments(input, state)
        leading = {"B": input.shape[0]} if input.dim() == 2 else {}
        autocast = is_autocast_on(input.device.type)
        dtypes = argument_checks.DTYPES if autocast else (state[0].dtype,)
        letters, sizes = ", ".join(leading), tuple(leading.values())
        reset, to = self._checked_resets(reset, reset_to, letters, sizes, leading, input, dtypes)
        rows = reset.unsqueeze(-1)
        if to is None:
            return tuple([tensor.masked_fill(rows, 0) for tensor in state])
        return tuple([torch.where(rows, new, old) for new, old in zip(to, state, strict=True)])

    def _check_arguments(self, input: Tensor, state: tuple[Tensor, ...] | None) -> None:
        """Raise if a shape does not fit, in the words of the cell's own arguments."""
        name = type(self).__name__
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            argument_checks.fail_shape(name, "input", "B, I", (None, self.input_size), input)
        if state is not None:
            self._check_state(state, input.shape[:-1], ("B",) if input.dim() == 2 else ())


class RNNCell(_Cell[Tensor], nn.RNNCell):
    r"""Apply one step of an Elman RNN; drop-in for :class:`torch.nn.RNNCell`, which it subclasses.

    ``h' = f(W_ih x + b_ih + W_hh h + b_hh)``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: Whether the biases exist.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the last one is not in torch).
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Attributes:
        weight_ih: Input weights ``[H, I]``.
        weight_hh: Recurrent weights ``[H, H]``.
        bias_ih: Input bias ``[H]``.
        bias_hh: Recurrent bias ``[H]``.

    Raises:
        ValueError: A size or the nonlinearity is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> cell = llm_ext.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    _torch_type = nn.RNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        argument_checks.nonlinearity(type(self).__name__, nonlinearity)
        self.nonlinearity = nonlinearity  # first, because the mode follows from it
        super().__init__(input_size, hidden_size, bias, device, dtype)

    @property
    def mode(self) -> str:  # type: ignore[override]  # it follows `nonlinearity`, as in torch.nn
        """The mode of the recurrence."""
        return argument_checks.ELMAN_MODES[self.nonlinearity]


class GRUCell(_Cell[Tensor], nn.GRUCell):
    r"""Apply one step of a GRU; drop-in for :class:`torch.nn.GRUCell`, which it subclasses.

    ``r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)``, ``z`` likewise, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``,
    ``h' = (1 - z) n + z h``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        bias: Whether the biases exist.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Attributes:
        weight_ih: Input weights ``[3 H, I]``, in the order r, z, n.
        weight_hh: Recurrent weights ``[3 H, H]``.
        bias_ih: Input bias ``[3 H]``.
        bias_hh: Recurrent bias ``[3 H]``.

    Raises:
        ValueError: A size is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> cell = llm_ext.GRUCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    mode = "GRU"
    _torch_type = nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)


class LSTMCell(_Cell[tuple[Tensor, Tensor]], nn.LSTMCell):
    r"""Apply one step of an LSTM; drop-in for :class:`torch.nn.LSTMCell`, which it subclasses.

    ``i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)``, ``f`` and ``o`` likewise, ``g`` with tanh, ``c' = f c + i g``,
    ``h' = o tanh(c')``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state and of the cell state.
        bias: Whether the biases exist.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Attributes:
        weight_ih: Input weights ``[4 H, I]``, in the order i, f, g, o.
        weight_hh: Recurrent weights ``[4 H, H]``.
        bias_ih: Input bias ``[4 H]``.
        bias_hh: Recurrent bias ``[4 H]``.

    Raises:
        ValueError: A size is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> cell = llm_ext.LSTMCell(10, 20)
        >>> h, c = torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h, c = cell(x, (h, c))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    mode = "LSTM"
    _torch_type = nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
