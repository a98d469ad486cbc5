"""Additive attention: inputs, the op and its reference as functions of named tensors, and checks for any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support import target
from support.comparison import assert_same_bits, compare
from support.inputs import leaf, noncontiguous

OP = "additive_attention"
# Empty, one, odd, and one above a block of registers (4), a vector (16) and a block of queries (16); several blocks.
SIZES = [  # B, Tq, Tk, A, Dv
    (0, 2, 3, 4, 5),
    (2, 0, 3, 4, 5),
    (2, 3, 0, 4, 5),
    (2, 3, 4, 0, 5),
    (2, 3, 4, 5, 0),
    (1, 1, 1, 1, 1),
    (3, 5, 7, 17, 9),
    (2, 17, 33, 33, 20),
    (4, 1, 66, 130, 64),
    (5, 10, 17, 65, 33),
    (1, 40, 130, 48, 17),
]
SELECTIONS = ("none", "lengths", "mask", "mask of each query", "both")


def additive_inputs(
    B: int, Tq: int, Tk: int, A: int, Dv: int, dtype: torch.dtype, *, device: str = "cpu"
) -> dict[str, Tensor]:
    return {
        "query": leaf(B, Tq, A, dtype=dtype, device=device),
        "keys": leaf(B, Tk, A, dtype=dtype, device=device),
        "v": leaf(A, dtype=dtype, scale=2 * max(A, 1) ** -0.5, device=device),
        "values": leaf(B, Tk, Dv, dtype=dtype, device=device),
    }


def key_selection(kind: str, B: int, Tq: int, Tk: int, device: str = "cpu") -> dict[str, Tensor]:
    """The arguments that select keys, one of SELECTIONS."""
    lengths = torch.randint(0, Tk + 1, (B,), device=device)
    mask, of_each_query = torch.rand(B, Tk, device=device) < 0.5, torch.rand(B, Tq, Tk, device=device) < 0.5
    selections: dict[str, dict[str, Tensor]] = {
        "none": {},
        "lengths": {"key_lengths": lengths},
        "mask": {"mask": mask},
        "mask of each query": {"mask": of_each_query},
        "both": {"key_lengths": lengths, "mask": of_each_query},
    }
    return selections[kind]


def additive_functions(**options: Any) -> list[Callable[..., tuple[Tensor, ...]]]:
    """The op and its reference, returning (context,) or (context, weights)."""

    def bind(module: Any) -> Callable[..., tuple[Tensor, ...]]:
        def run(query: Tensor, keys: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            results = module.additive_attention(query, keys, v, values, **options)
            return tuple(result for result in results if result is not None)

        return run

    return [bind(target.ops), bind(target.reference)]


# ---- checks that run on every device, and on CUDA ops in the emulator


def check_reference(sizes: tuple[int, ...], dtype: torch.dtype, kind: str, device: str = "cpu") -> None:
    for need_weights in (False, True):
        B, Tq, Tk, A, Dv = sizes
        inputs = additive_inputs(B, Tq, Tk, A, Dv, dtype, device=device)
        selection = key_selection(kind, B, Tq, Tk, device)
        compare(OP, additive_functions(need_weights=need_weights, **selection), inputs)


def check_cancellation(dtype: torch.dtype, size: float, device: str = "cpu") -> None:
    """Queries and keys of any size that nearly cancel, beside rows that are small."""
    inputs = additive_inputs(2, 19, 21, 37, 5, dtype, device=device)
    offset = size * torch.randn(2, 1, 37, device=device).sign().to(dtype)
    with torch.no_grad():
        inputs["query"][:, ::2] += offset
        inputs["keys"][:, ::3] -= offset
        inputs["keys"][:, 1, :5] -= 3 * size
        inputs["query"][:, 3, 3:20] = 0
    compare(OP, additive_functions(need_weights=True), inputs)


def check_layouts(device: str = "cpu") -> None:
    """Gaps, swapped strides and expanded gradients change nothing."""
    contiguous = additive_inputs(3, 5, 9, 19, 6, torch.float32, device=device)
    mask, lengths = torch.rand(3, 5, 9, device=device) < 0.7, torch.tensor([9, 4, 0], device=device)
    function = additive_functions(need_weights=True, mask=mask, key_lengths=lengths)[0]
    strided = {"mask": mask.mT.contiguous().mT, "key_lengths": lengths.repeat(2, 1).T[:, 0]}
    on_gaps = additive_functions(need_weights=True, **strided)[0]
    with_gaps = {name: noncontiguous(t.detach()) for name, t in contiguous.items()}
    assert_same_bits(function(**contiguous), on_gaps(**with_gaps))
    context = function(**contiguous)[0]
    from_sum = torch.autograd.grad(context.sum(), contiguous["keys"], retain_graph=True)[0]
    transposed = torch.ones(6, 5, 3, device=device).permute(2, 1, 0)
    assert torch.equal(from_sum, torch.autograd.grad(context, contiguous["keys"], transposed)[0])


def check_masked_keys(garbage: float, device: str = "cpu") -> None:
    """Keys that no query attends to may hold anything: neither results nor gradients depend on them."""
    for Tq in (1, 4):
        inputs = additive_inputs(3, Tq, 9, 18, 7, torch.float32, device=device)
        mask = torch.rand(3, Tq, 9, device=device) < 0.5
        lengths = torch.tensor([9, 5, 0], device=device)
        masked = ~(mask & (torch.arange(9, device=device) < lengths[:, None, None])).any(1)
        dirty = dict(inputs)
        for name in ("keys", "values"):
            dirty[name] = inputs[name].detach().masked_fill(masked[..., None], garbage).requires_grad_()
        function = additive_functions(mask=mask, key_lengths=lengths, need_weights=True)[0]
        clean_results, dirty_results = function(**inputs), function(**dirty)
        assert_same_bits(clean_results, dirty_results)
        clean_gradients, dirty_gradients = (
            torch.autograd.grad([r.square().sum() for r in results], list(given.values()))
            for results, given in ((clean_results, inputs), (dirty_results, dirty))
        )
        assert_same_bits(clean_gradients, dirty_gradients)
        assert not dirty_gradients[1][masked].any()
        assert not dirty_gradients[3][masked].any()


def check_empty_rows(device: str = "cpu") -> None:
    """A query without an attended key gives zeros, and finite gradients that are zero where nothing was used."""
    inputs = additive_inputs(3, 4, 5, 6, 7, torch.float32, device=device)
    mask = torch.ones(3, 4, 5, dtype=torch.bool, device=device)
    mask[0, 1] = False
    lengths = torch.tensor([5, 0, 2], device=device)
    context, weights = additive_functions(mask=mask, key_lengths=lengths, need_weights=True)[0](**inputs)
    for result in (context, weights):
        assert not result[0, 1].any()
        assert not result[1].any()
        assert result.isfinite().all()
    gradients = torch.autograd.grad((context + weights.sum(-1, keepdim=True)).square().sum(), list(inputs.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, 1].any()
    for i in (0, 1, 3):
        assert not gradients[i][1].any()


def check_nan_and_infinity(value: float, device: str = "cpu") -> None:
    """As in torch: NaN spreads, tanh of infinity is 1, and infinities that cancel are NaN."""
    for Tq in (1, 3):
        inputs = {n: t.detach() for n, t in additive_inputs(2, Tq, 4, 18, 5, torch.float32, device=device).items()}
        inputs["query"][0, -1, 17] = value
        inputs["keys"][1, 2, 3] = -value
        inputs["query"][1, 0, 3] = value
        (actual,), (expected,) = (f(**inputs) for f in additive_functions())
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert actual[1, 0].isnan().all()
        assert actual[0, :-1].isfinite().all()
        assert math.isnan(value) == bool(actual[0, -1].isnan().any())


def check_scores_of_any_size(device: str = "cpu") -> None:
    """Weights are exact however large the scores are: where tanh is 1 or -1, the scores are sums of v."""
    for size in (1e3, 1e6, 1e8):
        for Tq in (1, 3):
            inputs = additive_inputs(2, Tq, 50, 8, 5, torch.float32, device=device)
            with torch.no_grad():
                inputs["query"].zero_()
                inputs["keys"].copy_(30 * inputs["keys"].sign())[..., 0] = 30
                inputs["v"].copy_(torch.tensor([size, 0.5, 0.25, 0.125, 1, -0.5, 2, -1], device=device))
                if size > 1e6:  # beside it the others would be rounded away: equal scores
                    inputs["v"][1:] = 0
            compare(OP, additive_functions(need_weights=True), inputs)


# ---- arguments for torch.library.opcheck


def additive_opcheck_cases() -> list[tuple[str, tuple[object, ...]]]:
    """(op, arguments): optional arguments given and absent, a 16-bit dtype, wanted gradients."""
    given = tuple(additive_inputs(3, 4, 5, 6, 7, torch.float64).values())
    low = tuple(additive_inputs(3, 4, 5, 6, 7, torch.bfloat16).values())
    fixed = tuple(t.detach() for t in given)
    lengths, mask, of_each_query = torch.tensor([5, 2, 0]), torch.rand(3, 5) < 0.7, torch.rand(3, 4, 5) < 0.7
    context, weights = torch.randn(3, 4, 7).double(), torch.rand(3, 4, 5).double()
    forward, backward = "additive_attention_forward", "additive_attention_backward"
    return [
        (forward, (*given, None, None, False)),
        (forward, (*given, lengths, mask, True)),
        (forward, (*given, None, of_each_query, True)),
        (forward, (*low, lengths, None, True)),
        (backward, (context, weights, *fixed, lengths, of_each_query, *[True] * 4)),
        (backward, (context, None, *fixed, None, None, *[False, True] * 2)),
        (backward, (None, weights, *fixed, None, None, *[True, False] * 2)),
    ]
