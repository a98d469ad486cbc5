"""Limits of the machine and peak memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bench import comparison, limits, memory
from bench.comparison import OURS, Candidate, Case, Comparison, Settings


@pytest.mark.skipif(limits.unavailable() is not None, reason=str(limits.unavailable()))
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_do_all_of_their_work(threads: int) -> None:
    for gflop in (0.0, 1e-6, 5e-6, 1e-3):
        assert limits.multiply_add(gflop, threads)() == pytest.approx(1)
    for floats in (1, 1000, 4097):
        assert limits.read(floats, 3, threads)() == pytest.approx(1)
    assert limits.copy(1e-6)() == 1


def test_unavailable_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    limits._library.cache_clear()
    try:
        monkeypatch.setattr("shutil.which", lambda name: None)
        assert "g++ is needed" in str(limits.unavailable())
        with pytest.raises(RuntimeError, match=r"g\+\+ is needed"):
            limits.multiply_add(1.0, 1)
    finally:
        limits._library.cache_clear()


@pytest.mark.usefixtures("untimed")
@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_counts_temporaries_of_one_call(settings: Settings) -> None:
    mb = 2**20

    def call() -> Tensor:
        return torch.ones(64 * mb, dtype=torch.uint8)[: 8 * mb].clone()

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        return Comparison([torch.ones(8 * mb)], Candidate("ours", OURS, lambda: call), [])

    case = Case("small/inference/B1", build, False, 1.0, "thing", memory=True)
    entry = comparison.run(case, dataclasses.replace(settings, rounds=1))["ours"]
    # 72 MB, which Linux counts in batches of pages.
    assert 71 * mb <= entry["peak_bytes"] < 80 * mb
