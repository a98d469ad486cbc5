"""Training with differential privacy: gradients of each sample for `Opacus <https://opacus.ai>`_.

Importing this module registers the layers of llm_ext with Opacus, whose `GradSampleModule` and `PrivacyEngine` then
take models of them, `LLM`, `Seq2Seq` and `SequenceClassifier` included.

Opacus gives a grad sampler the first input of a layer and the gradient of its first output, which says nothing of
states, lengths and packed rows. So a layer that Opacus watches runs with weights that are expanded, as a view, to one
set for each sample, and their gradients are those of the samples: the kernel of the backward pass computes the
gradients of the pre-activations of all samples at once, and one batched product makes gradients of weights of them.
Opacus's hooks see the call of an identity, the token, whose backward pass follows that of the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from llm_ext import ops
from llm_ext.nn import (
    GRU,
    LSTM,
    RNN,
    AdditiveAttention,
    AffineEmbedding,
    AttentionPool,
    GRUCell,
    Linear,
    LSTMCell,
    RNNCell,
)
from llm_ext.nn._recurrent_base import hidden_of
from llm_ext.nn.attention import zero_padding_for_autograd
from llm_ext.ops.argument_checks import ArgumentError
from llm_ext.ops.recurrence import SampleWeights, run

__all__ = ["grad_samples"]

# The weights of a layer by name, expanded to [S, ...] for S samples.
Weights = dict[str, Tensor | None]
Rule = Callable[..., Any]


def grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of each sample that the backward passes of a layer have left: the grad sampler for Opacus.

    Importing this module registers it for the recurrent layers, cells and attention layers of llm_ext; a subclass that
    leaves `forward` as it is follows with its first call.

    Args:
        layer: The layer.
        activations: What Opacus saw of the input: the token of a call.
        backprops: The gradient of the token: the factor between a gradient and that of a sample.

    Returns:
        For each parameter gradients ``[S, ...]`` of S samples, the sum of all calls.

    Example:
        >>> import llm_ext.privacy
        >>> from opacus import GradSampleModule
        >>> model = GradSampleModule(llm_ext.LSTM(10, 20, batch_first=True))
        >>> output, (h_n, c_n) = model(torch.randn(8, 5, 10))
        >>> output.square().mean().backward()
        >>> model.weight_hh_l0.grad_sample.shape
        torch.Size([8, 80, 20])
    """
    found, S = _collected(layer), cast(int, layer.max_batch_len)
    gradients = {}
    for parameter in layer.parameters(recurse=False):
        if parameter.requires_grad:
            gradient = found.pop(parameter, None)
            gradients[parameter] = parameter.new_zeros(S, *parameter.shape) if gradient is None else gradient
    # The same for all samples: S where the loss is the mean over them, 1 where it is the sum.
    factor = float(backprops[0, 0]) if S > 0 else 1.0
    return gradients if factor == 1 else {p: gradient * factor for p, gradient in gradients.items()}


# ---- the calls of a watched layer


class _Expanded(torch.autograd.Function):
    """Expand a parameter to S samples; the gradient of each sample is kept for `grad_samples`."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, parameter: nn.Parameter, layer: nn.Module, S: int, order: Tensor | None
    ) -> Tensor:
        ctx.parameter, ctx.layer, ctx.order = parameter, layer, order
        return parameter.unsqueeze(0).expand(S, *parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.order is not None:
            gradient = gradient.index_select(0, ctx.order)
        found, parameter = _collected(ctx.layer), ctx.parameter
        found[parameter] = found[parameter] + gradient if parameter in found else gradient
        return None, gradient.sum(0), None, None, None


class _Tap(torch.autograd.Function):
    """The identity of the results of a call; the token gets a gradient of ones when any of them has one."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.ones = torch.ones_like(token)
        ctx.set_materialize_grads(False)
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.ones, *gradients


def _collected(layer: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of samples that Opacus has not fetched yet."""
    found: dict[nn.Parameter, Tensor] = vars(layer).setdefault("_grad_samples", {})
    return found


def _is_watched(layer: nn.Module) -> bool:
    """Return whether the hooks of Opacus keep the next call."""
    if not (layer._backward_hooks and layer.training and torch.is_grad_enabled()):
        return False
    return any(hasattr(p, "_forward_counter") and p.requires_grad for p in layer.parameters(recurse=False))


def _call_watched(layer: nn.Module, rule: Rule, S: int, order: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """Call a layer, or another of its methods, by a rule, with its weights expanded to S samples.

    `order` is the sample of the batch at each position of the weights, None for the order of the batch.
    """
    parameters = layer._parameters
    if not any(p is not None and getattr(p, "_forward_counter", 0) for p in parameters.values()):
        _collected(layer).clear()  # of a backward pass that did not come to its end
    like = next(p for p in parameters.values() if p is not None)
    # The hooks see this call. Opacus takes the number of samples from its input, whichever dimension is that of them.
    layer.max_batch_len = S  # type: ignore[assignment]
    vars(layer)["forward"] = lambda token: token.view_as(token)
    try:
        token = nn.Module.__call__(layer, like.new_zeros(S, 1).requires_grad_())
    finally:
        del vars(layer)["forward"]
    weights: Weights | None = None
    if S > 0:
        weights = {name: _expand(token, p, layer, S, order) for name, p in parameters.items()}
    results = rule(layer, weights, *args, **kwargs)
    tapped = iter(_Tap.apply(token, *_differentiable(results)))  # type: ignore[no-untyped-call]
    return _replaced(results, tapped)


def _expand(
    token: Tensor, parameter: nn.Parameter | None, layer: nn.Module, S: int, order: Tensor | None
) -> Tensor | None:
    if parameter is None:
        return None
    if not parameter.requires_grad:
        return parameter.expand(S, *parameter.shape)
    return cast(Tensor, _Expanded.apply(token, parameter, layer, S, order))  # type: ignore[no-untyped-call]


def _differentiable(results: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples that require gradients."""
    if isinstance(results, tuple):
        for each in results:
            yield from _differentiable(each)
    elif isinstance(results, Tensor) and results.requires_grad:
        yield results


def _replaced(results: Any, new: Iterator[Tensor]) -> Any:
    """Return nested tuples with other tensors in place of those of `_differentiable`."""
    if isinstance(results, tuple):
        items = [_replaced(each, new) for each in results]
        return type(results)._make(items) if hasattr(results, "_make") else tuple(items)
    return next(new) if isinstance(results, Tensor) and results.requires_grad else results


# ---- the rules of layers: (layer, weights, *arguments of forward); the weights are None for a batch without samples


def _recurrent(layer: Any, weights: Weights | None, input: Tensor | PackedSequence, *args: Any, **kwargs: Any) -> Any:
    if weights is None:
        return layer.forward(input, *args, **kwargs)
    rows = SampleWeights([[weights[name] for name in names] for names in layer._all_weights])
    vars(layer)["_weights"] = lambda: rows
    try:
        return layer.forward(input, *args, **kwargs)
    finally:
        del vars(layer)["_weights"]


def _cell(
    layer: Any,
    weights: Weights | None,
    input: Tensor,
    hx: Any = None,
    *,
    reset: Tensor | None = None,
    reset_to: Any = None,
) -> Any:
    if weights is None:
        return layer.forward(input, hx, reset=reset, reset_to=reset_to)
    state = layer._zeros(input, len(input)) if hx is None else layer._state(hx)
    layer._check_arguments(input, state)
    if reset is not None or reset_to is not None:
        state = layer._after_reset(input, state, reset, reset_to)
    row = [weights[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    state = tuple(tensor.unsqueeze(0) for tensor in state)
    _, last = run(layer.mode, input.unsqueeze(0), state, SampleWeights([row]), (False,), 0.0, None, None)
    return hidden_of(tuple(tensor.squeeze(0) for tensor in last))


def _attention_pool(
    layer: AttentionPool,
    weights: Weights | None,
    e: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
    state: Any = None,
    u: Tensor | None = None,
) -> Any:
    if weights is None:
        return layer.forward(e, lengths, mask, need_weights, state, u)
    if u is not None:
        raise ArgumentError("AttentionPool: u must be None for gradients of each sample, got a Tensor")
    scored = zero_padding_for_autograd(e, lengths, mask)
    W, v, b = cast(Tensor, weights["weight"]), cast(Tensor, weights["v"]), weights["bias"]
    if b is None:
        scores = (scored @ (v.unsqueeze(1) @ W).mT).squeeze(-1)
    else:
        scores = (torch.tanh(scored @ W.mT + b.unsqueeze(1)) @ v.unsqueeze(-1)).squeeze(-1)
    return layer._pool(e, scored, None, scores, lengths, mask, need_weights, state)


def _project_keys(layer: AdditiveAttention, weights: Weights | None, keys: Tensor) -> Tensor:
    if weights is None:
        return _plain_project_keys(layer, keys)
    projected, b = keys @ cast(Tensor, weights["k_proj_weight"]).mT, weights["bias"]
    return projected if b is None else projected + b.unsqueeze(1)


def _additive_attention(
    layer: AdditiveAttention,
    weights: Weights | None,
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None = None,
    key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
    *,
    projected_keys: Tensor | None = None,
) -> Any:
    if weights is None:
        return layer.forward(query, keys, values, key_lengths, mask, need_weights, projected_keys=projected_keys)
    layer._check_arguments(query, keys, projected_keys)
    q, v = query @ cast(Tensor, weights["q_proj_weight"]).mT, cast(Tensor, weights["v"])
    if projected_keys is None:
        projected_keys = _project_keys(layer, weights, layer._with_zero_padding(cast(Tensor, keys), key_lengths, mask))
    values = cast(Tensor, keys if values is None else values)
    # A call for each row, because the op sums the gradient of v over its batch. The gradient of a split is one tensor,
    # that of a slice would be a tensor of the whole batch for each row.
    rows = zip(torch.split(q, 1), torch.split(projected_keys, 1), v.unbind(), torch.split(values, 1), strict=True)
    results = []
    for i, row in enumerate(rows):
        lengths, masked = (None if each is None else each[i : i + 1] for each in (key_lengths, mask))
        results.append(ops.additive_attention(*row, key_lengths=lengths, mask=masked, need_weights=need_weights))
    contexts, attended = zip(*results, strict=True)
    return torch.cat(contexts), torch.cat(attended) if need_weights else None


def _samples(layer: Any, input: Any) -> tuple[int, Tensor | None]:
    """Return the number of samples of the first argument of a call, and the order of `_call_watched`."""
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0]), input.unsorted_indices
    dims = 2 if isinstance(layer, nn.RNNCellBase) else 3
    if input.dim() != dims:
        got = f"got {list(input.shape)}"
        raise ArgumentError(
            f"{type(layer).__name__}: gradients of each sample need a batch of {dims} dimensions, {got}"
        )
    time_first = isinstance(layer, nn.RNNBase) and not layer.batch_first
    return input.shape[1 if time_first else 0], None


# ---- registration


def _watch(cls: Any, name: str, rule: Rule) -> None:
    """Let the calls of a class whose first argument has a name take a rule where Opacus watches them."""
    forward = cls.forward

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_watched(layer):
            return nn.Module.__call__(layer, *args, **kwargs)
        if type(layer).forward is not forward or "forward" in vars(layer):
            got = type(layer).__name__
            raise TypeError(f"llm_ext.privacy: {got}.forward must be that of llm_ext.{cls.__name__}, got another")
        register_grad_sampler(type(layer))(grad_samples)
        return _call_watched(layer, rule, *_samples(layer, args[0] if args else kwargs[name]), *args, **kwargs)

    cls.__call__ = call
    register_grad_sampler(cls)(grad_samples)


def _register() -> None:
    for cls in (RNN, GRU, LSTM):
        _watch(cls, "input", _recurrent)
    for cell in (RNNCell, GRUCell, LSTMCell):
        _watch(cell, "input", _cell)
    _watch(AttentionPool, "e", _attention_pool)
    _watch(AdditiveAttention, "query", _additive_attention)
    register_grad_sampler(Linear)(compute_linear_grad_sample)
    register_grad_sampler(AffineEmbedding)(_embedding_grad_samples)


def _embedding_grad_samples(
    layer: AffineEmbedding, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    gradients: dict[nn.Parameter, Tensor] = compute_embedding_grad_sample(layer, activations, backprops)
    if layer.bias.requires_grad:
        gradients[layer.bias] = backprops.flatten(1, -2).sum(1)
    return gradients


_plain_project_keys = AdditiveAttention.project_keys


@functools.wraps(_plain_project_keys)
def _watched_project_keys(layer: AdditiveAttention, keys: Tensor) -> Tensor:
    if not _is_watched(layer) or "forward" in vars(layer):
        return _plain_project_keys(layer, keys)
    return cast(Tensor, _call_watched(layer, _project_keys, len(keys), None, keys))


setattr(AdditiveAttention, "project_keys", _watched_project_keys)  # noqa: B010  (mypy knows the class)
_register()
