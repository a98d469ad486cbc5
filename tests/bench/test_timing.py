"""Ratios, quartiles and turns."""

from __future__ import annotations

import time

import pytest

from bench import timing


def test_ratio_is_taken_within_each_round() -> None:
    # The ratio of the medians would be 2.
    assert timing.ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.5]) == (2.0, 2.0, 3.0)
    assert timing.ratio([2.0, None, 8.0], [1.0, 5.0, 2.0]) == (3.0, 2.5, 3.5)


def test_spread_is_median_and_quartiles() -> None:
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)
    assert timing.spread([5.0, 1.0, None, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)


def test_slow_candidate_skips_rounds_but_the_first_runs_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_wait_until_idle", lambda: None)

    def slow() -> None:
        time.sleep(0.02)

    turns = timing.take_turns({"ours": slow, "quick": lambda: None, "slow": slow}, seconds=0.03, rounds=5)
    assert None not in turns.seconds["ours"]
    assert None not in turns.seconds["quick"]
    assert [value is None for value in turns.seconds["slow"]] == [False, True, False, True, False]
    assert turns.calls["slow"] == 1
    assert turns.calls["quick"] > 1
    assert all(value is None or value >= 0.02 for value in turns.seconds["slow"])


def test_block_returns_seconds_per_call() -> None:
    assert 0.002 <= timing.Clock().block(lambda: time.sleep(0.002), 3) < 0.02
