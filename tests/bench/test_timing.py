"""Ratios, quartiles and turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

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


class GraphClock(timing.Clock):
    """Takes functions named `captured` for calls that can be recorded; a replay takes a quarter of the time."""

    def block(self, call: timing.Call, calls: int) -> float:
        return float(call())

    def wait(self) -> None:
        pass

    def recorded(self, call: timing.Call) -> timing.Call | None:
        return (lambda: call() / 4) if getattr(call, "__name__", "") == "captured" else None


def test_time_on_the_device_is_measured_beside_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "clock_for", lambda device: GraphClock())

    def captured() -> float:
        return 0.04

    turns = timing.take_turns({"ours": captured, "waits": lambda: 0.08}, seconds=1, rounds=3, device="cuda")
    assert turns.seconds == {"ours": [0.04] * 3, "waits": [0.08] * 3}
    assert turns.device == {"ours": [0.01] * 3}
    # Three turns a round.
    assert turns.calls == {"ours": 3, "waits": 1}


def test_a_call_that_cannot_be_captured_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["before"]

    class Graph:
        def replay(self) -> None:
            pass

    @contextmanager
    def graph(_: Graph) -> Iterator[None]:
        streams.append("of the capture")
        yield
        streams.pop()  # not after an error, as torch's

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "current_stream": lambda: streams[-1],
        "set_stream": streams.append,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert timing.CudaClock().recorded(waits) is None
    assert streams[-1] == "before"
    replay = timing.CudaClock().recorded(lambda: None)
    assert replay is not None
    assert streams[-1] == "before"
