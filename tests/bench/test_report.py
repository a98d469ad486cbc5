"""Text and JSON of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import comparison, recording, report
from bench.comparison import LIMIT, OURS, Case, Mean, Settings


def test_header_names_limits_and_what_is_not_installed(record: dict[str, Any]) -> None:
    text = report.header(record)
    assert "Read 2 GB/s, FMA peak 5 GFLOP/s, best of several" in text
    assert "Peers: jax (not installed), torch 2.13.0" in text
    assert "Skipped, not installed (pip install 'llm_ext[bench]'): jax" in text
    record["limits"] = record["limits"] | {"unavailable": "no reason"}
    assert "FMA peak and read speed not measured: no reason" in report.header(record)


@pytest.mark.usefixtures("untimed")
def test_table_and_summary_show_each_status(make_case: Callable[..., Case], settings: Settings) -> None:
    case = comparison.run(make_case(), settings)
    for entry in case["others"]:
        if entry["name"] == "quick":
            entry["ratio"] = 0.5
    text = report.table(case)
    assert "wrong: relative error 0.005, tolerance 2e-04" in text
    assert "0.5x [1 – 1]" in text
    assert "llm_ext is slower, target 1e+06x missed" in text
    assert "absent: not available" in text
    text = report.summary([case])
    assert "Targets met: 0 of 3." in text
    assert "missed: small/inference/B1, slow: 1x, target 1.5x" in text
    assert "missed: small/inference/B1, failing: failed, target 2x" in text
    assert "llm_ext is slower in 1 of 2 comparisons with other libraries.\n  small/inference/B1, quick: 0.5x" in text
    assert "Not timed: small/inference/B1, wrong, wrong: relative error" in text
    case["ours"]["peak_bytes"] = 10**6
    assert "1.0 MB" in report.table(case)


def test_mean_line_says_whether_the_target_is_met() -> None:
    mean = {"cases": ["a/x/*"], "against": ["one", "two"], "cases_measured": 2, "cases_expected": 3, "ratio": 2.828}
    line = report.mean_line(mean | {"target": 2.8, "met": None})
    assert line == (
        "2.83x over the fastest of one, two: a/x/* (2 of 3 cases), target 2.8x not judged, cases are missing"
    )
    missed = mean | {"target": 3.0, "met": False}
    assert "  missed: mean 2.83x over the fastest of" in report.summary([], [missed])
    close = mean | {"ratio": 1.2997, "target": 1.3, "met": False}
    assert report.mean_line(close).startswith("1.2997x over ")
    assert "Targets met: 1 of 2." in report.summary([], [missed, mean | {"target": 2.0, "met": True}])


def test_limit_is_not_a_peer() -> None:
    limit = {"name": "FMA peak", "library": LIMIT, "status": "measured", "ratio": 0.875, "target": 0.85, "met": True}
    assert report.verdict(limit) == "88% of the limit, target 0.85x met"
    assert report.verdict(limit | {"library": "torch"}) == "llm_ext is slower, target 0.85x met"
    ours = {"name": "llm_ext.RNN", "library": OURS, "status": "measured"}
    text = report.summary([{"case": "a/x/1", "ours": ours, "others": [limit]}])
    assert "Targets met: 1 of 1." in text
    assert "llm_ext is slower in 0 of 0 comparisons" in text


@pytest.mark.usefixtures("untimed", "measured_limits")
def test_json_has_one_candidate_a_line(make_case: Callable[..., Case], settings: Settings, tmp_path: Path) -> None:
    run = recording.start({"device": "cpu", "threads": 2, "dtype": "float32", "libraries": [], "absent": []})
    assert {"cpu", "cores", "memory_gb", "system", "load"} == run["machine"].keys()
    assert {"python", "llm_ext", "build_info", "peers", "models"} == run["versions"].keys()
    run["cases"] = [comparison.run(make_case(), settings)] * 2
    run["cases"][0]["others"][0]["ratio"] = 1 / 3
    run["means"] = [comparison.geometric_mean(Mean(["small/*"], ["slow"]), ["small/x"], [], settings)]
    path = tmp_path / "run.json"
    recording.write_json(run, path)
    assert recording.read_json(path)["cases"][1]["others"][0]["ratio"] == 0.333333
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"name": "quick"' in line for line in lines) == 2
    assert not any('"name": "quick"' in line and '"name": "slow"' in line for line in lines)

    path.write_text(json.dumps({"format": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="not a benchmark record of format 2"):
        recording.read_json(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "bench/results").glob("*.json")), ids=str)
def test_kept_results_are_of_this_format_and_can_be_printed(path: Path) -> None:
    run = recording.read_json(path)
    assert len({case["case"] for case in run["cases"]}) == len(run["cases"])
    assert all("ratio" in entry for case in run["cases"] for entry in case["others"] if entry["status"] == "measured")
    report.header(run)
    report.summary(run["cases"], run["means"])
    for case in run["cases"]:
        report.table(case)
