"""Splits of samples into training and validation, so that a group is never on both sides."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_ext.cli.data.files import encode_name
from llm_ext.cli.data.samples import Sample
from llm_ext.cli.errors import CommandError

__all__ = ["group_fold", "groups_of", "hold_out"]

Indices = npt.NDArray[np.int64]


def groups_of(samples: Sequence[Sample], column: str | None) -> list[str]:
    """Return the group of each sample: the value of a column, or without one a group for each sample.

    Raises:
        CommandError: A sample lacks the column.
    """
    if column is None:
        return [sample.key for sample in samples]
    for sample in samples:
        if column not in sample.columns:
            found = ", ".join(sample.columns) or "none"
            raise CommandError(f"{sample.name}: expected a column {column}; its further columns: {found}")
    return [sample.columns[column] for sample in samples]


def hold_out(
    samples: Sequence[Sample], column: str | None, values: Sequence[str], fraction: float
) -> tuple[Indices, Indices]:
    """Return the indices of the samples to train on and of those for validation.

    Args:
        samples: All samples.
        column: Column of the groups; None: each sample is a group.
        values: The groups to hold out; empty to hold out about `fraction` of the groups, by a checksum of their names.
        fraction: 0 to 1.

    Raises:
        CommandError: A sample lacks the column, or there is no group of one of the values.
    """
    groups = groups_of(samples, column)
    for value in values:
        if value not in groups:
            shown = ", ".join(sorted(set(groups))[:10])
            raise CommandError(f"no sample has the {column} {value!r}; there are {shown}")
    if values:
        held_out = np.array([group in values for group in groups])
    else:
        held_out = np.array([zlib.crc32(encode_name(group)) < fraction * 2**32 for group in groups])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def group_fold(groups: Sequence[str], index: int, count: int) -> tuple[Indices, Indices]:
    """Return the indices of the samples to train on and of those for validation, for one part of `count`.

    Each group is in one part. Groups go, largest first, to the part with the fewest samples.

    Args:
        groups: Group of each sample.
        index: Number of the part for validation.
        count: Number of parts.

    Raises:
        CommandError: There are fewer groups than parts.
    """
    sizes = Counter(groups)
    if len(sizes) < count:
        raise CommandError(f"--folds {count}: the samples have only {len(sizes)} groups; --val-column names them")
    loads, part_of = [0] * count, {}
    for group, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        part_of[group] = part = loads.index(min(loads))
        loads[part] += size
    held_out = np.array([part_of[group] == index for group in groups])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
