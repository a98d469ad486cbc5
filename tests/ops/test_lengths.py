"""Padded batches with a length for each row: the ops against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.comparison import assert_close, check_gradients, compare
from support.devices import every_device
from support.pairwise import parametrize_pairwise
from support.recurrences import (
    ARCHITECTURES,
    RECURRENCES,
    Recurrence,
    check_lengths,
    check_state_shapes,
    padded_inputs,
    recurrence_functions,
    recurrence_inputs,
)
from support.tolerances import ALL_DTYPES
from torch import Tensor

from llm_ext import ops

every_architecture = pytest.mark.parametrize("recurrence", ARCHITECTURES, ids=str)
# Unsorted, with empty rows, whole rows, and equal lengths.
LENGTHS = [3, 0, 7, 1, 7, 0, 4]


@every_device
@parametrize_pairwise(recurrence=RECURRENCES, reverse=(False, True), state=(False, True), dtype=ALL_DTYPES)
def test_reference(recurrence: Recurrence, reverse: bool, state: bool, dtype: torch.dtype, device: str) -> None:
    check_lengths(recurrence, LENGTHS, dtype, state=state, reverse=reverse, device=device)


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=12),
    extra=st.integers(0, 3),
    H=st.integers(1, 40),
    reverse=st.booleans(),
    state=st.booleans(),
)
@settings(max_examples=15)
def test_any_lengths(
    recurrence: Recurrence, lengths: list[int], extra: int, H: int, reverse: bool, state: bool
) -> None:
    assume(H > 1 or not recurrence.projected)  # a projection needs P < H
    T = max(lengths, default=0) + extra
    inputs = padded_inputs(recurrence, lengths, T, H, torch.float64, state=state)
    functions = recurrence_functions(recurrence, lengths=torch.tensor(lengths, dtype=torch.int64), reverse=reverse)
    compare(recurrence.op, functions, inputs)


@every_device
@every_architecture
def test_state_of_one_layer(recurrence: Recurrence, device: str) -> None:
    check_state_shapes(recurrence, lengths=[2, 0, 4], device=device)


@every_device
@every_architecture
def test_lengths_of_whole_rows(recurrence: Recurrence, device: str) -> None:
    inputs = recurrence_inputs(recurrence, (5, 3, 4), 3, 6, torch.float64, device=device)
    without = recurrence_functions(recurrence)[0](**inputs)
    lengths = torch.tensor([5] * 3, device=device)
    for a, b in zip(recurrence_functions(recurrence, lengths=lengths)[0](**inputs), without, strict=True):
        assert_close(recurrence.op, a, b)


@every_architecture
def test_gradcheck(recurrence: Recurrence) -> None:
    inputs = recurrence_inputs(recurrence, (4, 3, 2), 3, 4, torch.float64)
    check_gradients(recurrence_functions(recurrence, lengths=torch.tensor([2, 0, 4]))[0], inputs)


@every_architecture
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 4]), ValueError, r"lengths must be from 0 to T = 3, got \[1, 4\]"),
        (torch.tensor([-1, 2]), ValueError, r"lengths must be from 0 to T = 3"),
        (torch.tensor([1, 2, 3]), ValueError, r"lengths must be \[B\] = \[2\], got \[3\]"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "lengths must be int64"),
        (torch.tensor([1, 2], device="meta"), ValueError, "lengths must be on cpu like x"),
    ],
)
def test_lengths_are_checked(lengths: Tensor, error: type[Exception], message: str, recurrence: Recurrence) -> None:
    inputs = recurrence_inputs(recurrence, (3, 2, 4), 2, 5, torch.float32)
    with pytest.raises(error, match=f"{recurrence.op}: {message}"):
        recurrence_functions(recurrence, lengths=lengths)[0](**inputs)


def test_lengths_with_batch_sizes_are_refused() -> None:
    weights = torch.randn(15, 4), torch.randn(15, 5)
    with pytest.raises(ValueError, match="gru: lengths belong to a padded x"):
        ops.gru(
            torch.randn(3, 4),
            torch.zeros(2, 5),
            *weights,
            batch_sizes=torch.tensor([2, 1]),
            lengths=torch.tensor([2, 1]),
        )
