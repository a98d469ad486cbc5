"""ops.attention_pool and ops.prefix_pool against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.comparison import assert_close, assert_same_bits, check_gradients, check_same_bits, compare
from support.devices import every_device, num_threads
from support.pairwise import parametrize_pairwise
from support.pooling import (
    check_empty_rows,
    check_infinite_scores,
    check_large_scores,
    check_layouts,
    check_masked_positions,
    check_outweighing_state,
    check_pool,
    check_precision,
    check_scores_of_any_size,
    check_time_major,
    op_name,
    pool_functions,
    pool_inputs,
)
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES

from llm_ext import ops

SIZES = [  # B, T, D
    (0, 4, 5),
    (2, 0, 5),
    (3, 4, 0),
    (1, 1, 1),
    (3, 5, 7),
    (2, 9, 64),
    (4, 17, 130),
    (1, 100, 33),
    (3, 40, 1000),
    (1, 300, 520),
    (1, 1100, 65),
]
every_pool = pytest.mark.parametrize("prefix", [False, True], ids=op_name)


@every_device
@every_pool
@parametrize_pairwise(sizes=SIZES, dtype=ALL_DTYPES)
def test_reference(sizes: tuple[int, int, int], dtype: torch.dtype, prefix: bool, device: str) -> None:
    check_pool(*sizes, dtype, prefix, device)


@every_pool
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 70), st.integers(1, 150)),
    dtype=st.sampled_from(DTYPES),
    folded=st.booleans(),
    state=st.booleans(),
    selection=st.sampled_from(["none", "lengths", "mask", "both"]),
)
def test_any_size(
    prefix: bool, sizes: tuple[int, int, int], dtype: torch.dtype, folded: bool, state: bool, selection: str
) -> None:
    B, T, D = sizes
    options: dict[str, Any] = {}
    if selection in ("lengths", "both"):
        options["lengths"] = torch.randint(0, T + 1, (B,))
    if selection in ("mask", "both"):
        options["mask"] = torch.rand(B, T) < 0.5
    inputs = pool_inputs(B, T, D, dtype, folded=folded, state=state and prefix)
    compare(op_name(prefix), pool_functions(prefix, **options), inputs)


@every_device
@every_pool
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_time_major(dtype: torch.dtype, prefix: bool, device: str) -> None:
    check_time_major(dtype, prefix, device)


@every_pool
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_layouts(dtype: torch.dtype, prefix: bool) -> None:
    check_layouts(dtype, prefix)


@parametrize_pairwise(
    sizes=((100, 9, 7), (50, 100, 33), (20, 200, 130)), folded=(False, True), dtype=HALF_DTYPES, prefix=(False, True)
)
def test_precision_in_16_bits(sizes: tuple[int, int, int], folded: bool, dtype: torch.dtype, prefix: bool) -> None:
    check_precision(*sizes, folded, dtype, prefix)


def test_prefix_pool_beyond_the_caches() -> None:
    """Inputs larger than every cache, with results in fresh memory."""
    B, T, D = 3, 5600, 512
    e, u = torch.randn(B, T, D), torch.randn(D) / 20
    weights = torch.exp((e @ u).double())[..., None]
    c, _ = ops.prefix_pool(e, u)
    assert_close("prefix_pool", c, (weights * e).cumsum(1) / weights.cumsum(1))
    e.requires_grad_()
    c, _ = ops.prefix_pool(e, u)
    (grad,) = torch.autograd.grad(c[:, -1].sum(), e)
    alpha = weights / weights.sum(1, keepdim=True)
    assert_close("prefix_pool_backward", grad, alpha * (1 + u * (e - c[:, -1:]).sum(-1, keepdim=True)))


@every_device
@every_pool
def test_masked_positions_may_hold_nan(prefix: bool, device: str) -> None:
    check_masked_positions(prefix, device)


@every_pool
@pytest.mark.parametrize("folded", [False, True])
def test_nan_propagates(prefix: bool, folded: bool) -> None:
    """Where every number of a row is NaN, too: that row is not masked."""
    inputs = {name: t.detach() for name, t in pool_inputs(3, 20, 5, torch.float32, folded=folded).items()}
    for t in (inputs["e"], inputs.get("scores", inputs["e"])):
        t[0] = t[1, 9] = float("nan")
    c = pool_functions(prefix)[0](**inputs)[0]
    assert c[0].isnan().all()
    assert c[1].isnan().all() if not prefix else c[1, :9].isfinite().all() and c[1, 9:].isnan().all()
    assert c[2].isfinite().all()


@every_device
def test_empty_rows(device: str) -> None:
    check_empty_rows(device)


def test_a_state_that_counts_nothing_has_no_gradient() -> None:
    e, u = torch.randn(2, 5, 7), torch.randn(7)
    _, (level, last) = ops.prefix_pool(e, u, lengths=torch.tensor([0, 5]))
    level.requires_grad_()
    c, _ = ops.prefix_pool(e, u, state=(level, last))
    (grad,) = torch.autograd.grad(c.square().sum(), level)
    assert not grad[0].any()
    assert grad[1].any()


@every_device
@pytest.mark.parametrize("rise", [50.0, 70.0, 500.0])
def test_large_scores(rise: float, device: str) -> None:
    check_large_scores(rise, device)


@every_device
@every_pool
def test_scores_of_any_size(prefix: bool, device: str) -> None:
    check_scores_of_any_size(prefix, device)
    with num_threads(3):  # which share the positions
        check_scores_of_any_size(prefix, device)


def test_large_equal_scores_step_by_step() -> None:
    e, state = torch.randn(2, 50, 3), None
    for t in range(50):
        c, state = ops.prefix_pool(e[:, t : t + 1], scores=torch.full((2, 1), 1e8), state=state)
        assert_close("prefix_pool", c[:, 0], e[:, : t + 1].double().mean(1))


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_outweighing_state(dtype: torch.dtype, device: str) -> None:
    check_outweighing_state(dtype, device)
    with num_threads(3):  # which share the positions
        check_outweighing_state(dtype, device)


@every_pool
def test_scores_of_minus_infinity(prefix: bool) -> None:
    """They mask their positions, all of a row, too."""
    inputs = pool_inputs(3, 20, 5, torch.float64, folded=False)
    masked = torch.rand(3, 20) < 0.4
    masked[1] = True
    infinite = inputs | {"scores": inputs["scores"].detach().masked_fill(masked, -math.inf).requires_grad_()}
    results = pool_functions(prefix)[0](**infinite), pool_functions(prefix, mask=~masked)[0](**inputs)
    assert_same_bits(*results)
    gradients = [
        torch.autograd.grad(r[0].sum(), list(i.values())) for r, i in zip(results, (infinite, inputs), strict=True)
    ]
    assert_same_bits(*gradients)


def test_state_with_a_small_sum() -> None:
    """L is m and z; that of m + 87 and z exp(-87) counts as much, though exponentials relative to it underflow."""
    inputs = {name: t.detach() for name, t in pool_inputs(3, 20, 5, torch.float32, folded=True, state=True).items()}
    function, reference = pool_functions(True)
    expected = reference(**{name: t.double() for name, t in inputs.items()})[0]
    inputs["l"] = torch.stack((inputs["l"][:, 0] + 87, inputs["l"][:, 1] * math.exp(-87)), 1)
    torch.testing.assert_close(function(**inputs)[0].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_vectors_far_from_zero(dtype: torch.dtype) -> None:
    """The rounding of c does not reach the gradient of u, in which it would be multiplied with c."""
    inputs = pool_inputs(2, 50, 130, dtype, folded=True)
    inputs["e"] = (inputs["e"].detach() + 10).requires_grad_()
    compare("attention_pool", pool_functions(False), inputs)


@every_device
def test_infinite_scores(device: str) -> None:
    check_infinite_scores(device)


@every_pool
@pytest.mark.parametrize("folded", [False, True])
def test_gradcheck(prefix: bool, folded: bool) -> None:
    inputs = pool_inputs(2, 5, 3, torch.float64, folded=folded, state=prefix)
    check_gradients(pool_functions(prefix, mask=torch.rand(2, 5) < 0.7)[0], inputs)


@every_pool
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int, prefix: bool) -> None:
    with num_threads(threads):
        for B, T, D in ((1, 300, 520), (3, 100, 520), (40, 10, 200)):
            inputs = pool_inputs(B, T, D, torch.float64, folded=True, state=prefix)
            compare(op_name(prefix), pool_functions(prefix), inputs)
            check_same_bits(pool_functions(prefix)[0], inputs)


@pytest.mark.parametrize("op", [ops.attention_pool, ops.prefix_pool], ids=["attention_pool", "prefix_pool"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"e": torch.zeros(2, 6)}, ValueError, r"e must be \[B, T, D\]"),
        ({"u": torch.zeros(4)}, ValueError, r"u must be \[D\] = \[3\], got \[4\]"),
        ({"scores": torch.zeros(2, 6)}, ValueError, "exactly one of u and scores"),
        ({"u": None}, ValueError, "exactly one of u and scores"),
        ({"lengths": torch.tensor([1, 7])}, ValueError, "lengths must be"),
        ({"lengths": torch.tensor([-1, 6])}, ValueError, "lengths must be"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must be int64"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.ones(2, 6)}, TypeError, "mask must be bool"),
        ({"e": torch.zeros(2, 6, 3, dtype=torch.int32)}, TypeError, "e must be float32"),
        ({"e": torch.zeros(2, 6, 3, dtype=torch.float16)}, TypeError, "u must be float16, got float32"),
    ],
)
def test_bad_arguments(op: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"e": torch.zeros(2, 6, 3), "u": torch.zeros(3)}
    with pytest.raises(error, match=message):
        op(**arguments | changes)
