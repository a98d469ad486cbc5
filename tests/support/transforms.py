"""The transforms of torch, each as a function of a function and its tensors, and checks of all of them.

A function takes tensors by name and returns tensors. Its transform is compared with that of its reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from support.comparison import assert_close, flatten

Function = Callable[..., Sequence[Tensor]]

# Inputs that are data; the others are weights. vmap over weights is an ensemble.
DATA = {"x", "h0", "c0", "e", "scores", "l", "c", "query", "keys", "values"}
# Sets of inputs that vmap maps over.
COPIES = 3


def positional(function: Callable[..., Any], names: Sequence[str]) -> Function:
    """`function` of tensors in the order of their names; what it returns is flat."""
    return lambda *tensors: tuple(flatten(function(**dict(zip(names, tensors, strict=True)))))


def loss_of(function: Function) -> Callable[..., Tensor]:
    """A number whose derivatives of every order depend on all results; -inf, of an empty set, is left out."""

    def loss(*tensors: Tensor) -> Tensor:
        total = tensors[0].new_zeros(())
        for result in function(*tensors):
            weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).reshape(result.shape)
            total = total + (result.masked_fill(result.isinf(), 0).square() * weights).sum().to(total.dtype)
        return total

    return loss


class Call:
    """A function with its tensors, tangents of them, and copies of both that vmap maps over."""

    def __init__(self, function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
        self.names = tuple(inputs)
        self.function = positional(function, self.names)
        self.loss = loss_of(self.function)
        self.x = tuple(tensor.detach() for tensor in inputs.values())
        generator = torch.Generator().manual_seed(1)

        def noise(tensor: Tensor, *shape: int) -> Tensor:
            return torch.randn(*shape, *tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

        self.dx = tuple(noise(tensor) for tensor in self.x)
        self.stacked = tuple(tensor + 0.3 * noise(tensor, COPIES) for tensor in self.x)
        self.all = tuple(range(len(self.x)))

    def copies(self, mapped: Callable[[str], bool]) -> tuple[Any, ...]:
        """The tensors, stacked where `mapped`, and the in_dims of vmap."""
        chosen = [mapped(name) for name in self.names]
        tensors = tuple(s if c else t for s, t, c in zip(self.stacked, self.x, chosen, strict=True))
        return tensors, tuple(0 if c else None for c in chosen)

    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors as leaves that require a gradient."""
        return tuple(tensor.clone().requires_grad_() for tensor in self.x)


def _is_data(name: str) -> bool:
    return name in DATA


def _is_weight(name: str) -> bool:
    return name not in DATA


def _gradient(call: Call, leaves: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call.loss(*leaves), leaves, materialize_grads=True, **options)


def _double_backward(call: Call) -> Any:
    leaves = call.leaves()
    gradients = _gradient(call, leaves, create_graph=True)
    penalty = sum((g.square().sum() for g in gradients), torch.zeros(()))
    return torch.autograd.grad(penalty, leaves, materialize_grads=True)


def _double_backward_of_one_input(call: Call) -> Any:
    """Only one input requires a gradient: the formulas compute what is needed and nothing else."""
    found: list[Tensor] = []
    for i in call.all:
        leaf = call.x[i].clone().requires_grad_()
        tensors = [leaf if j == i else tensor for j, tensor in enumerate(call.x)]
        (gradient,) = torch.autograd.grad(call.loss(*tensors), leaf, create_graph=True, materialize_grads=True)
        if gradient.requires_grad:
            found += torch.autograd.grad(gradient.square().sum(), leaf, materialize_grads=True)
    return found


def _dual_level(call: Call, leaves: Sequence[Tensor], *, of_gradients: bool) -> Any:
    with forward_ad.dual_level():
        make_dual: Any = forward_ad.make_dual
        unpack_dual: Any = forward_ad.unpack_dual
        duals = [make_dual(leaf, tangent) for leaf, tangent in zip(leaves, call.dx, strict=True)]
        results = call.function(*duals)
        if of_gradients:
            results = torch.autograd.grad(call.loss(*duals), leaves, materialize_grads=True)
        tangents = [unpack_dual(result).tangent for result in results]
        assert all(tangent is not None for tangent in tangents), "a tangent is missing"
        return tangents


def _no_grad_dual_level(call: Call) -> Any:
    with torch.no_grad():
        return _dual_level(call, call.x, of_gradients=False)


def _batched_gradients(call: Call) -> Any:
    leaves = call.leaves()
    result = call.function(*leaves)[0]
    seeds = torch.stack([result.detach() * (i + 1) for i in range(COPIES)])
    return torch.autograd.grad(result, leaves, seeds, is_grads_batched=True, materialize_grads=True)


def _functional_hessian(call: Call) -> Any:
    first, *others = call.x
    return torch.autograd.functional.hessian(lambda x: call.loss(x, *others), first)  # type: ignore[no-untyped-call]


def _vmap(call: Call, mapped: Callable[[str], bool], function: Any = None, **options: Any) -> Any:
    tensors, dims = call.copies(mapped)
    if all(dim is None for dim in dims):
        tensors, dims = call.stacked, (0,) * len(dims)
    return func.vmap(function or call.function, dims, **options)(*tensors)


def _vmap_last_dim(call: Call) -> Any:
    """A mapped dimension may be anywhere."""
    return func.vmap(call.function, -1, out_dims=-1)(*(tensor.movedim(0, -1) for tensor in call.stacked))


def _vmap_of_one(call: Call) -> Any:
    """Each input alone."""
    return [_vmap(call, lambda name, only=only: name == only) for only in call.names]  # type: ignore[misc]


def _vmap_of_vmap(call: Call) -> Any:
    """All pairs of a batch of weights and a batch of data."""
    _, weights = call.copies(_is_weight)
    _, data = call.copies(_is_data)
    inner = call.function if all(dim is None for dim in data) else func.vmap(call.function, data)
    return inner(*call.stacked) if all(dim is None for dim in weights) else func.vmap(inner, weights)(*call.stacked)


TRANSFORMS: dict[str, Callable[[Call], Any]] = {
    "backward": lambda call: _gradient(call, call.leaves()),
    "double backward": _double_backward,
    "double backward of one input": _double_backward_of_one_input,
    "is_grads_batched": _batched_gradients,
    "dual level": lambda call: _dual_level(call, call.leaves(), of_gradients=False),
    "dual level, no_grad": _no_grad_dual_level,
    "dual level of backward": lambda call: _dual_level(call, call.leaves(), of_gradients=True),
    "functional.hessian": _functional_hessian,
    "grad": lambda call: func.grad(call.loss, call.all)(*call.x),
    "vjp": lambda call: func.vjp(call.function, *call.x)[1](tuple(map(torch.nan_to_num, call.function(*call.x)))),
    "jvp": lambda call: func.jvp(call.function, call.x, call.dx),
    "jacrev": lambda call: func.jacrev(call.function, call.all)(*call.x),
    "jacfwd": lambda call: func.jacfwd(call.function, call.all)(*call.x),
    "hessian": lambda call: func.hessian(call.loss, call.all)(*call.x),
    "jacrev of jacrev": lambda call: func.jacrev(func.jacrev(call.loss, call.all), call.all)(*call.x),
    "jacrev of jacfwd": lambda call: func.jacrev(func.jacfwd(call.loss, call.all), call.all)(*call.x),
    "jacfwd of jacfwd": lambda call: func.jacfwd(func.jacfwd(call.loss, call.all), call.all)(*call.x),
    "jvp of grad": lambda call: func.jvp(func.grad(call.loss, call.all), call.x, call.dx),
    "grad of jvp": lambda call: func.grad(lambda *x: func.jvp(call.loss, x, call.dx)[1], call.all)(*call.x),
    "vmap": lambda call: _vmap(call, lambda name: True),
    "vmap of data": lambda call: _vmap(call, _is_data),
    "vmap of weights": lambda call: _vmap(call, _is_weight),
    "vmap of one input": _vmap_of_one,
    "vmap of the last dimension": _vmap_last_dim,
    "vmap of vmap": _vmap_of_vmap,
    "vmap, chunked": lambda call: _vmap(call, _is_data, chunk_size=2),
    "per-sample gradients": lambda call: _vmap(call, _is_data, func.grad(call.loss, call.all)),
    "vmap of grad of weights": lambda call: _vmap(call, _is_weight, func.grad(call.loss, call.all)),
    "vmap of jvp": lambda call: _vmap(call, _is_data, lambda *x: func.jvp(call.function, x, call.dx)),
    "vmap of hessian": lambda call: _vmap(call, _is_data, func.hessian(call.loss)),
    "grad of vmap": lambda call: func.grad(loss_of(lambda *x: flatten(func.vmap(call.function)(*x))), call.all)(
        *call.stacked
    ),
}


def check_transform(
    op: str, transform: str, functions: Sequence[Callable[..., Any]], inputs: Mapping[str, Tensor]
) -> None:
    """Compare a transform of a function with that of its reference, which computes in float64."""
    function, reference = functions
    doubles = {name: tensor.detach().double() for name, tensor in inputs.items()}
    dtype = next(iter(inputs.values())).dtype
    run = TRANSFORMS[transform]
    with warnings.catch_warnings():
        # The slow loop of vmap over an op without a rule.
        warnings.filterwarnings("error", message=".*batching rule.*")
        actual, expected = flatten(run(Call(function, inputs))), flatten(run(Call(reference, doubles)))
    assert len(actual) == len(expected) > 0
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"{op}_backward", a, b, f"{transform}, result {i}", dtype)


def check_derivatives(
    function: Callable[..., Any], inputs: Mapping[str, Tensor], *, batched_forward: bool = True
) -> None:
    """Compare derivatives of first and second order, in both modes and under vmap, with finite differences.

    `batched_forward`: also batches of tangents. The vmap of gradcheck has no rule for the product of a matrix and a
    vector that both have tangents; "jacfwd" has batches of them as well.
    """
    run, leaves = positional(function, tuple(inputs)), tuple(inputs.values())
    batched: dict[str, Any] = {"check_batched_grad": True, "fast_mode": True}
    assert gradcheck(run, leaves, check_forward_ad=True, check_batched_forward_grad=batched_forward, **batched)
    assert gradgradcheck(run, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, **batched)
