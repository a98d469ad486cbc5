"""Candidates are checked before they are timed; geometric means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import comparison, report, timing
from bench.comparison import OURS, Candidate, Case, Comparison, Mean, Settings


def test_relative_error_is_relative_to_each_tensor() -> None:
    expected = [torch.tensor([100.0, 1.0]).double(), torch.tensor([[1e-3]]).double(), torch.empty(0).double()]
    assert comparison.relative_error(expected, expected) == 0
    assert comparison.relative_error([expected[0], expected[1] + 1e-6, expected[2]], expected) == pytest.approx(1e-3)
    assert comparison.relative_error([expected[0], expected[1] * math.nan, expected[2]], expected) == math.inf
    assert comparison.relative_error(expected[:2], expected) == math.inf
    assert comparison.relative_error([expected[0], expected[0], expected[2]], expected) == math.inf


def test_only_correct_candidates_are_timed(
    make_case: Callable[..., Case], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: dict[str, timing.Seconds] = {
        "ours": [1.0, 10.0, 1.5],
        "slow": [2.0, 40.0, 3.0],
        "quick": [0.5, None, 0.5],
        "another use": [1.0] * 3,
    }

    def take_turns(calls: dict[str, timing.Call], budget: float, rounds: int, device: str) -> timing.Turns:
        assert list(calls) == list(seconds)
        return timing.Turns(seconds, dict.fromkeys(calls, 7))

    monkeypatch.setattr(timing, "take_turns", take_turns)
    result = comparison.run(make_case(), settings)
    others = {entry["name"]: entry for entry in result["others"]}
    assert {name: entry["status"] for name, entry in others.items()} == {
        "slow": "measured",
        "quick": "measured",
        "wrong": "wrong",
        "failing": "failed",
        "missing": "absent",
        "another use": "measured",
    }
    assert others["failing"]["reason"] == "RuntimeError: does not build"
    assert others["wrong"]["reason"] == "relative error 0.005, tolerance 2e-04"
    assert "median_s" not in others["wrong"]
    assert (others["slow"]["ratio"], others["slow"]["median_s"], others["slow"]["rate"]) == (2.0, 3.0, 1.0)
    assert [others[name]["met"] for name in ("slow", "quick", "another use")] == [True, False, None]
    assert others["quick"]["rounds"] == 2
    assert result["ours"]["calls_per_round"] == 7


def test_time_on_the_device_has_a_ratio_of_its_own(
    make_case: Callable[..., Case], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_turns(calls: dict[str, timing.Call], budget: float, rounds: int, device: str) -> timing.Turns:
        on_device: dict[str, timing.Seconds] = {"ours": [0.5, 0.5], "slow": [1.9, 2.1]}
        return timing.Turns({name: [2.0, 2.0] for name in calls}, dict.fromkeys(calls, 1), on_device)

    monkeypatch.setattr(timing, "take_turns", take_turns)
    result = comparison.run(make_case(), settings)
    others = {entry["name"]: entry for entry in result["others"]}
    assert result["ours"]["device_s"] == 0.5
    assert (others["slow"]["device_s"], others["slow"]["device_ratio"], others["slow"]["ratio"]) == (2.0, 4.0, 1.0)
    assert "device_s" not in others["quick"]
    text = report.table(result).splitlines()
    assert text[1].endswith("on the device 500 ms")
    # It is not told where it is the time of the call.
    assert not any("on the device" in line for line in text[2:])


def test_nothing_is_timed_if_ours_is_wrong(make_case: Callable[..., Case], settings: Settings) -> None:
    result = comparison.run(make_case(ours=3.0), settings)
    assert result["ours"]["status"] == "wrong"
    assert {entry["status"] for entry in result["others"]} == {"skipped", "absent"}


@pytest.mark.usefixtures("untimed")
def test_libraries_select_peers_and_targets_apply_to_their_settings(
    make_case: Callable[..., Case], settings: Settings
) -> None:
    result = comparison.run(make_case(), dataclasses.replace(settings, libraries=[]))
    assert [entry["name"] for entry in result["others"]] == ["another use"]
    for other in ({"dtype": torch.float64}, {"threads": 1}):
        result = comparison.run(make_case(), dataclasses.replace(settings, **other))
        assert all(entry["target"] is None for entry in result["others"])


@pytest.mark.usefixtures("untimed")
def test_case_overrides_threads_and_dtype(settings: Settings) -> None:
    seen = []

    def build(dtype: torch.dtype, threads: int) -> Comparison:
        seen.append((dtype, threads, torch.get_num_threads()))
        return Comparison([], Candidate("ours", OURS, lambda: lambda: []), [])

    before = torch.get_num_threads()
    case = Case("small/step/B1", build, False, 1.0, "GB", threads=1, dtype=torch.float64)
    result = comparison.run(case, settings)
    assert seen == [(torch.float64, 1, 1)]
    assert torch.get_num_threads() == before
    assert (result["threads"], result["dtype"], result["work"]) == (1, "float64", 2.0)


def _entry(name: str, **ratios: float | str) -> dict[str, Any]:
    """A case of a record: ratios by candidate, or the status of those without."""
    others = [
        {"name": candidate, "library": "torch", "target": None}
        | ({"status": value} if isinstance(value, str) else {"status": "measured", "ratio": value})
        for candidate, value in ratios.items()
    ]
    return {"case": name, "others": others}


def test_mean_takes_the_lowest_ratio_of_each_case(settings: Settings) -> None:
    names = ["a/x/1", "a/x/2", "a/x/3", "b/x/1"]
    measured = [
        _entry("a/x/1", one=8.0, two=2.0, other=0.1),
        _entry("a/x/2", one=4.0, two="failed", other=0.1),
        _entry("b/x/1", one=100.0, two=100.0),
    ]
    mean = Mean(["a/x/*"], ["one", "two"], target=2.8)
    partial = comparison.geometric_mean(mean, names, measured, settings)
    assert (partial["cases_measured"], partial["cases_expected"]) == (2, 3)
    assert partial["ratio"] == pytest.approx(8**0.5)
    assert partial["met"] is None

    complete = comparison.geometric_mean(mean, names, [*measured, _entry("a/x/3", one=1.0, two=1.0)], settings)
    assert complete["ratio"] == pytest.approx(2)
    assert complete["met"] is False
    assert comparison.geometric_mean(mean, names[:2], measured, settings)["met"] is True
    # If one of the candidates took no part, the mean over the others is not the mean of the target.
    for entry in (_entry("a/x/1", one=8.0, two="absent"), _entry("a/x/1", one=8.0)):
        assert comparison.geometric_mean(mean, names, [entry], settings)["ratio"] is None
    other_settings = dataclasses.replace(settings, threads=3)
    assert comparison.geometric_mean(mean, names[:2], measured, other_settings)["target"] is None
