"""Batches of pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llm_ext.cli import CommandError
from llm_ext.cli.data import (
    ByteTokenizer,
    EncodedPairs,
    LineTokenizer,
    PairBatches,
    PairFiles,
    encode_pairs,
    make_batch,
)

BYTES = LineTokenizer(ByteTokenizer())
ENDS = (BYTES.end, BYTES.end)


def encoded(path: Path) -> EncodedPairs:
    return encode_pairs(PairFiles(path), BYTES, BYTES, path.parent / "cache", 200)


def test_a_batch_is_padded_with_ends(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("ab\tx\nc\tyz\n")
    batch = make_batch(encoded(path), np.array([1, 0]), ENDS)
    e = BYTES.end
    assert batch.source.tolist() == [[ord("c"), e, e], [ord("a"), ord("b"), e]]
    assert batch.target.tolist() == [[e, ord("y"), ord("z")], [e, ord("x"), e]]
    assert batch.source_lengths is not None
    assert batch.source_lengths.tolist() == [2, 3]
    assert batch.target_lengths is not None
    assert batch.target_lengths.tolist() == [3, 2]
    assert batch.keep.tolist() == [[True, True, True], [True, True, False]]
    assert batch.expected.tolist() == [ord("y"), ord("z"), e, ord("x"), e]
    alone = make_batch(encoded(path), np.array([1]), ENDS)
    assert alone.source_lengths is None
    assert alone.target_lengths is None
    assert alone.keep.all()


def test_a_pass_reads_every_pair_in_batches_of_similar_length(pairs: Path) -> None:
    there = encoded(pairs)
    chosen = np.arange(3, 200)
    batches = PairBatches(there, chosen, 16, 1, ENDS)
    assert batches.steps_per_pass == 13
    first = [batches.indices(step) for step in range(13)]
    seen = np.concatenate(first)
    assert set(seen.tolist()) == set(chosen.tolist())
    assert len(seen) == 13 * 16
    # Almost no padding on the side that costs arithmetic, where a shuffle alone would have a third.
    lengths = there.target_lengths + 1
    real = sum(lengths[rows].sum() for rows in first)
    assert real / sum(lengths[rows].max() * len(rows) for rows in first) > 0.9
    assert real / sum(lengths[rows].max() * len(rows) for rows in np.array_split(chosen, 13)) < 0.75
    # The batches are shuffled: they do not come longest first.
    assert (np.diff([lengths[rows].max() for rows in first]) > 0).any()
    second = [batches.indices(step) for step in range(13, 26)]
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_are_a_function_of_the_step(pairs: Path) -> None:
    there = encoded(pairs)

    def indices(seed: int, steps: list[int]) -> list[list[int]]:
        batches = PairBatches(there, np.arange(200), 16, seed, ENDS)
        return [batches.indices(step).tolist() for step in steps]

    assert indices(1, [3, 40, 4]) == [indices(1, [step])[0] for step in (3, 40, 4)]
    assert indices(1, [3]) != indices(2, [3])


def test_processes_share_a_batch(pairs: Path) -> None:
    batches = PairBatches(encoded(pairs), np.arange(200), 16, 1, ENDS)
    whole, tokens = batches.read(5, slice(0, 16))
    assert tokens == len(whole.expected)
    halves = [batches.read(5, slice(begin, begin + 8)) for begin in (0, 8)]
    assert [count for _, count in halves] == [tokens, tokens]
    assert torch.equal(torch.cat([half.expected for half, _ in halves]), whole.expected)


def test_too_few_pairs(pairs: Path) -> None:
    with pytest.raises(CommandError, match=r"at least one batch of 300 pairs to train on, got 200"):
        PairBatches(encoded(pairs), np.arange(200), 300, 1, ENDS)
