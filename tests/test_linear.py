"""Affine maps: the op and the layer against torch.nn."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, HALF_DTYPES, assert_close, at_lower_levels, run_tests_at, spread
from hypothesis import given
from hypothesis import strategies as st
from recurrences import compare, leaf
from torch import Tensor, nn

import llm_ext
from llm_ext import ops

# Nothing, one, odd; by dot products, one above a tile of rows (6), of columns (4) and a vector (16), many tiles; with
# packed weights, which are for more than 24 rows and half of the columns.
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


def inputs_of(N: int, I: int, O: int, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor]:  # noqa: E741
    inputs = {
        "x": leaf(N, I, dtype=dtype),
        "weight": leaf(O, I, dtype=dtype, scale=max(I, 1) ** -0.5),
    }
    return inputs | ({"bias": leaf(O, dtype=dtype)} if bias else {})


def ours(**inputs: Tensor) -> tuple[Tensor]:
    return (ops.linear(**inputs),)


def theirs(**inputs: Tensor) -> tuple[Tensor]:
    return (F.linear(**inputs),)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "I", "O"), SIZES)
def test_is_that_of_torch(N: int, I: int, O: int, dtype: torch.dtype, bias: bool) -> None:  # noqa: E741
    compare("linear", ours, theirs, inputs_of(N, I, O, dtype, bias))


@given(sizes=st.tuples(st.integers(0, 300), st.integers(0, 90), st.integers(0, 150)), bias=st.booleans())
def test_any_size(sizes: tuple[int, int, int], bias: bool) -> None:
    compare("linear", ours, theirs, inputs_of(*sizes, dtype=torch.float64, bias=bias))


@pytest.mark.parametrize("N", [100, 1000])
def test_rounds_about_as_much_as_torch(N: int) -> None:
    """Packed, a dot product is one chain of multiply-adds; that of torch begins a new one every few hundred."""
    inputs = {name: t.detach() for name, t in inputs_of(N, 1024, 300, torch.float32).items()}
    truth = F.linear(**{name: t.double() for name, t in inputs.items()})
    errors = [(f(**inputs)[0] - truth).square().mean().sqrt().item() for f in (ours, theirs)]
    assert errors[0] <= 3 * errors[1]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (2, 0, 5), (3, 2, 1, 4, 5)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    compare("linear", ours, theirs, inputs_of(1, 5, 7, torch.float64) | {"x": leaf(*shape, dtype=torch.float64)})


@pytest.mark.parametrize("N", [5, 200])
def test_memory_with_holes(N: int) -> None:
    inputs = {name: spread(t.detach()).requires_grad_() for name, t in inputs_of(N, 19, 21, torch.float64).items()}
    assert not any(t.is_contiguous() for t in inputs.values())
    compare("linear", ours, theirs, inputs)
    expanded = torch.randn(19, 1, dtype=torch.float64).t().expand(N, 19)
    assert_close("linear", ops.linear(expanded, inputs["weight"]), F.linear(expanded, inputs["weight"]))


@pytest.mark.parametrize("N", [3, 140])
def test_gradcheck(N: int) -> None:
    inputs = tuple(inputs_of(N, 3, 2, torch.float64).values())
    assert torch.autograd.gradcheck(ops.linear, inputs)


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)))
def test_only_the_gradients_that_are_wanted(needs: tuple[bool, bool, bool]) -> None:
    inputs = inputs_of(150, 30, 20, torch.float64)
    truths = torch.autograd.grad(F.linear(**inputs).square().sum(), list(inputs.values()))
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs.values(), needs, strict=True)]
    y = ops.linear(*leaves)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.square().sum().backward()
    for each, truth, need in zip(leaves, truths, needs, strict=True):
        if need:
            assert each.grad is not None
            assert_close("linear_backward", each.grad, truth)
        else:
            assert each.grad is None


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than cores, rows or columns: the same results (in rounding), the same bits in a second call."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for N, I, O in ((1, 300, 700), (20, 300, 200), (300, 200, 100), (3000, 10, 7), (129, 700, 300)):  # noqa: E741
            inputs = inputs_of(N, I, O, torch.float64)
            compare("linear", ours, theirs, inputs)
            runs = []
            for _ in range(2):
                y = ops.linear(**inputs)
                runs.append((y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))))
            for a, b in zip(*runs, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "I", "O"), [sizes for sizes in SIZES if sizes[2] > 0])
def test_argmax_of_any_size(N: int, I: int, O: int, dtype: torch.dtype, bias: bool) -> None:  # noqa: E741
    inputs = inputs_of(N, I, O, dtype, bias)
    places = ops.linear_argmax(**inputs)
    assert not places.requires_grad
    assert torch.equal(places, ops.linear(**inputs).argmax(-1))


@given(
    sizes=st.tuples(st.integers(0, 90), st.integers(0, 4), st.integers(1, 150)),
    numbers=st.sampled_from([2, 3, 1000]),
    threads=st.integers(1, 3),
)
def test_argmax_of_equals_is_the_first_of_any_size(sizes: tuple[int, int, int], numbers: int, threads: int) -> None:
    """Of whole numbers, products of which are exact: with few of them, most of a row is equal."""
    N, I, O = sizes  # noqa: E741
    x, w = (torch.randint(numbers, size) * 1.0 for size in ((N, I), (O, I)))
    b = torch.where(torch.rand(O) < 0.3, -torch.inf, torch.randint(numbers, (O,)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        places = ops.linear_argmax(x, w, b)
    finally:
        torch.set_num_threads(before)
    scores = F.linear(x, w, b)
    first = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(places, first)


@pytest.mark.parametrize("size", [(3, 5, 40), (100, 5, 40)])
def test_argmax_takes_what_is_no_number(size: tuple[int, int, int]) -> None:
    inputs = {name: t.detach() for name, t in inputs_of(*size, dtype=torch.float32).items()}
    inputs["bias"][:2] = torch.inf
    for column in (0, 17, 39):
        bias = inputs["bias"].clone()
        bias[column] = torch.nan
        assert (ops.linear_argmax(**inputs | {"bias": bias}) == column).all()
    inputs["x"][1] = torch.nan
    places = ops.linear_argmax(**inputs)
    assert places[0] == 0
    assert 0 <= places[1] < size[2]
    assert (ops.linear_argmax(inputs["x"][:1], inputs["weight"], torch.full((size[2],), -torch.inf)) == 0).all()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (2, 0, 5)])
def test_argmax_with_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    inputs = inputs_of(1, 5, 7, torch.float64) | {"x": spread(torch.randn(*shape, dtype=torch.float64))}
    places = ops.linear_argmax(**inputs)
    assert places.shape == shape[:-1]
    assert torch.equal(places, F.linear(**inputs).argmax(-1))


def test_argmax_of_nothing_or_too_much_is_refused() -> None:
    for rows in (0, 2**31):
        with pytest.raises(ValueError, match=rf"weight must have from 1 to 2\^31 - 1 rows, got \[{rows}, 4\]"):
            ops.linear_argmax(torch.zeros(2, 4), torch.zeros(1, 4).expand(rows, 4) if rows else torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"linear_argmax: x must be \[\*, I\] = \[\*, 4\], got \[2, 3\]"):
        ops.linear_argmax(torch.zeros(2, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_sixteen_bits_are_left_to_torch(dtype: torch.dtype) -> None:
    inputs = inputs_of(5, 6, 7, dtype)
    assert torch.equal(ours(**inputs)[0], theirs(**inputs)[0])
    assert torch.equal(ops.linear_argmax(**inputs), F.linear(**inputs).argmax(-1))


def test_autocast() -> None:
    inputs = inputs_of(5, 6, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear(**inputs)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(**inputs))


def opcheck_arguments() -> list[tuple[str, tuple[object, ...]]]:
    x, w, b = inputs_of(6, 4, 5, torch.float64).values()
    cube = leaf(2, 3, 4, dtype=torch.float64)
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    fixed = cube.detach(), w.detach()
    return [
        ("linear_forward", (x, w, b)),
        ("linear_forward", (cube, w, None)),
        ("linear_argmax", (x.detach(), w.detach(), b.detach())),
        ("linear_argmax", (cube.detach(), w.detach(), None)),
        ("linear_backward", (grad, *fixed, True, True, True)),
        ("linear_backward", (grad, *fixed, False, True, False)),
        ("linear_backward", (grad, *fixed, True, False, True)),
    ]


@pytest.mark.parametrize(("op", "arguments"), opcheck_arguments(), ids=lambda a: a if isinstance(a, str) else "")
def test_opcheck(op: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.llm_ext, op).default, arguments)


def test_compiles_as_one_graph() -> None:
    inputs = inputs_of(6, 4, 5, torch.float64)
    compiled = torch.compile(ops.linear, fullgraph=True)
    compare("linear", lambda **given: (compiled(**given),), theirs, inputs)


def test_second_derivatives_are_refused() -> None:
    x, w, b = inputs_of(6, 4, 5, torch.float64).values()
    (dx,) = torch.autograd.grad(ops.linear(x, w, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()


def test_layer_takes_the_place_of_torch_nn() -> None:
    layer, other = llm_ext.Linear(30, 20, dtype=torch.float64), nn.Linear(30, 20, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 30, dtype=torch.float64)
    assert_close("linear", layer(x), other(x))
    assert repr(layer) == repr(other)
    without = llm_ext.Linear(3, 2, bias=False)
    assert without.bias is None
    assert_close("linear", without(x[..., :3].float()), F.linear(x[..., :3].float(), without.weight))


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


@at_lower_levels
def test_lower_levels(level: str) -> None:
    """The tests of the kernels again."""
    run_tests_at(level, __file__, "torch or size or threads or gradcheck")
