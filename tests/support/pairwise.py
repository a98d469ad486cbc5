"""Pairwise test parameters: every pair of values of two parameters occurs in some row, with few rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch


def pairwise(allowed: Callable[..., bool] | None = None, **parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of values, one for each parameter, such that all pairs of values of two parameters occur.

    Greedy and deterministic: each row starts from a pair that is still missing and takes the values that cover the
    most missing pairs. `allowed`, called with parameters by name, rejects whole rows.
    """
    names, values = list(parameters), [list(v) for v in parameters.values()]
    if len(names) == 1:
        return [(value,) for value in values[0]]

    def permits(row: Sequence[int]) -> bool:
        return allowed is None or allowed(**{n: v[i] for n, v, i in zip(names, values, row, strict=True)})

    def pairs(row: Sequence[int | None]) -> Iterable[tuple[int, int, int, int]]:
        known = [(column, index) for column, index in enumerate(row) if index is not None]
        return ((a, i, b, j) for (a, i), (b, j) in itertools.combinations(known, 2))

    missing = {
        (a, i, b, j): None  # an ordered set
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(values[a]))
        for j in range(len(values[b]))
    }
    rows = []
    while missing:
        a, i, b, j = next(iter(missing))
        row = _complete(a, i, b, j, [len(v) for v in values], missing, permits, pairs)
        if row is None:  # no allowed row has this pair
            del missing[a, i, b, j]
            continue
        for pair in pairs(row):
            missing.pop(pair, None)
        rows.append(tuple(v[index] for v, index in zip(values, row, strict=True)))
    return rows


def _complete(
    a: int,
    i: int,
    b: int,
    j: int,
    counts: list[int],
    missing: dict[tuple[int, int, int, int], None],
    permits: Callable[[Sequence[int]], bool],
    pairs: Callable[[Sequence[int | None]], Iterable[tuple[int, int, int, int]]],
) -> list[int] | None:
    """A permitted row with value i of column a and value j of column b that covers many missing pairs."""
    row: list[int | None] = [None] * len(counts)
    row[a], row[b] = i, j
    free = [column for column in range(len(counts)) if column not in (a, b)]

    def covered(candidate: Sequence[int | None]) -> int:
        return sum(pair in missing for pair in pairs(candidate))

    def search(row: list[int | None], remaining: list[int]) -> list[int] | None:
        if not remaining:
            whole = [index for index in row if index is not None]
            return whole if permits(whole) else None
        column, *others = remaining
        options = [[*row[:column], value, *row[column + 1 :]] for value in range(counts[column])]
        for option in sorted(options, key=covered, reverse=True):
            found = search(option, others)
            if found is not None:
                return found
        return None

    return search(row, free)


def parametrize_pairwise(
    allowed: Callable[..., bool] | None = None, **parameters: Sequence[Any]
) -> pytest.MarkDecorator:
    """pytest.mark.parametrize with the rows of `pairwise`."""
    rows = pairwise(allowed, **parameters)
    if len(parameters) == 1:
        return pytest.mark.parametrize(next(iter(parameters)), [row[0] for row in rows], ids=short_id)
    return pytest.mark.parametrize(tuple(parameters), rows, ids=short_id)


def short_id(value: object) -> str:
    """A test id without spaces: 4x13x64, float32."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value)) if len(value) <= 6 else f"{len(value)}_rows"
    return str(value)
