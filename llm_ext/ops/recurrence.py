"""The only door to torch.ops.llm_ext: the public functions, and below each op its fake kernel and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import llm_ext._C  # importing it registers the ops
from llm_ext import checks

_ops = torch.ops.llm_ext
_rnn_forward = _ops.rnn_forward.default
_rnn_backward = _ops.rnn_backward.default
_gru_forward = _ops.gru_forward.default
_gru_backward = _ops.gru_backward.default
_lstm_forward = _ops.lstm_forward.default
_lstm_backward = _ops.lstm_backward.default
_bidirectional_forward = _ops.bidirectional_forward.default
_bidirectional_backward = _ops.bidirectional_backward.default
_stack_forward = _ops.stack_forward.default
_attention_step = _ops.attention_step.default
_linear_forward = _ops.linear_forward.default
_linear_argmax = _ops.linear_argmax.default
_linear_backward = _ops.linear_backward.default
_attention_pool_forward = _ops.attention_pool_forward.default
_attention_pool_backward = _ops.attention_pool_backward.default
_prefix_pool_forward = _ops.prefix_pool_forward.default
_prefix_pool_backward = _ops.prefix_pool_backward.default
_additive_attention_forward = _ops.additive_attention_forward.default
_additive_attention_backward = _ops.additive_attention_backward.default


# What an op raises when it refuses its arguments, and what comes of one that is no tensor.
_FAILURES = (RuntimeError, TypeError, AttributeError)


def _explain(failure: Exception, check: Callable[..., None], *args: Any) -> NoReturn:
    """Raise what `check` has to say about the arguments an op refused, or the op's own error if it finds no fault.

    The ops refuse whatever they cannot run, so a call that succeeds need not pay for the better messages.
    """
    try:
        check(*args)
    except Exception as explanation:
        raise explanation from None
    if isinstance(failure, NotImplementedError):
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        built = "without CUDA" if llm_ext._C.build_info()["cuda"] is None else "with CUDA"
        raise NotImplementedError(f"llm_ext: no kernel of this op for {device}; built {built}") from None
    if "out of memory" in str(failure):
        raise torch.OutOfMemoryError(str(failure)) from None
    raise failure


def _not_differentiable(op: str, why: str = "second derivatives are not implemented") -> None:
    """Make differentiating through an op an error instead of a silently missing gradient."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"llm_ext: {op} has no derivative; {why}")

    torch.library.register_autograd(f"llm_ext::{op}", backward, setup_context=setup_context)


_CAST = (torch.float32, torch.bfloat16, torch.float16)
_autocast = torch.library.Library("llm_ext", "IMPL")  # type: ignore[no-untyped-call]


def _register_autocast(op: Any, states: tuple[int, ...] = ()) -> None:
    """Under autocast run `op` in autocast's dtype, as torch does: float64 stays what it is.

    `states` are the places of arguments that add up over a sequence: these become float32.
    """

    def cast_on(device: str) -> Callable[..., Any]:
        def cast(*args: Any) -> Any:
            lower = torch.get_autocast_dtype(device)

            def cast_one(arg: Any, target: torch.dtype) -> Any:
                if isinstance(arg, list):
                    return [cast_one(a, target) for a in arg]
                return arg.to(target) if isinstance(arg, Tensor) and arg.dtype in _CAST else arg

            with torch.autocast(device, enabled=False):
                return op(*(cast_one(arg, torch.float32 if i in states else lower) for i, arg in enumerate(args)))

        return cast

    name = op.name().removeprefix("llm_ext::")
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _autocast.impl(name, cast_on(device), key)  # type: ignore[no-untyped-call]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _matmul_tf32() -> bool:
    """Whether torch may round the factors of float32 products on CUDA to TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _on_cuda(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def _tf32(x: Tensor) -> bool:
    """Whether the products of a recurrence over x may use TF32: as torch's own."""
    return x.is_cuda and x.dtype == torch.float32 and _matmul_tf32()


def _before_autocast(like: Tensor, *tensors: Tensor | None) -> Any:
    """Tensors in the dtype of `like`, as they must be, where autocast is about to cast them all anyway.

    Layers under it hand each other what others have rounded; on the way to an op its dispatch takes care of that.
    """
    if not torch.is_autocast_enabled("cpu") or not isinstance(like, Tensor) or like.dtype not in _CAST:
        return tensors
    return tuple(t.to(like.dtype) if isinstance(t, Tensor) and t.dtype in _CAST else t for t in tensors)


class Packing(NamedTuple):
    """How a padded batch [T, B, *] is packed.

    rows: the batch rows that have steps, the longest first, [R] int64.
    batch_sizes: rows of each step, [T'] int64, T' the most steps of any row.
    steps: the step of each packed row, [N] int64.
    rows_of: and its batch row, [N] int64.
    """

    rows: Tensor
    batch_sizes: Tensor
    steps: Tensor
    rows_of: Tensor


def packing(lengths: Tensor, T: int) -> Packing:
    """Return how a batch of T steps and of these lengths, [B] int64 on the CPU, is packed: as PackedSequence is."""
    order = lengths.argsort(descending=True, stable=True)
    steps = torch.arange(T).unsqueeze(1)
    taken = steps < lengths.index_select(0, order)  # [T, B]
    batch_sizes = taken.sum(1)
    R, used = int(lengths.count_nonzero()), int(batch_sizes.count_nonzero())
    return Packing(
        order[:R],
        batch_sizes[:used],
        steps.expand_as(taken).masked_select(taken),
        order.expand_as(taken).masked_select(taken),
    )


def by_packing(
    x: Tensor,
    state: tuple[Tensor | None, ...],
    features: tuple[int, ...],
    lengths: Tensor,
    run: Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, tuple[Tensor, ...]]],
    directions: tuple[int, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A recurrence over padded rows: packed, run, and padded with zeros again. The CPU's kernels read no lengths.

    Args:
        x: [T, B, I].
        state: before the first step, each part [B, *], [1, B, *] or [directions, B, *], or None for zeros.
        features: of each part of the state.
        lengths: [B].
        run: of packed rows [N, I], the state of the rows that have steps, and batch_sizes: y [N, *] and the last state.
        directions: (2,) if both are run.
    """
    T, B, _ = x.shape
    sizes = [(*directions, B, size) for size in features]
    first = [x.new_zeros(size) if part is None else part for part, size in zip(state, sizes, strict=True)]
    if x.numel() > 0 and bool((lengths == T).all()):
        y, last = run(x.flatten(0, 1), first, torch.full((T,), B))
        return y.view(T, B, y.shape[-1]), last
    rows, batch_sizes, steps, rows_of = packing(lengths, T)
    places = steps * B + rows_of
    if x.is_contiguous():
        data = x.flatten(0, 1).index_select(0, places)
    else:  # as with batch_first
        data = x.transpose(0, 1).flatten(0, 1).index_select(0, rows_of * T + steps)
    y, last = run(data, [part.index_select(-2, rows) for part in first], batch_sizes)
    y = y.new_zeros(T * B, y.shape[-1]).index_copy(0, places, y).view(T, B, y.shape[-1])
    # Under autocast the state comes back in another dtype.
    return y, tuple(part.to(new.dtype).index_copy(-2, rows, new) for part, new in zip(first, last, strict=True))


# ---- the Elman recurrence


def rnn(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Elman recurrence over a whole sequence, one direction of one layer.

    h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh).

    Args:
        x: input [T, B, I], or with `batch_sizes` the rows of a packed sequence [N, I].
        h0: state before the first step, [B, H] or, as torch.nn lays out the state of one layer, [1, B, H]; None for
            zeros; must be given with `batch_sizes`.
        w_ih: [H, I].
        w_hh: [H, H].
        b_ih: [H] or None.
        b_hh: [H] or None.
        batch_sizes: rows of each step, int64 [T] on the CPU, positive and never rising, as in a PackedSequence.
        lengths: steps of each row of a padded x, int64 [B] on its device, from 0 to T, in any order; beyond them y is
            0. On CUDA only the kernel looks at them, and takes a wrong one as the nearest right one.
        nonlinearity: f, "tanh", "relu" or "sigmoid".
        reverse: run from the last step to the first; y[t] still belongs to x[t].

    Returns:
        Every state y [T, B, H] (packed: [N, H]), and the state h_n after each row's last step, in the shape of h0
        ([B, H] for None).

    Raises:
        ValueError: a shape, device or nonlinearity that does not fit, or batch_sizes that do not describe x.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: J. Elman, "Finding structure in time", 1990; gradients in docs/recurrence.md.
    """
    if lengths is not None and not _on_cuda(x):
        x, h0 = _before_autocast(w_ih, x, h0)
        checks.rnn(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, nonlinearity)

        def run(x: Tensor, state: list[Tensor], sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            options: Any = {"batch_sizes": sizes, "nonlinearity": nonlinearity, "reverse": reverse}
            y, h_n = rnn(x, state[0], w_ih, w_hh, b_ih, b_hh, **options)
            return y, (h_n,)

        y, (h_n,) = by_packing(x, (h0,), (w_hh.shape[1],), lengths, run)
        return y, h_n
    try:
        y, h_n = _rnn_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, nonlinearity, reverse, _tf32(x))
    except _FAILURES as failure:
        _explain(failure, checks.rnn, x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, nonlinearity)
    return y, h_n


def _rnn_forward_fake(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    checks.rnn(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, nonlinearity)
    H = w_hh.shape[0]
    return x.new_empty((*x.shape[:-1], H)), x.new_empty((x.shape[1], H) if h0 is None else h0.shape)


torch.library.register_fake("llm_ext::rnn_forward", _rnn_forward_fake)
_register_autocast(_rnn_forward)


def _gradients(*tensors_and_needs: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    """Fake gradients: shaped as their tensors, empty where there is none or it is not wanted."""
    some = next(tensor for tensor, _ in tensors_and_needs if tensor is not None)
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else some.new_empty(0)
        for tensor, need in tensors_and_needs
    )


def _wanted(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


def _rnn_backward_fake(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    reverse: bool,
    tf32: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    bias = w_ih.new_empty(w_ih.shape[0])
    return _gradients(*zip((x, h0, w_ih, w_hh, bias, bias), needs, strict=True))


torch.library.register_fake("llm_ext::rnn_backward", _rnn_backward_fake)


def _rnn_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, h0, w_ih, w_hh, _b_ih, _b_hh, batch_sizes, lengths, nonlinearity, reverse, tf32 = inputs
    y, _h_n = output
    ctx.save_for_backward(x, h0, w_ih, w_hh, y, batch_sizes, lengths)
    ctx.options = nonlinearity, reverse, tf32
    ctx.set_materialize_grads(False)


def _rnn_autograd(ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:6]
    gradients = _rnn_backward(grad_y, grad_h_n, *ctx.saved_tensors, *ctx.options, *needs)
    return *_wanted(gradients, needs), None, None, None, None, None


torch.library.register_autograd("llm_ext::rnn_forward", _rnn_autograd, setup_context=_rnn_setup_context)
_not_differentiable("rnn_backward")


# ---- GRU


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will record a call with these arguments: only then is anything kept for it."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def gru(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """GRU over a whole sequence, one direction of one layer.

    r_t, z_t = sigmoid(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh), n_t = tanh(w_ih x_t + b_ih + r_t (w_hh h_{t-1} + b_hh)),
    h_t = (1 - z_t) n_t + z_t h_{t-1}; the weights hold the rows of r, z and n, one after the other.

    Args:
        x: input [T, B, I], or with `batch_sizes` the rows of a packed sequence [N, I].
        h0: state before the first step, [B, H] or, as torch.nn lays out the state of one layer, [1, B, H]; None for
            zeros; must be given with `batch_sizes`.
        w_ih: [3 H, I].
        w_hh: [3 H, H].
        b_ih: [3 H] or None.
        b_hh: [3 H] or None.
        batch_sizes: rows of each step, int64 [T] on the CPU, positive and never rising, as in a PackedSequence.
        lengths: steps of each row of a padded x, int64 [B] on its device, from 0 to T, in any order; beyond them y is
            0. On CUDA only the kernel looks at them, and takes a wrong one as the nearest right one.
        reverse: run from the last step to the first; y[t] still belongs to x[t].

    Returns:
        Every state y [T, B, H] (packed: [N, H]), and the state h_n after each row's last step, in the shape of h0
        ([B, H] for None).

    Raises:
        ValueError: a shape or device that does not fit, or batch_sizes that do not describe x.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: Cho et al., arXiv 1406.1078, with the reset applied after the product, as in torch and cuDNN; gradients in
    docs/recurrence.md.
    """
    if lengths is not None and not _on_cuda(x):
        x, h0 = _before_autocast(w_ih, x, h0)
        checks.gru(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths)

        def run(x: Tensor, state: list[Tensor], sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, h_n = gru(x, state[0], w_ih, w_hh, b_ih, b_hh, batch_sizes=sizes, reverse=reverse)
            return y, (h_n,)

        y, (h_n,) = by_packing(x, (h0,), (w_hh.shape[1],), lengths, run)
        return y, h_n
    try:
        keep = records(x, h0, w_ih, w_hh, b_ih, b_hh)
        y, h_n, _kept = _gru_forward(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths, reverse, _tf32(x), keep)
    except _FAILURES as failure:
        _explain(failure, checks.gru, x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths)
    return y, h_n


def _gru_forward_fake(
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    tf32: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    checks.gru(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, lengths)
    H = w_hh.shape[1]
    N = x.shape[:-1].numel() if keep else 0
    return (
        x.new_empty((*x.shape[:-1], H)),
        x.new_empty((x.shape[1], H) if h0 is None else h0.shape),
        x.new_empty((N, 4 * H)),
    )


torch.library.register_fake("llm_ext::gru_forward", _gru_forward_fake)
_register_autocast(_gru_forward)


def _gru_backward_fake(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    kept: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    tf32: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    bias = w_ih.new_empty(w_ih.shape[0])
    return _gradients(*zip((x, h0, w_ih, w_hh, bias, bias), needs, strict=True))


torch.library.register_fake("llm_ext::gru_backward", _gru_backward_fake)


def _gru_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, w_ih, w_hh, _b_ih, _b_hh, batch_sizes, lengths, reverse, tf32, _keep = inputs
    y, _h_n, kept = output
    ctx.save_for_backward(x, h0, w_ih, w_hh, y, kept, batch_sizes, lengths)
    ctx.options = reverse, tf32
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)


def _gru_autograd(
    ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None, _grad_kept: None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:6]
    gradients = _gru_backward(grad_y, grad_h_n, *ctx.saved_tensors, *ctx.options, *needs)
    return *_wanted(gradients, needs), None, None, None, None, None


torch.library.register_autograd("llm_ext::gru_forward", _gru_autograd, setup_context=_gru_setup_context)
_not_differentiable("gru_backward")


# ---- LSTM


def lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM over a whole sequence, one direction of one layer.

    i_t, f_t, o_t = sigmoid(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh), g_t the same with tanh,
    c_t = f_t c_{t-1} + i_t g_t, h_t = o_t tanh(c_t), or w_hr times that; the weights hold the rows of i, f, g and o,
    one after the other.

    Args:
        x: input [T, B, I], or with `batch_sizes` the rows of a packed sequence [N, I].
        state: (h0 [B, P], c0 [B, H]) before the first step, or as torch.nn lays out the state of one layer, [1, B, *];
            None for zeros; must be given with `batch_sizes`. P = H without `w_hr`.
        w_ih: [4 H, I].
        w_hh: [4 H, P].
        b_ih: [4 H] or None.
        b_hh: [4 H] or None.
        w_hr: projection of the output, [P, H] with P < H, or None.
        batch_sizes: rows of each step, int64 [T] on the CPU, positive and never rising, as in a PackedSequence.
        lengths: steps of each row of a padded x, int64 [B] on its device, from 0 to T, in any order; beyond them y is
            0. On CUDA only the kernel looks at them, and takes a wrong one as the nearest right one.
        reverse: run from the last step to the first; y[t] still belongs to x[t].

    Returns:
        Every state y [T, B, P] (packed: [N, P]), and the state (h_n, c_n) after each row's last step, in the shapes of
        `state` ([B, P] and [B, H] for None).

    Raises:
        ValueError: a shape or device that does not fit, or batch_sizes that do not describe x.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: S. Hochreiter and J. Schmidhuber, "Long short-term memory", 1997; the forget gate: F. Gers et al.,
    "Learning to forget", 2000; the projection: Sak et al., arXiv 1402.1128; gradients in docs/recurrence.md.
    """
    h0, c0 = (None, None) if state is None else state
    if lengths is not None and not _on_cuda(x):
        x, h0, c0 = _before_autocast(w_ih, x, h0, c0)
        checks.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths)

        def run(x: Tensor, state: list[Tensor], sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            h0, c0 = state
            return lstm(x, (h0, c0), w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes=sizes, reverse=reverse)

        y, (h_n, c_n) = by_packing(x, (h0, c0), (w_hh.shape[1], w_hh.shape[0] // 4), lengths, run)
        return y, (h_n, c_n)
    try:
        keep = records(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        y, h_n, c_n, _kept = _lstm_forward(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths, reverse, _tf32(x), keep
        )
    except _FAILURES as failure:
        _explain(failure, checks.lstm, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths)
    return y, (h_n, c_n)


def _lstm_forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    tf32: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    checks.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths)
    H, P = w_ih.shape[0] // 4, w_hh.shape[1]
    N = x.shape[:-1].numel() if keep else 0
    return (
        x.new_empty((*x.shape[:-1], P)),
        x.new_empty((x.shape[1], P) if h0 is None else h0.shape),
        x.new_empty((x.shape[1], H) if c0 is None else c0.shape),
        x.new_empty((N, (5 if w_hr is None else 6) * H)),
    )


torch.library.register_fake("llm_ext::lstm_forward", _lstm_forward_fake)
_register_autocast(_lstm_forward)


def _lstm_backward_fake(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    y: Tensor,
    kept: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    tf32: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    bias = w_ih.new_empty(w_ih.shape[0])
    return _gradients(*zip((x, h0, c0, w_ih, w_hh, bias, bias, w_hr), needs, strict=True))


torch.library.register_fake("llm_ext::lstm_backward", _lstm_backward_fake)


def _lstm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, w_ih, w_hh, _b_ih, _b_hh, w_hr, batch_sizes, lengths, reverse, tf32, _keep = inputs
    y, _h_n, _c_n, kept = output
    ctx.save_for_backward(x, h0, c0, w_ih, w_hh, w_hr, y, kept, batch_sizes, lengths)
    ctx.options = reverse, tf32
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)


def _lstm_autograd(
    ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _grad_kept: None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:8]
    gradients = _lstm_backward(grad_y, grad_h_n, grad_c_n, *ctx.saved_tensors, *ctx.options, *needs)
    return *_wanted(gradients, needs), None, None, None, None, None


torch.library.register_autograd("llm_ext::lstm_forward", _lstm_autograd, setup_context=_lstm_setup_context)
_not_differentiable("lstm_backward")


# ---- layers


def bidirectional(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    bias: bool = True,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions of one layer: on CUDA in one launch, elsewhere one after the other.

    Args:
        cell: "tanh", "relu" or "sigmoid" (Elman), "gru" or "lstm".
        x: input [T, B, I], or with `batch_sizes` the rows of a packed sequence [N, I].
        h0: states before the first step of each direction, [2, B, H] (P for H if projected), or None for zeros.
        c0: cell states of an LSTM, [2, B, H], given exactly where h0 is; None for the others.
        weights: w_ih, w_hh, with `bias` b_ih and b_hh, and of an LSTM perhaps w_hr, of each direction.
        bias: whether there are biases.
        batch_sizes: as those of `rnn`.
        lengths: as those of `rnn`.

    Returns:
        y [T, B, 2 H] (packed: [N, 2 H]), the directions side by side, h_n [2, B, H], and c_n [2, B, H] of an LSTM,
        [0] of the others.

    Raises:
        ValueError: an unknown cell, or a shape, number or device that does not fit.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.
    """
    if not _on_cuda(x):
        return _bidirectional_in_turn(cell, x, h0, c0, weights, bias, batch_sizes, lengths)
    try:
        keep = cell in ("gru", "lstm") and records(x, h0, c0, *weights)
        y, h_n, c_n, _kept = _bidirectional_forward(
            cell, x, h0, c0, weights, bias, batch_sizes, lengths, _tf32(x), keep
        )
    except _FAILURES as failure:
        _explain(failure, checks.bidirectional, cell, x, h0, c0, weights, bias, batch_sizes, lengths)
    return y, h_n, c_n


def _bidirectional_in_turn(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.bidirectional(cell, x, h0, c0, weights, bias, batch_sizes, lengths)
    if lengths is not None:
        features = (weights[1].shape[1], weights[0].shape[0] // 4)[: 1 + (cell == "lstm")]

        def run(data: Tensor, first: list[Tensor], sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            h, c = first[0], first[1] if cell == "lstm" else None
            y, h_n, c_n = _bidirectional_in_turn(cell, data, h, c, weights, bias, sizes, None)
            return y, (h_n, c_n)[: len(first)]

        y, (h_n, *cells) = by_packing(x, (h0, c0)[: len(features)], features, lengths, run, (2,))
        return y, h_n, cells[0] if cells else h_n.new_empty(0)
    outputs: list[Tensor] = []
    last: list[tuple[Tensor, ...]] = []
    each = len(weights) // 2
    for d in range(2):
        w_ih, w_hh, *others = weights[d * each : (d + 1) * each]
        b_ih, b_hh = others[:2] if bias else (None, None)
        options: Any = {"batch_sizes": batch_sizes, "reverse": d == 1}
        h, c = (None if state is None else state[d] for state in (h0, c0))
        if cell == "lstm":
            w_hr = others[-1] if len(others) % 2 else None
            y, (h_n, c_n) = lstm(x, None if h is None or c is None else (h, c), w_ih, w_hh, b_ih, b_hh, w_hr, **options)
        elif cell == "gru":
            y, h_n = gru(x, h, w_ih, w_hh, b_ih, b_hh, **options)
        else:
            y, h_n = rnn(x, h, w_ih, w_hh, b_ih, b_hh, nonlinearity=cell, **options)
        outputs.append(y)
        last.append((h_n, c_n) if cell == "lstm" else (h_n,))
    h_n, *cells = (torch.stack(parts) for parts in zip(*last, strict=True))
    return torch.cat(outputs, -1), h_n, cells[0] if cells else h_n.new_empty(0)


def _bidirectional_forward_fake(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    tf32: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    checks.bidirectional(cell, x, h0, c0, weights, bias, batch_sizes, lengths)
    P, gates = weights[1].shape[1], {"gru": 3, "lstm": 4}.get(cell, 1)
    H, B = weights[0].shape[0] // gates, x.shape[1] if h0 is None else h0.shape[1]
    blocks = {"gru": 4, "lstm": 5 + (P != H)}.get(cell, 0)
    return (
        x.new_empty((*x.shape[:-1], 2 * P)),
        x.new_empty((2, B, P)),
        x.new_empty((2, B, H) if cell == "lstm" else 0),
        x.new_empty((2 * x.shape[:-1].numel() if keep else 0, blocks * H) if blocks else 0),
    )


torch.library.register_fake("llm_ext::bidirectional_forward", _bidirectional_forward_fake)
_register_autocast(_bidirectional_forward)


def _bidirectional_backward_fake(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    y: Tensor,
    kept: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    tf32: bool,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dx, dh0, dc0, *dweights = _gradients(
        *zip((x, h0, c0, *weights), (*needs[:3], *[needs[3]] * len(weights)), strict=True)
    )
    return dx, dh0, dc0, dweights


torch.library.register_fake("llm_ext::bidirectional_backward", _bidirectional_backward_fake)


def _bidirectional_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cell, x, h0, c0, weights, bias, batch_sizes, lengths, tf32, _keep = inputs
    y, _h_n, _c_n, kept = output
    ctx.save_for_backward(x, h0, c0, y, kept, batch_sizes, lengths, *weights)
    ctx.options = cell, bias, tf32
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)


def _bidirectional_autograd(
    ctx: Any, grad_y: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _grad_kept: None
) -> tuple[Any, ...]:
    x, h0, c0, y, kept, batch_sizes, lengths, *weights = ctx.saved_tensors
    cell, bias, tf32 = ctx.options
    _, *needs, need_weights, _, _, _, _, _ = ctx.needs_input_grad
    *gradients, dweights = _bidirectional_backward(
        *(grad_y, grad_h_n, grad_c_n if cell == "lstm" else None),
        *(cell, x, h0, c0, weights, bias, y, kept, batch_sizes, lengths, tf32),
        *(*needs, any(need_weights)),
    )
    wanted = _wanted(tuple(gradients), tuple(needs))
    return None, *wanted, list(_wanted(tuple(dweights), tuple(need_weights))), None, None, None, None, None


torch.library.register_autograd(
    "llm_ext::bidirectional_forward", _bidirectional_autograd, setup_context=_bidirectional_setup_context
)
_not_differentiable("bidirectional_backward")


def stack(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    bias: bool = True,
    bidirectional: bool = False,
    batch_sizes: Tensor | None = None,
    tables: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several layers in one call, for inference: there is no derivative.

    The same as one call of `rnn`, `gru` or `lstm` for each layer and direction, but where steps are too small to be
    shared by threads, each thread runs layers (as a wavefront over time) or directions of its own.

    Args:
        cell: "tanh", "relu" or "sigmoid" (Elman), "gru" or "lstm".
        x: input [T, B, I], or with `batch_sizes` the rows of a packed sequence [N, I]; with `tables` ids of their rows,
            [T, B] or [N] int64.
        h0: states before the first step, [L, B, H], 2 L if bidirectional; None for zeros.
        c0: cell states of an LSTM in the same shape, given exactly where h0 is; None for the others.
        weights: w_ih, w_hh and with `bias` b_ih, b_hh of each layer and direction, in the order of the states.
        bias: whether there are biases.
        bidirectional: a second direction reads the sequence backwards; outputs of both are concatenated.
        batch_sizes: as those of `rnn`; on the CPU only.
        tables: what each direction of the first layer makes of every x that there can be, W_ih x + b_ih, [V, G H]; its
            own w_ih and b_ih are then not looked at. On the CPU only.

    Returns:
        y [T, B, H] of the last layer (packed: [N, H]; 2 H if bidirectional), h_n [L, B, H], and c_n [L, B, H] of an
        LSTM, [0, B, H] of the others.

    Raises:
        ValueError: an unknown cell, or a shape, number or device that does not fit.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.
        IndexError: an id that is not of a row of `tables`.
    """
    arguments = cell, x, h0, c0, weights, bias, bidirectional, tables or [], batch_sizes
    try:
        y, h_n, c_n = _stack_forward(*arguments, _tf32(x))
    except _FAILURES as failure:
        _explain(failure, checks.stack, *arguments)
    return y, h_n, c_n


def _stack_forward_fake(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    bidirectional: bool,
    tables: list[Tensor],
    batch_sizes: Tensor | None,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.stack(cell, x, h0, c0, weights, bias, bidirectional, tables, batch_sizes)
    H, rows = weights[1].shape[1], len(weights) // (2 + 2 * bias)
    B = h0.shape[1] if h0 is not None else x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    like = weights[1]
    leading = x.shape if tables else x.shape[:-1]
    y = like.new_empty((*leading, (1 + bidirectional) * H))
    return y, like.new_empty((rows, B, H)), like.new_empty((rows if cell == "lstm" else 0, B, H))


torch.library.register_fake("llm_ext::stack_forward", _stack_forward_fake)
_register_autocast(_stack_forward)
_not_differentiable("stack_forward", "it is for inference")


def attention_step(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    w_out: Tensor,
    b_out: Tensor | None = None,
    *,
    bias: bool = True,
    table: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a decoder with attention in one call, on a CPU and for inference: there is no derivative.

    The same as `stack` over one step, `additive_attention` by w_query times what that returns, and
    out = tanh(w_out y + b_out + context).

    Args:
        cell: "tanh", "relu" or "sigmoid" (Elman), "gru" or "lstm".
        x: input of N rows, [1, N, I]; float32 or float64. With `table` ids of its rows, [1, N] int64.
        h0: states, [L, N, H].
        c0: cell states of an LSTM in the same shape; None for the others.
        weights: w_ih, w_hh and with `bias` b_ih, b_hh of each layer.
        w_query: [A, H].
        keys: of B sources, projected, [B, Tk, A]; N is a multiple of B, and as many rows attend to each, one after the
            other.
        v: [A].
        values: [B, Tk, D].
        w_out: [D, H].
        b_out: [D], or None for zeros.
        bias: whether the layers have biases.
        table: as one of the `tables` of `stack`.
        key_lengths: [B] int64: key k of source b takes part if k < key_lengths[b].

    Returns:
        out [N, D], the new h [L, N, H], and the new c [L, N, H] of an LSTM, [0, N, H] of the others.

    Raises:
        ValueError: an unknown cell, or a shape, number or device that does not fit.
        IndexError: an id that is not of a row of `table`.
        TypeError: a dtype other than float32 and float64, or mixed dtypes.
        NotImplementedError: tensors of another device.

    Source: attention after the recurrence: Luong et al., arXiv 1508.04025.
    """
    arguments = cell, x, h0, c0, weights, bias, table, w_query, keys, v, values, key_lengths, w_out, b_out
    try:
        out, h_n, c_n = _attention_step(*arguments)
    except _FAILURES as failure:
        _explain(failure, checks.attention_step, *arguments)
    return out, h_n, c_n


def _attention_step_fake(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    table: Tensor | None,
    w_query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.attention_step(cell, x, h0, c0, weights, bias, table, w_query, keys, v, values, key_lengths, w_out, b_out)
    c_n = h0[:0] if c0 is None else c0
    return h0.new_empty((h0.shape[1], values.shape[2])), h0.new_empty(h0.shape), h0.new_empty(c_n.shape)


torch.library.register_fake("llm_ext::attention_step", _attention_step_fake)
_not_differentiable("attention_step", "it is for inference")


# ---- affine maps


def own_products(x: Tensor) -> bool:
    """Whether affine maps of x are ours; of 16 bits and on CUDA torch has a product that is at least as quick."""
    return (
        isinstance(x, Tensor) and x.dtype in checks.LINEAR_DTYPES and x.is_cpu and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine map of vectors, y = x Wᵀ + b, as `torch.nn.functional.linear`.

    On a CPU, in float32 and float64, the products are those of the recurrence; elsewhere they are torch's.

    Args:
        x: [*, I].
        weight: W, [O, I].
        bias: b, [O]; None for zeros.

    Returns:
        y, [*, O].

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: mixed dtypes.
    """
    if not own_products(x):
        return F.linear(x, weight, bias)
    try:
        return cast(Tensor, _linear_forward(x, weight, bias))
    except _FAILURES as failure:
        _explain(failure, checks.linear, x, weight, bias)


def _linear_forward_fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    checks.linear(x, w, b)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


torch.library.register_fake("llm_ext::linear_forward", _linear_forward_fake)


def _linear_backward_fake(grad_y: Tensor, x: Tensor, w: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    return _gradients(*zip((x, w, w.new_empty(w.shape[0])), needs, strict=True))


torch.library.register_fake("llm_ext::linear_backward", _linear_backward_fake)


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _b = inputs
    ctx.save_for_backward(x, w)


def _linear_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    return _wanted(_linear_backward(grad_y, *ctx.saved_tensors, *needs), needs)


torch.library.register_autograd("llm_ext::linear_forward", _linear_autograd, setup_context=_linear_setup_context)
_not_differentiable("linear_backward")


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Where the largest component of each vector x Wᵀ + b is, as `linear(x, weight, bias).argmax(-1)`.

    Where `linear` is ours, the components are not stored: greedy search needs no scores.

    Args:
        x: [*, I].
        weight: W, [O, I], 0 < O < 2³¹.
        bias: b, [O]; None for zeros.

    Returns:
        Places [*] int64; of several that are equal the first. A NaN is larger than all numbers, of several any.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: mixed dtypes.
    """
    if not own_products(x):
        return F.linear(x, weight, bias).argmax(-1)
    try:
        return cast(Tensor, _linear_argmax(x, weight, bias))
    except _FAILURES as failure:
        _explain(failure, checks.linear_argmax, x, weight, bias)


def _linear_argmax_fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    checks.linear_argmax(x, w, b)
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


torch.library.register_fake("llm_ext::linear_argmax", _linear_argmax_fake)
_not_differentiable("linear_argmax", "places have none")


# ---- attention pooling


def attention_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention pooling, c = sum_t softmax_t(s_t) e_t.

    Args:
        e: vectors to pool [B, T, D]; a transposed view of a dense [T, B, D] is read as it lies.
        u: [D], the scores are s = e u; or
        scores: s [B, T]. Exactly one of the two.
        lengths: int64 [B], positions t >= lengths[b] take no part; None: all do. On CUDA only the kernel looks at
            them, and takes a wrong one as the nearest right one.
        mask: bool [B, T], True where a position takes part; None: all do. Both may be given, both must then admit it.

    Returns:
        c [B, D], and the log-sum-exp of the scores that take part, [B], float32 where e has 16 bits. A row without any
        gives 0 and -inf, and its gradients are 0.

    Raises:
        ValueError: a shape or device that does not fit, or lengths outside 0 .. T.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: docs/attention.md; the score folded into one vector, softmax in one pass (arXiv 1805.02867).
    """
    try:
        c, lse = _attention_pool_forward(e, u, scores, lengths, mask)
    except _FAILURES as failure:
        _explain(failure, checks.pool, "attention_pool", e, u, scores, lengths, mask)
    return c, lse


def _empty_rows(e: Tensor) -> Tensor:
    """Result laid out as the kernels do: time-major where e is, else dense [B, T, D]."""
    B, T, D = e.shape
    if e.stride() == (D, B * D, 1):
        return e.new_empty((T, B, D)).transpose(0, 1)
    return e.new_empty((B, T, D))


def _attention_pool_forward_fake(
    e: Tensor, u: Tensor | None, scores: Tensor | None, lengths: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    checks.pool("attention_pool", e, u, scores, lengths, mask)
    B, _T, D = e.shape
    return e.new_empty((B, D)), e.new_empty(B, dtype=checks.compute_dtype(e.dtype))


torch.library.register_fake("llm_ext::attention_pool_forward", _attention_pool_forward_fake)
_register_autocast(_attention_pool_forward)


def _attention_pool_backward_fake(
    grad_c: Tensor | None,
    grad_lse: Tensor | None,
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    c: Tensor,
    lse: Tensor,
    need_de: bool,
    need_du: bool,
    need_dscores: bool,
) -> tuple[Tensor, ...]:
    B, T, D = e.shape
    return (
        _empty_rows(e) if need_de else e.new_empty(0),
        e.new_empty(D if need_du and u is not None else 0),
        e.new_empty((B, T) if need_dscores and scores is not None else 0),
    )


torch.library.register_fake("llm_ext::attention_pool_backward", _attention_pool_backward_fake)


def _attention_pool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _attention_pool_autograd(ctx: Any, grad_c: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    need_e, need_u, need_scores = ctx.needs_input_grad[:3]
    de, du, dscores = _attention_pool_backward(grad_c, grad_lse, *ctx.saved_tensors, need_e, need_u, need_scores)
    return de if need_e else None, du if need_u else None, dscores if need_scores else None, None, None


torch.library.register_autograd(
    "llm_ext::attention_pool_forward", _attention_pool_autograd, setup_context=_attention_pool_setup_context
)
_not_differentiable("attention_pool_backward")


# ---- causal prefix pooling


def prefix_pool(
    e: Tensor,
    u: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal prefix pooling: c_t pools over the positions i <= t, and over what an initial state has seen.

    a_t = sigmoid(s_t - L_{t-1}), L_t = logaddexp(L_{t-1}, s_t), c_t = c_{t-1} + a_t (e_t - c_{t-1}).

    Args:
        e: vectors to pool [B, T, D]; a transposed view of a dense [T, B, D] is read as it lies.
        u: [D], the scores are s = e u; or
        scores: s [B, T]. Exactly one of the two.
        lengths: int64 [B], positions t >= lengths[b] take no part and leave the state as it is; None: all do. On CUDA
            only the kernel looks at them, and takes a wrong one as the nearest right one.
        mask: bool [B, T], True where a position takes part; None: all do.
        state: (L [B], c [B, D]) as returned for what came before, float32 where e has 16 bits; None: nothing came
            before (L = -inf, c = 0).

    Returns:
        c [B, T, D], laid out in memory as e, and the state (L [B], c [B, D]) after the last position.

    Raises:
        ValueError: a shape or device that does not fit, or lengths outside 0 .. T.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: "Attention as an RNN", arXiv 2405.13956; gradients in docs/attention.md.
    """
    l0, c0 = (None, None) if state is None else state
    try:
        c, _share, l_n, c_n = _prefix_pool_forward(e, u, scores, lengths, mask, l0, c0)
    except _FAILURES as failure:
        _explain(failure, checks.pool, "prefix_pool", e, u, scores, lengths, mask, state)
    return c, (l_n, c_n)


def _prefix_pool_forward_fake(
    e: Tensor,
    u: Tensor | None,
    scores: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    l0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, ...]:
    checks.pool("prefix_pool", e, u, scores, lengths, mask, None if l0 is None or c0 is None else (l0, c0))
    B, T, D = e.shape
    computed = checks.compute_dtype(e.dtype)
    return _empty_rows(e), *(e.new_empty(size, dtype=computed) for size in ((B, T), (B,), (B, D)))


torch.library.register_fake("llm_ext::prefix_pool_forward", _prefix_pool_forward_fake)
_register_autocast(_prefix_pool_forward, states=(5, 6))


def _prefix_pool_backward_fake(
    grad_c: Tensor | None,
    grad_l_n: Tensor | None,
    grad_c_n: Tensor | None,
    e: Tensor,
    u: Tensor | None,
    c0: Tensor | None,
    c: Tensor,
    share: Tensor,
    need_de: bool,
    need_du: bool,
    need_dscores: bool,
    need_dstate: bool,
) -> tuple[Tensor, ...]:
    B, T, D = e.shape
    return (
        _empty_rows(e) if need_de else e.new_empty(0),
        e.new_empty(D if need_du else 0),
        e.new_empty((B, T) if need_dscores else 0),
        share.new_empty(B if need_dstate else 0),
        share.new_empty((B, D) if need_dstate else 0),
    )


torch.library.register_fake("llm_ext::prefix_pool_backward", _prefix_pool_backward_fake)


def _prefix_pool_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    e, u, _scores, _lengths, _mask, _l0, c0 = inputs
    c, share, _l_n, _c_n = output
    ctx.save_for_backward(e, u, c0, c, share)
    ctx.mark_non_differentiable(share)
    ctx.set_materialize_grads(False)


def _prefix_pool_autograd(
    ctx: Any, grad_c: Tensor | None, _grad_share: None, grad_l_n: Tensor | None, grad_c_n: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_e, need_u, need_scores, _, _, need_l0, need_c0 = ctx.needs_input_grad
    de, du, dscores, dl0, dc0 = _prefix_pool_backward(
        grad_c, grad_l_n, grad_c_n, *ctx.saved_tensors, need_e, need_u, need_scores, need_l0 or need_c0
    )
    return (
        de if need_e else None,
        du if need_u else None,
        dscores if need_scores else None,
        None,
        None,
        dl0 if need_l0 else None,
        dc0 if need_c0 else None,
    )


torch.library.register_autograd(
    "llm_ext::prefix_pool_forward", _prefix_pool_autograd, setup_context=_prefix_pool_setup_context
)
_not_differentiable("prefix_pool_backward")


# ---- additive attention


def additive_attention(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    *,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Additive attention, c_q = sum_k softmax_k(v tanh(query_q + keys_k)) values_k; no [Tq, Tk, A] is ever stored.

    Args:
        query: projected queries [B, Tq, A].
        keys: projected keys [B, Tk, A]; a bias belongs to either of the two.
        v: [A].
        values: [B, Tk, Dv].
        key_lengths: int64 [B], keys k >= key_lengths[b] take no part; None: all do. On CUDA only the kernel looks at
            them, and takes a wrong one as the nearest right one.
        mask: bool [B, Tk] or [B, Tq, Tk], True where a key takes part; None: all do. Both may be given, both must then
            admit it.
        need_weights: return the softmax as well; it is differentiable too.

    Returns:
        The context c [B, Tq, Dv], and the weights [B, Tq, Tk] or None. A query for which no key takes part gets 0, and
        its gradients are 0.

    Raises:
        ValueError: a shape or device that does not fit, or key_lengths outside 0 .. Tk.
        TypeError: a dtype other than float32, float64, bfloat16 and float16, or mixed dtypes.

    Source: "Neural machine translation by jointly learning to align and translate", arXiv 1409.0473; gradients in
    docs/attention.md.
    """
    try:
        context, _lse, weights = _additive_attention_forward(query, keys, v, values, key_lengths, mask, need_weights)
    except _FAILURES as failure:
        _explain(failure, checks.additive_attention, query, keys, v, values, key_lengths, mask)
    return context, weights if need_weights else None


def _additive_attention_forward_fake(
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.additive_attention(query, keys, v, values, key_lengths, mask)
    (B, Tq, _), (_, Tk, Dv) = query.shape, values.shape
    return (
        query.new_empty((B, Tq, Dv)),
        query.new_empty((B, Tq), dtype=checks.compute_dtype(query.dtype)),
        query.new_empty((B, Tq, Tk) if need_weights else 0),
    )


torch.library.register_fake("llm_ext::additive_attention_forward", _additive_attention_forward_fake)
_register_autocast(_additive_attention_forward)


def _additive_attention_backward_fake(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    v: Tensor,
    values: Tensor,
    key_lengths: Tensor | None,
    mask: Tensor | None,
    context: Tensor,
    lse: Tensor,
    weights: Tensor,
    *needs: bool,
) -> tuple[Tensor, ...]:
    return _gradients(*zip((query, keys, v, values), needs, strict=True))


torch.library.register_fake("llm_ext::additive_attention_backward", _additive_attention_backward_fake)


def _additive_attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, need_weights = inputs
    _context, lse, weights = output
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*((lse,) if need_weights else (lse, weights)))
    ctx.set_materialize_grads(False)


def _additive_attention_autograd(
    ctx: Any, grad_context: Tensor | None, _grad_lse: None, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    gradients = _additive_attention_backward(grad_context, grad_weights, *ctx.saved_tensors, *needs)
    return *_wanted(gradients, needs), None, None, None


torch.library.register_autograd(
    "llm_ext::additive_attention_forward",
    _additive_attention_autograd,
    setup_context=_additive_attention_setup_context,
)
_not_differentiable("additive_attention_backward")
