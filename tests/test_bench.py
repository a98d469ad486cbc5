"""The benchmarks measure what they say; how long anything takes is not tested."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

# bench is run from the checkout, not installed; last, so that an installed llm_ext comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, contest, peers, report, timing
from bench.__main__ import chosen, listing, main
from bench.contest import Case, Contest, Contestant, Settings

SETTINGS = Settings(
    threads=2, dtype=torch.float32, seconds=0.01, rounds=2, libraries=list(peers.LIBRARIES), absent=["jax"]
)


def returning(value: float, delay: float = 0.0) -> Callable[[], timing.Call]:
    def call() -> Tensor:
        time.sleep(delay)
        return torch.tensor([1.0, value])

    return lambda: call


def broken() -> timing.Call:
    raise RuntimeError("does not build\nfor many reasons")


def small_case(ours: float = 2.0) -> Case:
    def build(dtype: torch.dtype, threads: int) -> Contest:
        others = [
            Contestant("right", "torch", returning(2.0, delay=0.02)),
            Contestant("quick", "torch", returning(2.0)),
            Contestant("wrong", "torch", returning(2.01)),
            Contestant("broken", "onnxruntime", broken),
            Contestant("missing", "jax", broken),
        ]
        truth = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
        return Contest(truth, Contestant("ours", "llm_ext", returning(ours, delay=0.001)), others)

    return Case("small/inference/B1", build, False, 3.0, "thing", {"right": 1.5, "quick": 1e6, "broken": 2})


def test_list_names_every_case_and_how_to_run_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in cases.CASES)
    assert "python -m bench PATTERN" in printed.splitlines()[-1]
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)


def test_patterns_select_groups_and_parts_of_names() -> None:
    assert chosen(cases.CASES, ["all"]) == list(cases.CASES)
    assert {case.group for case in chosen(cases.CASES, ["step", "model"])} == {"step", "model"}
    assert [case.name for case in chosen(cases.CASES, ["training/B32*-L2"])] == [
        "recurrence/training/B32-T128-I256-H512-L2"
    ]
    with pytest.raises(ValueError, match="no case matches 'B3000'"):
        chosen(cases.CASES, ["B32", "B3000"])
    assert "bar 3 × torch.nn.RNN" in listing(cases.CASES)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing-of-this-name"],
        ["all", "--peers", "torch,haste"],
        ["all", "--threads", "0"],
        ["all", "--json", "no/x"],
    ],
)
def test_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    # The ratio of the medians would be 2.
    assert timing.ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.5]) == (2.0, 2.0, 3.0)
    assert timing.ratio([2.0, None, 8.0], [1.0, 5.0, 2.0]) == (3.0, 2.5, 3.5)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)
    assert timing.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)


def test_a_slow_contestant_sits_rounds_out_but_the_first_never_does() -> None:
    slow = returning(0.0, delay=0.02)()
    turns = timing.take_turns({"ours": slow, "quick": returning(0.0)(), "slow": slow}, seconds=0.03, rounds=5)
    assert None not in turns.seconds["ours"]
    assert [value is None for value in turns.seconds["slow"]] == [False, True, False, True, False]
    assert turns.calls["slow"] == 1


def test_error_is_relative_to_each_result() -> None:
    truth = [torch.tensor([100.0, 1.0]).double(), torch.tensor([[1e-3]]).double(), torch.empty(0).double()]
    assert contest.error(truth, truth) == 0
    got = [truth[0], truth[1] + 1e-6, truth[2]]
    assert contest.error(got, truth) == pytest.approx(1e-3)
    assert contest.error([truth[0], truth[1] * math.nan, truth[2]], truth) == math.inf
    assert contest.error(truth[:2], truth) == math.inf
    assert contest.error([truth[0], truth[0], truth[2]], truth) == math.inf


def test_only_who_is_right_is_timed() -> None:
    result = contest.run(small_case(), SETTINGS)
    by_name = {peer["name"]: peer for peer in result["peers"]}
    assert {name: peer["status"] for name, peer in by_name.items()} == {
        "right": "measured",
        "quick": "measured",
        "wrong": "wrong",
        "broken": "failed",
        "missing": "absent",
    }
    assert by_name["right"]["met"] is True
    assert by_name["quick"]["met"] is False
    assert "median_s" not in by_name["wrong"]
    assert by_name["broken"]["reason"] == "RuntimeError: does not build"
    printed = report.table(result)
    assert "wrong: result is off by 0.005, allowed 2e-04" in printed
    assert "LOSES, bar 1e+06 MISSED" in printed
    assert "absent: not installed" in printed
    closing = report.summary([result])
    assert "Bars met: 1 of 3." in closing
    assert "missed: small/inference/B1 against broken: failed, bar 2" in closing
    assert "small/inference/B1 to quick" in closing


def test_nobody_is_timed_when_ours_is_wrong() -> None:
    result = contest.run(small_case(ours=3.0), SETTINGS)
    assert result["ours"]["status"] == "wrong"
    assert {peer["status"] for peer in result["peers"]} == {"skipped", "absent"}


def test_bars_hold_for_the_setting_they_were_set_for() -> None:
    result = contest.run(small_case(), dataclasses.replace(SETTINGS, dtype=torch.float64))
    assert all(peer["bar"] is None for peer in result["peers"])


def test_threads_are_set_for_the_case_and_put_back() -> None:
    seen = []

    def build(dtype: torch.dtype, threads: int) -> Contest:
        seen.append((threads, torch.get_num_threads()))
        return Contest([], Contestant("ours", "llm_ext", lambda: lambda: []), [])

    before = torch.get_num_threads()
    contest.run(Case("small/step/B1", build, False, 1.0, "thing", threads=1), SETTINGS)
    assert seen == [(1, 1)]
    assert torch.get_num_threads() == before


def test_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "limits", lambda threads: {"copy_gb_per_s": 1.0, "product_gflop_per_s": 1.0})
    monkeypatch.setattr(peers, "absent", lambda: ["jax"])
    monkeypatch.setattr(peers, "prepare", lambda threads: None)
    files = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["small", "--threads", "2", "--seconds", "0.01", "--rounds", "3"]
    assert main([*arguments, "--json", str(files[0]), "--plot", str(files[1])], [small_case()]) == 0
    assert "Left out, not installed (pip install --no-build-isolation '.[bench]'): jax" in capsys.readouterr().out

    run = json.loads(files[0].read_text(encoding="utf-8"))
    assert run["format"] == 1
    assert {"cpu", "cores", "memory_gb", "system", "load"} == run["machine"].keys()
    assert {"python", "llm_ext", "build_info", "peers"} == run["versions"].keys()
    assert run["settings"]["dtype"] == "float32"
    (case,) = run["cases"]
    assert case["case"] == "small/inference/B1"
    assert len(case["ours"]["rounds_s"]) == 3
    right = case["peers"][0]
    assert {
        "median_s",
        "q1_s",
        "q3_s",
        "ratio",
        "ratio_q1",
        "ratio_q3",
        "bar",
        "met",
        "error",
    } <= right.keys()
    assert right["ratio"] == pytest.approx(timing.ratio(right["rounds_s"], case["ours"]["rounds_s"]).median, rel=1e-4)

    drawn = files[1].read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    assert "small/inference/B1" in drawn
    assert "quick" in drawn
    assert main(arguments, [small_case(ours=0.0)]) == 1


@pytest.mark.parametrize(
    "case",
    [
        cases.recurrence("inference", 3, 5, 2, 4),
        cases.recurrence("training", 3, 5, 2, 4, layers=2),
        cases.packed("inference", 3, 8, 2, 4),
        cases.packed("training", 3, 8, 2, 4),
        cases.step(4),
        cases.pooling("inference", 2, 5, 4),
        cases.pooling("training", 2, 5, 4),
        cases.prefix("inference", 2, 5, 4),
        cases.prefix("training", 2, 70, 4),
        cases.model_training(2, 3, 5, 4, 6),
        cases.model_generation(1, 4, 5, 4, 6),
    ],
    ids=lambda case: case.name,
)
def test_contestants_agree_with_the_reference(case: Case) -> None:
    # Without torch.compile, which takes half a minute for them all.
    words = [word for word in peers.LIBRARIES if word != "compile"]
    settings = dataclasses.replace(SETTINGS, rounds=1, libraries=words, absent=peers.absent())
    result = contest.run(case, settings)
    for entry in (result["ours"], *result["peers"]):
        assert entry["status"] in ("measured", "absent"), entry
