"""ops.additive_attention against the reference."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.additive_attention import (
    OP,
    SELECTIONS,
    SIZES,
    additive_functions,
    additive_inputs,
    check_cancellation,
    check_empty_rows,
    check_layouts,
    check_masked_keys,
    check_nan_and_infinity,
    check_reference,
    check_scores_of_any_size,
    key_selection,
)
from support.comparison import (
    check_gradients,
    check_same_bits,
    check_wanted_gradients,
    compare,
    outputs_and_gradients,
    root_mean_square_errors,
)
from support.devices import every_device, num_threads
from support.pairwise import parametrize_pairwise
from support.process import check_fork
from support.tolerances import ALL_DTYPES, DTYPES, HALF_DTYPES

from llm_ext import ops


@every_device
@parametrize_pairwise(sizes=SIZES, dtype=ALL_DTYPES, kind=SELECTIONS)
def test_reference(sizes: tuple[int, ...], dtype: torch.dtype, kind: str, device: str) -> None:
    check_reference(sizes, dtype, kind, device)


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (6, 40, 70, 80, 40))),
    kind=st.sampled_from(SELECTIONS),
    dtype=st.sampled_from(DTYPES),
    need_weights=st.booleans(),
)
def test_any_size(sizes: tuple[int, int, int, int, int], kind: str, dtype: torch.dtype, need_weights: bool) -> None:
    selection = key_selection(kind, *sizes[:3])
    functions = additive_functions(need_weights=need_weights, **selection)
    compare(OP, functions, additive_inputs(*sizes, dtype=dtype))


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_precision_in_16_bits(dtype: torch.dtype, device: str) -> None:
    """The error is at most 1.5 times that of the formula in torch's own operators."""
    inputs = additive_inputs(4, 33, 40, 256, 64, dtype, device=device)
    exact, exact_gradients = outputs_and_gradients(additive_functions()[1], inputs, torch.float64)
    expected = [exact[0], *exact_gradients.values()]
    errors = []
    for function in additive_functions():
        outputs, gradients = outputs_and_gradients(function, inputs)
        errors.append(root_mean_square_errors([outputs[0], *gradients.values()], expected))
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.5 * theirs


@every_device
@pytest.mark.parametrize("size", [10.0, 22.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cancellation(dtype: torch.dtype, size: float, device: str) -> None:
    check_cancellation(dtype, size, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype: torch.dtype) -> None:
    """Scores beyond what exp can represent."""
    inputs = additive_inputs(2, 17, 33, 5, 7, dtype)
    with torch.no_grad():
        inputs["v"] *= 1000
        inputs["v"][0] = 0
    function, reference = additive_functions()
    actual, _ = outputs_and_gradients(function, inputs)
    expected, _ = outputs_and_gradients(reference, inputs, torch.float64)
    # In float32 a score of 1000 has an error of about 1e-4, and so has its weight.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(actual[0].double(), expected[0], atol=tolerance, rtol=0)


@every_device
def test_layouts(device: str) -> None:
    check_layouts(device)


@every_device
def test_only_wanted_gradients(device: str) -> None:
    inputs = additive_inputs(3, 4, 5, 6, 7, torch.float64, device=device)
    check_wanted_gradients(additive_functions(need_weights=True)[0], inputs)


@every_device
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_masked_keys_may_hold_anything(garbage: float, device: str) -> None:
    check_masked_keys(garbage, device)


@every_device
def test_empty_rows(device: str) -> None:
    check_empty_rows(device)


@every_device
def test_scores_of_any_size(device: str) -> None:
    check_scores_of_any_size(device)


@every_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(value: float, device: str) -> None:
    check_nan_and_infinity(value, device)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(threads: int) -> None:
    """More threads than cores, rows or blocks: the same results within rounding, the same bits when repeated."""
    with num_threads(threads):
        for B, Tq, Tk, A, Dv in ((1, 40, 65, 200, 100), (3, 17, 40, 100, 30), (9, 3, 20, 300, 8), (1, 1, 300, 500, 40)):
            inputs = additive_inputs(B, Tq, Tk, A, Dv, torch.float64)
            functions = additive_functions(need_weights=True, key_lengths=torch.randint(0, Tk + 1, (B,)))
            compare(OP, functions, inputs)
            check_same_bits(functions[0], inputs)


PEAK = """
import resource, sys, torch
from llm_ext import ops

def run(B, Tq, Tk, A, D):
    shapes = (B, Tq, A), (B, Tk, A), (A,), (B, Tk, D)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    torch.autograd.backward(ops.additive_attention(*inputs)[0].sum())

run(2, 3, 4, 5, 6)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(*map(int, sys.argv[1:]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts in KB on Linux")
@pytest.mark.parametrize(("B", "Tq", "Tk"), [(1, 2000, 2000), (1, 1, 8000), (1, 8000, 1)])
def test_memory_is_linear_in_queries_and_keys(B: int, Tq: int, Tk: int) -> None:
    """Forward and backward need a few tensors of the projected queries and keys, and none of Tq x Tk x A."""
    A = 256
    # Inputs and their gradients count 4, the workspace some more; the allocator adds a few MB.
    assert int(check_fork(PEAK, B, Tq, Tk, A, A)) <= 12 * 4 * B * (Tq + Tk) * A + (16 << 20)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_gradcheck(kind: str) -> None:
    function = additive_functions(need_weights=True, **key_selection(kind, 3, 4, 5))[0]
    check_gradients(function, additive_inputs(3, 4, 5, 3, 2, torch.float64))


Z = torch.zeros


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": Z(2, 6)}, ValueError, r"query must be \[B, Tq, A\] = \[\*, \*, \*\], got \[2, 6\]"),
        ({"keys": Z(2, 4, 5)}, ValueError, r"keys must be \[B, Tk, A\] = \[2, \*, 6\], got \[2, 4, 5\]"),
        ({"v": Z(5)}, ValueError, r"v must be \[A\] = \[6\], got \[5\]"),
        ({"values": Z(2, 3, 7)}, ValueError, r"values must be \[B, Tk, Dv\] = \[2, 4, \*\], got \[2, 3, 7\]"),
        ({"values": Z(2, 4, 7).double()}, TypeError, "values must be float32, got float64"),
        ({"query": Z(2, 3, 6, dtype=torch.int64)}, TypeError, "query must be float32, float64, bfloat16 or"),
        ({"keys": Z(2, 4, 6, device="meta")}, ValueError, "keys must be on cpu like query, got meta"),
        ({"v": None}, TypeError, "v must be a Tensor, got NoneType"),
        ({"key_lengths": torch.tensor([1, 5])}, ValueError, r"key_lengths must be from 0 to Tk = 4, got \[1, 5\]"),
        ({"key_lengths": torch.tensor([-1, 4])}, ValueError, r"key_lengths must be from 0 to Tk = 4"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths must be int64, got float32"),
        ({"key_lengths": torch.tensor([1])}, ValueError, r"key_lengths must be \[B\] = \[2\], got \[1\]"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask must be \[B, Tk\] = \[2, 4\], got \[2, 5\]"),
        ({"mask": torch.ones(2, 1, 4, dtype=torch.bool)}, ValueError, r"mask must be \[B, Tq, Tk\] = \[2, 3, 4\]"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool, got float32"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": Z(2, 3, 6), "keys": Z(2, 4, 6), "v": Z(6), "values": Z(2, 4, 7)}
    with pytest.raises(error, match=f"additive_attention: {message}"):
        ops.additive_attention(**arguments | changes)
