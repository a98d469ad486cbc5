"""ops.linear and ops.linear_argmax against torch.nn.functional.linear."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import target
from support.comparison import (
    assert_close,
    assert_same_bits,
    check_gradients,
    check_same_bits,
    compare,
    root_mean_square_errors,
)
from support.devices import num_threads
from support.inputs import leaf, noncontiguous
from support.pairwise import parametrize_pairwise
from support.tolerances import DTYPES, HALF_DTYPES
from torch import Tensor

from llm_ext import ops

# Empty, one, odd; dot products, one above MR (6), above NR (4) and a vector (16), many tiles; packed weights, which
# are for more than 24 rows.
SIZES = [  # N, I, O
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 1, 1),
    (1, 33, 17),
    (1, 40, 9),
    (2, 5, 3),
    (7, 17, 5),
    (13, 64, 33),
    (17, 16, 50),
    (31, 33, 65),
    (64, 20, 129),
    (100, 35, 250),
    (31, 0, 65),
    (25, 33, 17),
    (129, 33, 65),
    (500, 70, 130),
]


def linear_inputs(N: int, I: int, O: int, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor]:  # noqa: E741
    inputs = {"x": leaf(N, I, dtype=dtype), "weight": leaf(O, I, dtype=dtype, scale=max(I, 1) ** -0.5)}
    return inputs | ({"bias": leaf(O, dtype=dtype)} if bias else {})


def llm_ext_linear(**inputs: Tensor) -> tuple[Tensor]:
    return (target.ops.linear(**inputs),)


def torch_linear(**inputs: Tensor) -> tuple[Tensor]:
    return (F.linear(**inputs),)


FUNCTIONS = (llm_ext_linear, torch_linear)


@parametrize_pairwise(sizes=SIZES, dtype=DTYPES, bias=(True, False))
def test_reference(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    compare("linear", FUNCTIONS, linear_inputs(*sizes, dtype, bias))


@given(
    sizes=st.tuples(st.integers(0, 300), st.integers(0, 90), st.integers(0, 150)),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    compare("linear", FUNCTIONS, linear_inputs(*sizes, dtype=dtype, bias=bias))


@pytest.mark.parametrize("N", [100, 1000])
def test_rounding_is_close_to_that_of_torch(N: int) -> None:
    """With packed weights a dot product is one chain of multiply-adds; torch starts a new one every few hundred."""
    inputs = {name: t.detach() for name, t in linear_inputs(N, 1024, 300, torch.float32).items()}
    expected = torch_linear(**{name: t.double() for name, t in inputs.items()})
    ours, theirs = (root_mean_square_errors(f(**inputs), expected) for f in FUNCTIONS)
    assert ours[0] <= 3 * theirs[0]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (2, 0, 5), (3, 2, 1, 4, 5)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    inputs = linear_inputs(1, 5, 7, torch.float64) | {"x": leaf(*shape, dtype=torch.float64)}
    compare("linear", FUNCTIONS, inputs)
    indices = ops.linear_argmax(**inputs | {"x": noncontiguous(inputs["x"].detach())})
    assert indices.shape == shape[:-1]
    assert torch.equal(indices, F.linear(**inputs).argmax(-1))


@pytest.mark.parametrize("N", [5, 200])
def test_layouts(N: int) -> None:
    inputs = {
        name: noncontiguous(t.detach()).requires_grad_() for name, t in linear_inputs(N, 19, 21, torch.float64).items()
    }
    assert not any(t.is_contiguous() for t in inputs.values())
    compare("linear", FUNCTIONS, inputs)
    expanded = torch.randn(19, 1, dtype=torch.float64).t().expand(N, 19)
    assert_close("linear", ops.linear(expanded, inputs["weight"]), F.linear(expanded, inputs["weight"]))


@pytest.mark.parametrize("N", [3, 140])
def test_gradcheck(N: int) -> None:
    check_gradients(ops.linear, linear_inputs(N, 3, 2, torch.float64))


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_only_wanted_gradients(needs: tuple[bool, bool, bool]) -> None:
    inputs = linear_inputs(150, 30, 20, torch.float64)
    expected = torch.autograd.grad(F.linear(**inputs).square().sum(), list(inputs.values()))
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs.values(), needs, strict=True)]
    y = ops.linear(*leaves)
    assert y.requires_grad == any(needs)
    if any(needs):
        torch.autograd.backward(y.square().sum())
    for each, gradient, need in zip(leaves, expected, needs, strict=True):
        assert (each.grad is not None) == need
        if each.grad is not None:
            assert_close("linear_backward", each.grad, gradient)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int) -> None:
    """More threads than cores, rows or columns: the same results within rounding, and the same bits when repeated."""
    with num_threads(threads):
        for N, I, O in ((1, 300, 700), (20, 300, 200), (300, 200, 100), (3000, 10, 7), (129, 700, 300)):  # noqa: E741
            inputs = linear_inputs(N, I, O, torch.float64)
            compare("linear", FUNCTIONS, inputs)
            check_same_bits(llm_ext_linear, inputs)


@parametrize_pairwise(sizes=[sizes for sizes in SIZES if sizes[2] > 0], dtype=DTYPES, bias=(True, False))
def test_argmax(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    inputs = linear_inputs(*sizes, dtype, bias)
    indices = ops.linear_argmax(**inputs)
    assert not indices.requires_grad
    assert torch.equal(indices, ops.linear(**inputs).argmax(-1))


@given(
    sizes=st.tuples(st.integers(0, 90), st.integers(0, 4), st.integers(1, 150)),
    numbers=st.sampled_from([2, 3, 1000]),
    threads=st.integers(1, 3),
)
def test_argmax_of_ties_is_the_first(sizes: tuple[int, int, int], numbers: int, threads: int) -> None:
    """Products of whole numbers are exact; with few different ones, most of a row is equal."""
    N, I, O = sizes  # noqa: E741
    x, w = (torch.randint(numbers, size) * 1.0 for size in ((N, I), (O, I)))
    b = torch.where(torch.rand(O) < 0.3, -torch.inf, torch.randint(numbers, (O,)))
    with num_threads(threads):
        indices = ops.linear_argmax(x, w, b)
    scores = F.linear(x, w, b)
    first = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(indices, first)


@pytest.mark.parametrize("sizes", [(3, 5, 40), (100, 5, 40)])
def test_argmax_of_nan(sizes: tuple[int, int, int]) -> None:
    """NaN counts as the largest, as in torch; -inf everywhere gives the first index."""
    inputs = {name: t.detach() for name, t in linear_inputs(*sizes, dtype=torch.float32).items()}
    inputs["bias"][:2] = torch.inf
    for column in (0, 17, 39):
        bias = inputs["bias"].clone()
        bias[column] = torch.nan
        assert (ops.linear_argmax(**inputs | {"bias": bias}) == column).all()
    inputs["x"][1] = torch.nan
    indices = ops.linear_argmax(**inputs)
    assert indices[0] == 0
    assert 0 <= indices[1] < sizes[2]
    assert (ops.linear_argmax(inputs["x"][:1], inputs["weight"], torch.full((sizes[2],), -torch.inf)) == 0).all()


def test_argmax_refuses_empty_or_huge_weights() -> None:
    for rows in (0, 2**31):
        weight = torch.zeros(1, 4).expand(rows, 4) if rows else torch.zeros(0, 4)
        with pytest.raises(ValueError, match=rf"weight must have from 1 to 2\^31 - 1 rows, got \[{rows}, 4\]"):
            ops.linear_argmax(torch.zeros(2, 4), weight)
    with pytest.raises(ValueError, match=r"linear_argmax: x must be \[\*, I\] = \[\*, 4\], got \[2, 3\]"):
        ops.linear_argmax(torch.zeros(2, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_16_bits_use_torch(dtype: torch.dtype) -> None:
    inputs = linear_inputs(5, 6, 7, dtype)
    assert_same_bits(llm_ext_linear(**inputs), torch_linear(**inputs))
    assert torch.equal(ops.linear_argmax(**inputs), F.linear(**inputs).argmax(-1))


def test_autocast() -> None:
    inputs = linear_inputs(5, 6, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(**inputs)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(**inputs))


X, W, B = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[..., :3], W, B), ValueError, r"linear: x must be \[\*, I\] = \[\*, \*, 4\], got \[2, 3, 3\]"),
        ((X[0, 0, 0], W, B), ValueError, r"linear: x must be \[\*, I\] = \[4\], got \[\]"),
        ((X, W[0], B), ValueError, r"linear: weight must be \[O, I\] = \[\*, \*\], got \[4\]"),
        ((X, W, B[:4]), ValueError, r"linear: bias must be \[O\] = \[5\], got \[4\]"),
        ((X, W.double(), B), TypeError, "linear: x must be float64, got float32"),
        ((X, W, B.double()), TypeError, "linear: bias must be float32, got float64"),
        ((X, None, B), TypeError, "linear: weight must be a Tensor, got NoneType"),
    ],
)
def test_bad_arguments(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.linear(*arguments)
