"""Recurrent layers: drop-ins for `torch.nn.RNN`, `GRU` and `LSTM`."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from llm_ext.nn._recurrent_base import Device, RecurrentBase, hidden_of
from llm_ext.nn.arguments import as_flag, as_size
from llm_ext.ops import argument_checks
from llm_ext.ops.argument_checks import ArgumentError
from llm_ext.ops.recurrence import run, run_all_states

__all__ = ["GRU", "LSTM", "RNN"]

# Whether each direction is reversed.
_ONE_DIRECTION, _BOTH_DIRECTIONS = (False,), (False, True)

# The state that a user sees: h, or (h, c) of an LSTM.
Hidden = TypeVar("Hidden", Tensor, tuple[Tensor, Tensor])


class _Layers(RecurrentBase, nn.RNNBase, Generic[Hidden]):
    """Layers and directions of one mode.

    From `forward` on, a state is a tuple of tensors.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: Device,
        dtype: torch.dtype | None,
        proj_size: int = 0,
    ) -> None:
        name = type(self).__name__
        input_size, hidden_size = as_size(name, "input_size", input_size), as_size(name, "hidden_size", hidden_size)
        num_layers, proj_size = as_size(name, "num_layers", num_layers), as_size(name, "proj_size", proj_size, 0)
        nn.Module.__init__(self)  # that of RNNBase refuses the sigmoid nonlinearity
        if proj_size >= hidden_size:
            raise ValueError(f"{name}: proj_size must be below hidden_size = {hidden_size}, got {proj_size}")
        if not isinstance(dropout, numbers.Real) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"{name}: dropout must be a probability from 0 to 1, got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"{name}: dropout={dropout} acts between layers, and has no effect with num_layers=1", stacklevel=3
            )
        self.mode, self.input_size, self.hidden_size = mode, input_size, hidden_size
        self.num_layers, self.proj_size = num_layers, proj_size
        self.bias = as_flag(name, "bias", bias)
        self.batch_first = as_flag(name, "batch_first", batch_first)
        self.dropout = float(dropout)
        self.bidirectional = as_flag(name, "bidirectional", bidirectional)

        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        # Names of the parameters of each layer and direction: [w_ih, w_hh[, b_ih, b_hh][, w_hr]].
        self._all_weights = []
        for layer in range(num_layers):
            layer_input = (proj_size or hidden_size) * len(suffixes) if layer else input_size
            for suffix in suffixes:
                self._all_weights.append(self._add_weights(f"_l{layer}{suffix}", layer_input, device, dtype))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def _weights(self) -> Sequence[Sequence[Tensor]]:
        """Return the weights of each layer and direction.

        They are looked up in every call, because functional_call and parametrizations replace them.
        """
        found: Any = self._parameters
        names = self._all_weights
        try:
            if len(names) == 1 and len(names[0]) == 4:
                # One direction of one layer is written out: a loop costs a tenth of the time of one step.
                w_ih, w_hh, b_ih, b_hh = names[0]
                return [(found[w_ih], found[w_hh], found[b_ih], found[b_hh])]
            return [[found[name] for name in row] for row in names]
        except KeyError:  # a parametrization or weight_norm has replaced a parameter by an attribute
            return [[getattr(self, name) for name in row] for row in names]

    def _directions(self) -> tuple[bool, ...]:
        return _BOTH_DIRECTIONS if self.bidirectional else _ONE_DIRECTION

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, in the order of the states."""
        rows: Any = self._weights()
        return [list(row) for row in rows]

    def flatten_parameters(self) -> None:
        """Do nothing. torch.nn arranges memory for cuDNN here."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the layer of torch.nn with the same parameters, which torch.jit.script compiles instead."""
        return self._scriptable() if type(self).forward is _Layers.forward else self

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
        return_all_states: Literal[False] = False,
    ) -> tuple[Tensor, Hidden]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Hidden | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
        return_all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, Hidden]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
        return_all_states: Literal[True],
    ) -> tuple[Tensor, Hidden, Hidden]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Hidden | None = None,
        *,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
        return_all_states: Literal[True],
    ) -> tuple[PackedSequence, Hidden, Hidden]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_to: Hidden | None = None,
        return_all_states: bool = False,
    ) -> tuple[Tensor | PackedSequence, Hidden] | tuple[Tensor | PackedSequence, Hidden, Hidden]:
        """Apply the layers to a sequence.

        Args:
            input: Input ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` without a batch, or a PackedSequence.
            hx: States before the first step, ``[R, B, H]`` with R = layers * directions, or ``[R, H]`` without a batch;
                for an LSTM the tuple or list of the hidden states (P in place of H with a projection) and the cell
                states. ``None`` means zeros.
            lengths: Steps of each row of a padded batch, int64 ``[B]`` on the device of `input`, from 0 to T, in any
                order. Beyond them the output is 0, and the states are those after the last step of each row. On CUDA
                they cause no synchronization, except with `return_all_states` or under a transform of torch. A
                PackedSequence has lengths of its own.
            reset: Whether the state of a row is replaced before a step, in every layer: bool ``[T, B]``, ``[B, T]``
                with batch_first, ``[T]`` without a batch, or ``[N]`` in the order of the data of a PackedSequence.
                Beyond `lengths` it has no effect. Its values are read on the host, so a call on CUDA synchronizes. A
                bidirectional layer takes none.
            reset_to: States that replace it, in the form of `hx`, or ``[R, 1, H]`` for all rows. ``None`` means zeros.
            return_all_states: Return the states after every step, too; of an LSTM also every cell state. An LSTM then
                saves its gates as in training.

        Returns:
            The hidden states of the last layer in the layout of `input`, with D P features for D directions, and the
            states after the last step of every layer and direction, in the layout of `hx`. With `return_all_states`
            also the states after every step of every layer and direction, ``[R, T, B, H]``, ``[R, B, T, H]`` with
            batch_first, ``[R, T, H]`` without a batch, or ``[R, N, H]`` in the order of the data of a PackedSequence;
            for an LSTM the tuple of hidden states and cell states. They are before dropout, and 0 beyond `lengths`.

        Raises:
            ValueError: A shape, dtype or device does not fit.
            TypeError: An argument has the wrong type.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, reset_to, return_all_states)
        dim = input.dim()
        batched = dim != 2
        x = input
        given = state = None if hx is None else self._state(hx)
        if state is not None and (state[0].dim() != dim or state[-1].dim() != dim):  # an op also takes [B, H]
            self._check_arguments(input, state)
        to: tuple[Tensor, ...] | None = None
        if reset is not None or reset_to is not None:
            reset, to = self._resets(input, reset, reset_to)
        R = len(self._all_weights)
        # One direction of one layer takes and returns [B, H], which is [R, H]; with every state it takes [R, B, H].
        flat = R == 1 and not return_all_states
        if not batched:
            if lengths is not None:
                raise ArgumentError(f"{type(self).__name__}: lengths belong to a batch, got input {list(input.shape)}")
            x = input.unsqueeze(1)
            state = self._zeros(input, R) if state is None else state
            if not flat:
                state = tuple([tensor.unsqueeze(1) for tensor in state])
        elif self.batch_first:
            x = input.transpose(0, 1)
        try:
            y, last, *every = self._run_layers(x, state, None, lengths, reset, to, return_all_states)
        except (ArgumentError, TypeError):
            self._check_arguments(input, given)
            raise
        if not batched:
            y = y.squeeze(1)
            if not flat:  # not a view, which could not be detached in place
                last = tuple([tensor.squeeze(1).clone() for tensor in last])
            every = [tuple([tensor.squeeze(2) for tensor in states]) for states in every]
        elif self.batch_first:
            y = y.transpose(0, 1)
            every = [tuple([tensor.transpose(1, 2) for tensor in states]) for states in every]
        h_n = hidden_of(last)
        return (y, h_n, hidden_of(every[0])) if return_all_states else (y, h_n)

    def _run_layers(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_to: tuple[Tensor, ...] | None,
        all_states: bool,
    ) -> tuple[Any, ...]:
        """Return the output, the state after the last step and, with `all_states`, those after every step."""
        dropout, weights, directions = self.dropout if self.training else 0.0, self._weights(), self._directions()
        call = (self.mode, x, state, weights, directions, dropout, batch_sizes, lengths, None, reset, reset_to)
        return run_all_states(*call) if all_states else run(*call)

    def _resets(
        self, input: Tensor, reset: Tensor | None, reset_to: Hidden | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return the resets of a padded batch as the op takes them."""
        self._check_arguments(input, None)
        R, sizes = len(self._all_weights), tuple(input.shape[:-1])
        if len(sizes) == 1:
            reset, to = self._checked_resets(reset, reset_to, "T", sizes, {"L": R}, input)
            return reset.unsqueeze(1), None if to is None else tuple([tensor.unsqueeze(1) for tensor in to])
        letters, B = ("B, T", sizes[0]) if self.batch_first else ("T, B", sizes[1])
        reset, to = self._checked_resets(reset, reset_to, letters, sizes, {"L": R, "B": B}, input)
        return reset.T if self.batch_first else reset, to

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: Hidden | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_to: Hidden | None,
        return_all_states: bool,
    ) -> tuple[PackedSequence, Hidden] | tuple[PackedSequence, Hidden, Hidden]:
        """Apply the layers to packed rows; states are in the order of the batch before packing."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        batch, R = int(batch_sizes[0]), len(self._all_weights)
        if lengths is not None:
            raise ArgumentError(f"{type(self).__name__}: lengths belong to a Tensor, got a PackedSequence too")
        given: tuple[Tensor, ...] | None = None
        if hx is None:
            state = self._zeros(data, R, batch)
        else:
            given = state = self._state(hx)
            if sorted_indices is not None or state[0].dim() != 3 or state[-1].dim() != 3:  # an op also takes [B, H]
                self._check_state(state, (R, batch), ("L", "B"))
            if sorted_indices is not None:
                state = tuple([tensor.index_select(1, sorted_indices) for tensor in state])
        to: tuple[Tensor, ...] | None = None
        if reset is not None or reset_to is not None:
            sizes = {"L": R, "B": batch}
            reset, to = self._checked_resets(reset, reset_to, "N", (len(data),), sizes, data)
            if to is not None and sorted_indices is not None:
                to = tuple([tensor.expand(-1, batch, -1).index_select(1, sorted_indices) for tensor in to])
        try:
            y, last, *every = self._run_layers(data, state, batch_sizes, None, reset, to, return_all_states)
        except (ArgumentError, TypeError):
            if given is not None:
                self._check_state(given, (R, batch), ("L", "B"))
            raise
        if unsorted_indices is not None:
            last = tuple([tensor.index_select(1, unsorted_indices) for tensor in last])
        output, h_n = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), hidden_of(last)
        return (output, h_n, hidden_of(every[0])) if return_all_states else (output, h_n)

    def _checked_resets(self, *args: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if self.bidirectional:
            raise ArgumentError(f"{type(self).__name__}: reset needs one direction, got bidirectional=True")
        return super()._checked_resets(*args)

    def _check_arguments(self, input: Tensor, state: tuple[Tensor, ...] | None) -> None:
        """Raise if a shape does not fit, in the words of the layer's own arguments."""
        shape = input.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            letters = "B, T, I" if self.batch_first else "T, B, I"
            argument_checks.fail_shape(type(self).__name__, "input", letters, (None, None, self.input_size), input)
        if state is None:
            return
        R = len(self._all_weights)
        if len(shape) == 2:
            self._check_state(state, (R,), ("L",))
        else:
            self._check_state(state, (R, shape[0 if self.batch_first else 1]), ("L", "B"))


class RNN(_Layers[Tensor]):
    r"""Apply a multilayer Elman RNN; drop-in for :class:`torch.nn.RNN` with the same parameters and results.

    Every layer computes, for each step of its input x,

    ``h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: Number of layers, each applied to the output of the layer below.
        nonlinearity: f: ``"tanh"``, ``"relu"`` or ``"sigmoid"`` (the last one is not in torch).
        bias: Whether the biases b_ih and b_hh exist.
        batch_first: Input and output are ``[B, T, *]`` instead of ``[T, B, *]``. States are not affected.
        dropout: Probability of dropout on the output of every layer but the last, in training.
        bidirectional: A second direction reads the sequence backwards; the outputs of both are concatenated.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Inputs: input, hx, lengths, reset, reset_to, return_all_states
        See :meth:`forward`. Shapes: input ``[T, B, I]``, hx ``[R, B, H]`` with R = layers * directions.

    Outputs: output, h_n
        output ``[T, B, D H]`` with D directions, h_n ``[R, B, H]``.

    Attributes:
        weight_ih_l[k]: Input weights of layer k, ``[H, I]`` for k = 0, else ``[H, D H]``.
        weight_hh_l[k]: Recurrent weights of layer k, ``[H, H]``.
        bias_ih_l[k]: Input bias of layer k, ``[H]``.
        bias_hh_l[k]: Recurrent bias of layer k, ``[H]``.
            The names of the second direction end in ``_reverse``.

    Raises:
        ValueError: A size, probability or nonlinearity is out of range.
        TypeError: An argument has the wrong type.

    Source: J. Elman, "Finding structure in time", 1990.

    Example:
        >>> rnn = llm_ext.RNN(10, 20, num_layers=2)
        >>> input, h0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20)
        >>> output, h_n = rnn(input, h0)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torch_type = nn.RNN
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        argument_checks.nonlinearity(type(self).__name__, nonlinearity)
        mode = argument_checks.ELMAN_MODES[nonlinearity]
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )
        self.nonlinearity = nonlinearity


class GRU(_Layers[Tensor]):
    r"""Apply a multilayer GRU; drop-in for :class:`torch.nn.GRU` with the same parameters and results.

    Every layer computes, for each step of its input x,

    ``r_t = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)``

    ``z_t = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)``

    ``n_t = tanh(W_in x_t + b_in + r_t (W_hn h_{t-1} + b_hn))``

    ``h_t = (1 - z_t) n_t + z_t h_{t-1}``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the hidden state.
        num_layers: Number of layers, each applied to the output of the layer below.
        bias: Whether the biases b_ih and b_hh exist.
        batch_first: Input and output are ``[B, T, *]`` instead of ``[T, B, *]``. States are not affected.
        dropout: Probability of dropout on the output of every layer but the last, in training.
        bidirectional: A second direction reads the sequence backwards; the outputs of both are concatenated.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Inputs: input, hx, lengths, reset, reset_to, return_all_states
        See :meth:`forward`. Shapes: input ``[T, B, I]``, hx ``[R, B, H]`` with R = layers * directions.

    Outputs: output, h_n
        output ``[T, B, D H]`` with D directions, h_n ``[R, B, H]``.

    Attributes:
        weight_ih_l[k]: Input weights of layer k in the order r, z, n, ``[3 H, I]`` for k = 0, else ``[3 H, D H]``.
        weight_hh_l[k]: Recurrent weights of layer k, ``[3 H, H]``.
        bias_ih_l[k]: Input bias of layer k, ``[3 H]``.
        bias_hh_l[k]: Recurrent bias of layer k, ``[3 H]``.
            The names of the second direction end in ``_reverse``.

    Raises:
        ValueError: A size or probability is out of range.
        TypeError: An argument has the wrong type.

    Source: Cho et al., arXiv 1406.1078, with the reset gate applied after the product, as in torch and cuDNN.

    Example:
        >>> gru = llm_ext.GRU(10, 20, num_layers=2)
        >>> input, h0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20)
        >>> output, h_n = gru(input, h0)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torch_type = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )


class LSTM(_Layers[tuple[Tensor, Tensor]]):
    r"""Apply a multilayer LSTM; drop-in for :class:`torch.nn.LSTM` with the same parameters and results.

    Every layer computes, for each step of its input x,

    ``i_t = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)``

    ``f_t = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)``

    ``g_t = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)``

    ``o_t = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)``

    ``c_t = f_t c_{t-1} + i_t g_t``

    ``h_t = o_t tanh(c_t)``, or with a projection ``h_t = W_hr (o_t tanh(c_t))``

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the cell state, and of the hidden state unless it is projected.
        num_layers: Number of layers, each applied to the output of the layer below.
        bias: Whether the biases b_ih and b_hh exist.
        batch_first: Input and output are ``[B, T, *]`` instead of ``[T, B, *]``. States are not affected.
        dropout: Probability of dropout on the output of every layer but the last, in training.
        bidirectional: A second direction reads the sequence backwards; the outputs of both are concatenated.
        proj_size: P, features that the hidden state is projected to, fewer than H. 0 means no projection: P = H.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, bfloat16 or float16.

    Inputs: input, (h_0, c_0), lengths, reset, reset_to, return_all_states
        See :meth:`forward`. Shapes: input ``[T, B, I]``, h_0 ``[R, B, P]`` and c_0 ``[R, B, H]`` with
        R = layers * directions.

    Outputs: output, (h_n, c_n)
        output ``[T, B, D P]`` with D directions, h_n ``[R, B, P]``, c_n ``[R, B, H]``.

    Attributes:
        weight_ih_l[k]: Input weights of layer k in the order i, f, g, o, ``[4 H, I]`` for k = 0, else ``[4 H, D P]``.
        weight_hh_l[k]: Recurrent weights of layer k, ``[4 H, P]``.
        bias_ih_l[k]: Input bias of layer k, ``[4 H]``.
        bias_hh_l[k]: Recurrent bias of layer k, ``[4 H]``.
        weight_hr_l[k]: Projection of layer k, ``[P, H]``, if proj_size > 0.
            The names of the second direction end in ``_reverse``.

    Raises:
        ValueError: A size or probability is out of range.
        TypeError: An argument has the wrong type.

    Source: S. Hochreiter and J. Schmidhuber, "Long short-term memory", 1997; forget gate: F. Gers et al., "Learning to
    forget", 2000; projection: Sak et al., arXiv 1402.1128.

    Example:
        >>> lstm = llm_ext.LSTM(10, 20, num_layers=2)
        >>> input, h0, c0 = torch.randn(5, 3, 10), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
        >>> output, (h_n, c_n) = lstm(input, (h0, c0))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    """

    _torch_type = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            proj_size,
        )

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the sizes ``[R, B, H]`` of the cell states, as torch.nn.LSTM does."""
        return nn.LSTM.get_expected_cell_size(self, input, batch_sizes)  # type: ignore[arg-type]

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise unless input and states have the sizes of this layer, as torch.nn.LSTM does."""
        nn.LSTM.check_forward_args(self, input, hidden, batch_sizes)  # type: ignore[arg-type]

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the states with the rows of the batch in another order, as torch.nn.LSTM does."""
        return nn.LSTM.permute_hidden(self, hx, permutation)  # type: ignore[arg-type]
