"""Comparing results and gradients with a float64 reference, within the table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from support.tolerances import tolerance


def flatten(results: object) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order; None is left out."""
    if results is None:
        return []
    if isinstance(results, Tensor):
        return [results]
    assert isinstance(results, Iterable), f"expected tensors, got {type(results).__name__}"
    return [tensor for item in results for tensor in flatten(item)]


def assert_close(
    op: str,
    actual: Tensor,
    expected: Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
) -> None:
    """Check shape and error against the row for `op` and `dtype` (default: that of `actual`), times `factor`."""
    assert actual.shape == expected.shape, f"{op}: {what} is {list(actual.shape)}, not {list(expected.shape)}"
    if actual.numel() == 0:
        return
    a, b = actual.detach().double(), expected.detach().double()
    infinite = b.isinf()
    assert torch.equal(a[infinite], b[infinite]), f"{op}: {what} differs where {b[infinite]} is expected"
    a, b = a[~infinite], b[~infinite]
    assert a.isfinite().all(), f"{op}: {what} holds NaN or infinity"
    if a.numel() == 0:
        return
    error = (a - b).abs().max().item()
    allowed = factor * tolerance(op, dtype or actual.dtype, actual.device.type) * max(1.0, b.abs().max().item())
    assert error <= allowed, f"{op}: {what} is off by {error:.3g}, allowed {allowed:.3g}"


def assert_all_close(op: str, actual: object, expected: object, what: str = "result") -> None:
    """`assert_close` for the tensors of two nested tuples, in order."""
    for i, (a, b) in enumerate(zip(flatten(actual), flatten(expected), strict=True)):
        assert_close(op, a, b, f"{what} {i}")


def assert_same_bits(actual: object, expected: object) -> None:
    """The tensors of two nested tuples are equal, bit by bit."""
    for a, b in zip(flatten(actual), flatten(expected), strict=True):
        assert torch.equal(a, b)


def in_double(value: Any) -> Any:
    """`value` with its floating tensors, also those in tuples, lists and dicts, as float64."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: in_double(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(in_double(item) for item in value)
    return value


def compare(
    op: str,
    functions: Sequence[Callable[..., tuple[Tensor, ...]]],
    inputs: Mapping[str, Tensor],
    *,
    gradients: bool = True,
    factor: float = 1.0,
) -> None:
    """Compare results and gradients of `functions`, a function and its reference; the latter computes in float64.

    Both are called with `inputs` by name. `gradients`: also compare those of every input that requires one. A gradient
    stored more precisely than the first input is compared at that input's precision, because it was computed from
    results rounded to it. `factor` multiplies the tolerances.
    """
    function, reference = functions
    dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    doubles = {name: in_double(t).requires_grad_(t.requires_grad) for name, t in inputs.items()}
    actual, expected = function(**inputs), reference(**doubles)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(op, a, b, f"result {i}", factor=factor)
    used = [i for i, b in enumerate(expected) if b.requires_grad]
    if not used or not gradients:
        return
    seeds = [torch.randn_like(expected[i]).to(actual[i].dtype) for i in used]
    names = [name for name, t in inputs.items() if t.requires_grad]

    def differentiate(results: tuple[Tensor, ...], leaves: Mapping[str, Tensor], seeds: list[Tensor]) -> Any:
        return torch.autograd.grad(
            [results[i] for i in used], [leaves[n] for n in names], seeds, allow_unused=True, materialize_grads=True
        )

    actual_gradients = differentiate(actual, inputs, seeds)
    expected_gradients = differentiate(expected, doubles, [seed.double() for seed in seeds])
    for name, a, b in zip(names, actual_gradients, expected_gradients, strict=True):
        assert_close(f"{op}_backward", a, b, f"gradient of {name}", dtype, factor)


def outputs_and_gradients(
    function: Callable[..., object],
    arguments: Mapping[str, Tensor | None],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name, of function(**arguments), under the same random weights in every call.

    With `dtype`, floating arguments are converted first. A gradient that does not exist counts as zero.
    """

    def prepare(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        # detach, not clone: the strides of the argument belong to the case.
        tensor = tensor.detach()
        return (tensor if dtype is None else tensor.to(dtype)).requires_grad_()

    prepared = {name: prepare(tensor) for name, tensor in arguments.items()}
    outputs = flatten(function(**prepared))
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        # The log-sum-exp of an empty set is -inf, which a loss cannot use.
        loss = loss + (output * weights).masked_fill(output.isinf(), 0).sum()
    leaves = {name: t for name, t in prepared.items() if t is not None and t.requires_grad}
    if not loss.requires_grad:  # empty results need not depend on anything
        return outputs, {name: torch.zeros_like(t) for name, t in leaves.items()}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return outputs, dict(zip(leaves, gradients, strict=True))


def check_gradients(function: Callable[..., object], inputs: Mapping[str, Tensor]) -> None:
    """torch.autograd.gradcheck for a function that takes tensors by name."""
    names = list(inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(function(**dict(zip(names, tensors, strict=True)))))

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def check_wanted_gradients(function: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, Tensor]) -> None:
    """The gradient of one input alone equals, bit by bit, its gradient when all inputs require one."""
    count = len(function(**inputs))
    for i in range(count):
        whole = torch.autograd.grad(function(**inputs)[i].square().sum(), list(inputs.values()), allow_unused=True)
        for (name, leaf), expected in zip(inputs.items(), whole, strict=True):
            if expected is None:
                continue
            alone = {n: t if n == name else t.detach() for n, t in inputs.items()}
            (gradient,) = torch.autograd.grad(function(**alone)[i].square().sum(), leaf)
            assert torch.equal(gradient, expected), f"gradient of {name}"


def check_same_bits(function: Callable[..., tuple[Tensor, ...]], inputs: Mapping[str, Tensor]) -> None:
    """Two calls give the same bits, results and gradients."""
    runs = []
    for _ in range(2):
        outputs = function(**inputs)
        gradients = torch.autograd.grad([t.sum() for t in outputs], list(inputs.values()))
        runs.append((outputs, gradients))
    assert_same_bits(*runs)


def root_mean_square_errors(results: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    """Root mean square error of each result against a float64 one."""
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(results, expected, strict=True)]
