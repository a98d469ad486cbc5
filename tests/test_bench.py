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

from bench import cases, contest, cuda, limits, memory, peers, plot, report, timing, translation
from bench.__main__ import chosen, listing, main
from bench.cells import CELLS, GRU, LSTM, RNN
from bench.contest import LIMIT, OURS, Case, Contest, Contestant, Mean, Settings

SETTINGS = Settings(
    threads=2, dtype=torch.float32, seconds=0.01, rounds=2, libraries=list(peers.LIBRARIES), absent=["jax"]
)


AT_BEST = {
    "copy_gb_per_s": 3.0,
    "product_gflop_per_s": 4.0,
    "read_gb_per_s": 2.0,
    "fma_gflop_per_s": 5.0,
    "absent": None,
}


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
    assert {case.group for case in chosen(cases.CASES, ["recurrence"])} == {"recurrence", "step"}
    assert [case.name for case in chosen(cases.CASES, ["training/B32*-L2"])] == [
        "recurrence/training/B32-T128-I256-H512-L2",
        "recurrence/gru-training/B32-T128-I256-H512-L2",
        "recurrence/lstm-training/B32-T128-I256-H512-L2",
    ]
    with pytest.raises(ValueError, match="no case matches 'B3000'"):
        chosen(cases.CASES, ["B32", "B3000"])
    assert "bar 3 × torch.nn.RNN" in listing(cases.CASES)
    assert "recurrence/lstm-training/*: bar 1.5 × torch.nn.LSTM" in listing(cases.CASES, cases.MEANS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing-of-this-name"],
        ["all", "--peers", "torch,haste"],
        ["all", "--threads", "0"],
        ["all", "--json", "no/x"],
        ["step", "--curves", "x.svg"],
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


def test_a_contestant_may_have_a_truth_of_its_own() -> None:
    def build(dtype: torch.dtype, threads: int) -> Contest:
        peer = Contestant("another way", OURS, returning(3.0), truth=[torch.tensor([1.0, 3.0]).double()])
        truth = [torch.tensor([1.0, 2.0]).double()]
        return Contest(truth, Contestant("ours", OURS, returning(2.0)), [peer])

    # It takes part whichever libraries do.
    settings = dataclasses.replace(SETTINGS, libraries=[])
    (peer,) = contest.run(Case("small/inference/B1", build, False, 1.0, "thing"), settings)["peers"]
    assert peer["status"] == "measured"


def test_a_case_may_have_a_dtype_of_its_own() -> None:
    seen = []

    def build(dtype: torch.dtype, threads: int) -> Contest:
        seen.append(dtype)
        return Contest([], Contestant("ours", OURS, lambda: lambda: []), [])

    result = contest.run(Case("small/step/B1", build, False, 1.0, "GB", dtype=torch.float64), SETTINGS)
    assert seen == [torch.float64]
    assert (result["dtype"], result["work"]) == ("float64", 2.0)


def entries(name: str, **peers: float | str) -> dict[str, object]:
    """A case of a report: ratios by name of a peer, or why there is none."""
    found = [
        {"name": peer, "library": "torch", "bar": None}
        | ({"status": value} if isinstance(value, str) else {"status": "measured", "ratio": value})
        for peer, value in peers.items()
    ]
    return {"case": name, "peers": found}


def test_mean_takes_the_closest_of_each_case() -> None:
    names = ["a/x/1", "a/x/2", "a/x/3", "b/x/1"]
    measured = [
        entries("a/x/1", one=8.0, two=2.0, other=0.1),
        entries("a/x/2", one=4.0, two="failed", other=0.1),
        entries("b/x/1", one=100.0, two=100.0),
    ]
    wanted = Mean(["a/x/*"], ["one", "two"], bar=2.8)
    part = contest.mean(wanted, names, measured, SETTINGS)
    assert (part["cases"], part["cases_expected"]) == (2, 3)
    assert part["ratio"] == pytest.approx(8**0.5)
    assert part["met"] is None
    assert "2.83 × against the closest of one, two over a/x/* (2 of 3 cases): bar 2.8 not" in report.mean_line(part)

    whole = contest.mean(wanted, names, [*measured, entries("a/x/3", one=1.0, two=1.0)], SETTINGS)
    assert whole["ratio"] == pytest.approx(2)
    assert whole["met"] is False
    assert "missed: the mean 2 × against" in report.summary([], [whole])
    assert contest.mean(wanted, names[:2], measured, SETTINGS)["met"] is True
    # Without one of the peers, the others' mean is not what the bar is about.
    assert contest.mean(wanted, names, [entries("a/x/1", one=8.0, two="absent")], SETTINGS)["ratio"] is None
    assert contest.mean(wanted, names, [entries("a/x/1", one=8.0)], SETTINGS)["ratio"] is None
    other_setting = dataclasses.replace(SETTINGS, threads=3)
    assert contest.mean(wanted, names[:2], measured, other_setting)["bar"] is None


def test_means_are_over_the_shapes_of_the_tables() -> None:
    names = [case.name for case in cases.CASES]
    numbers = {
        tuple(mean.of): contest.mean(mean, names, [], SETTINGS)["cases_expected"]
        for mean in cases.MEANS
        if mean.bar is not None
    }
    inference = [f"recurrence/{prefix}inference/*" for prefix in ("", "gru-", "lstm-")]
    training = [f"recurrence/{prefix}training/*" for prefix in ("", "gru-", "lstm-")]
    assert numbers == {tuple(inference): 21, **{(name,): 7 for name in inference}, **{(name,): 8 for name in training}}


def test_work_counts_every_product() -> None:
    # Of each row: U h and W x, with G gates, two operations a weight.
    for cell, gates in ((RNN, 1), (GRU, 3), (LSTM, 4)):
        assert cases.alone(cell, 8, 128, 512, None).work == 2 * 8 * 128 * gates * 512 * (512 + 1) / 1e9
    two_layers = cases.recurrence(LSTM, "training", 2, 3, 5, 7, layers=2)
    assert two_layers.work == pytest.approx(3 * 2 * 6 * 4 * 7 * (5 + 7 + 7 + 7) / 1e9)


def test_a_limit_is_no_rival() -> None:
    limit = {"name": "FMA peak", "library": LIMIT, "status": "measured", "ratio": 0.875, "bar": 0.85, "met": True}
    assert report.verdict(limit) == "88% of the limit, bar 0.85 met"
    assert report.verdict(limit | {"library": "torch"}) == "LOSES, bar 0.85 met"
    ours = {"name": "llm_ext.RNN", "library": OURS, "status": "measured"}
    closing = report.summary([{"case": "a/x/1", "ours": ours, "peers": [limit]}])
    assert "Bars met: 1 of 1." in closing
    assert "Lost: 0 of 0 comparisons." in closing


@pytest.mark.skipif(limits.absent() is not None, reason=str(limits.absent()))
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_do_all_of_their_work(threads: int) -> None:
    for gflop in (0.0, 1e-6, 5e-6, 1e-3):
        assert limits.multiply_add(gflop, threads)() == pytest.approx(1)
    for floats in (1, 1000, 4097):
        assert limits.read(floats, 3, threads)() == pytest.approx(1)


def test_limits_say_why_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    limits._library.cache_clear()
    try:
        monkeypatch.setattr(limits.shutil, "which", lambda name: None)
        assert "no g++" in str(limits.absent())
        with pytest.raises(RuntimeError, match=r"no g\+\+"):
            limits.multiply_add(1.0, 1)
    finally:
        limits._library.cache_clear()
    run = {"limits": AT_BEST | {"absent": "no reason"}, "settings": {"libraries": [], "absent": []}}
    run["settings"] |= {"threads": 2, "dtype": "float32", "device": "cpu"}
    printed = report.header(run | {"machine": report.machine(), "versions": report.versions()})
    assert "No FMA peak and no reads: no reason" in printed


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run: dict[str, object] = {"machine": {"cpu": "a machine"}, "settings": {"threads": 2, "dtype": "float32"}}
    points = [case for case in cases.CASES if case.group == plot.CURVES]
    run["cases"] = [
        {
            "case": case.name,
            "group": case.group,
            "ours": {"name": f"llm_ext.{case.name.split('/')[1]}", "median_s": case.work},
            "peers": [{"name": f"torch.nn.{case.name.split('/')[1]}", "median_s": 2 * case.work}],
        }
        for case in points
    ]
    plot.growth(run, tmp_path / "all.svg")
    drawn = (tmp_path / "all.svg").read_text(encoding="utf-8")
    for words in ("B, sequences in the batch", "H, hidden size", "T, time steps", "median), ms", "B 8, T 128"):
        assert words in drawn
    for name in ("llm_ext.gru-inference", "torch.nn.lstm-inference"):
        assert name in drawn
    # A run that was interrupted before its first case leaves nothing to draw.
    plot.growth(run | {"cases": []}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_lengths_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run: dict[str, object] = {"machine": {"cpu": "a machine"}, "settings": {"threads": 2, "dtype": "float32"}}
    run["cases"] = [
        {
            "case": case.name,
            "ours": {"name": "llm_ext.AttentionPool", "median_s": case.work, "peak_bytes": 10**6},
            "peers": [{"name": f"torch, for {case.group}", "median_s": 2 * case.work}],
        }
        for case in cases.CASES
    ]
    plot.lengths(run, tmp_path / "lengths.svg")
    drawn = (tmp_path / "lengths.svg").read_text(encoding="utf-8")
    for words in ("T, positions", "at its peak, MB", "llm_ext.AttentionPool"):
        assert words in drawn
    for group in plot.LENGTHS:
        assert f"torch, for {group}" in drawn


@pytest.mark.skipif(memory.absent() is not None, reason="peaks cannot be measured here")
def test_peak_of_memory() -> None:
    """Of a contestant that takes more than it returns: what it takes at once, and nothing of the calls before."""
    mb = 2**20

    def call() -> Tensor:
        return torch.ones(64 * mb, dtype=torch.uint8)[: 8 * mb].clone()

    build: Callable[..., Contest] = lambda dtype, threads: Contest(  # noqa: E731
        [torch.ones(8 * mb)], Contestant("ours", "llm_ext", lambda: call), []
    )
    case = Case("small/inference/B1", build, False, 1.0, "thing", memory=True)
    entry = contest.run(case, dataclasses.replace(SETTINGS, rounds=1))["ours"]
    # 72 MB, which Linux counts by the batch of pages.
    assert 71 * mb <= entry["peak_bytes"] < 80 * mb
    assert "MB" in report.table(contest.run(case, dataclasses.replace(SETTINGS, rounds=1)))


def test_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(limits, "measure", lambda threads: AT_BEST)
    monkeypatch.setattr(peers, "absent", lambda device: ["jax"])
    monkeypatch.setattr(peers, "prepare", lambda threads: None)
    files = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["small", "--threads", "2", "--seconds", "0.01", "--rounds", "3"]
    means = [Mean(["small/*"], ["right"], bar=0.001), Mean(["small/*"], ["right", "missing"], bar=2)]
    assert main([*arguments, "--json", str(files[0]), "--plot", str(files[1])], [small_case()], means) == 0
    printed = capsys.readouterr().out
    assert "Left out, not installed (pip install --no-build-isolation '.[bench]'): jax" in printed
    assert "Read 2 GB/s, FMA peak 5 GFLOP/s, at best" in printed
    assert "against right over small/* (1 of 1 cases): bar 0.001 met" in printed
    assert "Bars met: 2 of 4." in printed

    run = json.loads(files[0].read_text(encoding="utf-8"))
    assert run["format"] == 1
    assert {"cpu", "cores", "memory_gb", "system", "load"} == run["machine"].keys()
    assert {"python", "llm_ext", "build_info", "peers"} == run["versions"].keys()
    assert run["settings"]["dtype"] == "float32"
    assert [(mean["cases"], mean["met"]) for mean in run["means"]] == [(1, True), (0, None)]
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
        *(
            case
            for cell in CELLS
            for case in (
                cases.recurrence(cell, "inference", 3, 5, 2, 4),
                cases.recurrence(cell, "training", 3, 5, 2, 4, layers=2),
                cases.odd(cell, "training", 3, 4, 1, 5),
                cases.packed(cell, "inference", 3, 8, 2, 4),
                cases.packed(cell, "training", 3, 8, 2, 4),
                cases.alone(cell, 3, 5, 4, bar=0.85),
                cases.alone(cell, 1, 5, 4, bar=0.8),
                cases.step(cell, 4),
                cases.scaling(cell, 2, 3, 4),
            )
        ),
        cases.linear("inference", 3, 5, 4),
        cases.linear("training", 3, 5, 4),
        cases.pooling("inference", 2, 5, 4),
        cases.pooling("training", 2, 5, 4),
        cases.prefix("inference", 2, 5, 4),
        cases.prefix("training", 2, 70, 4),
        cases.additive("inference", 2, 3, 5, 4),
        cases.additive("training", 2, 3, 5, 4),
        *(cases.streaming(group, way, 2, 70, 4) for group in ("pooling", "prefix") for way in ("forward", "backward")),
        cases.streaming("prefix", "backward", 2, 70, 4, dtype=torch.bfloat16),
        cases.model_training(2, 3, 5, 4, 6),
        cases.model_generation(1, 4, 5, 4, 6),
        translation.training(3, 7, 5, 4, 6),
        translation.greedy(5, 2, 4, 5, 4, 6),
    ],
    ids=lambda case: case.name,
)
def test_contestants_agree_with_the_reference(case: Case) -> None:
    # Without torch.compile, which takes half a minute for them all.
    words = [word for word in peers.LIBRARIES if word != "compile"]
    absent = [*peers.absent(), *([] if limits.absent() is None else [LIMIT])]
    settings = dataclasses.replace(SETTINGS, rounds=1, libraries=words, absent=absent)
    result = contest.run(case, settings)
    for entry in (result["ours"], *result["peers"]):
        assert entry["status"] in ("measured", "absent"), entry


CASES_OF_ATTENTION = [
    *(cuda.pool_op(causal, mode, torch.float32, 2, 9, 4) for causal in (False, True) for mode in cuda.MODES),
    *(cuda.pool(causal, mode, torch.float32, 2, 9, 4) for causal in (False, True) for mode in cuda.MODES),
    *(cuda.additive(mode, torch.float32, 2, 3, 5, 4) for mode in cuda.MODES),
]


@pytest.mark.parametrize(
    "case",
    [
        case
        for cell in CELLS
        for case in (
            cuda.recurrence(cell, "inference", torch.float32, 3, 5, 2, 4, layers=2, both=True),
            cuda.recurrence(cell, "training", torch.bfloat16, 3, 5, 2, 4, layers=2, both=True),
            cuda.recurrence(cell, "training", torch.float32, 3, 5, 2, 4, more=True, tf32=True),
            cuda.lengths(cell, "inference", torch.float32, 5, 8, 2, 4, bar=5),
            cuda.lengths(cell, "training", torch.float32, 5, 8, 2, 4, bar=5),
        )
    ]
    + CASES_OF_ATTENTION,
    ids=lambda case: case.name,
)
def test_contestants_of_a_gpu_agree_with_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which has the same layers."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    result = contest.run(case, dataclasses.replace(SETTINGS, rounds=1, libraries=["torch", "haste"], absent=["haste"]))
    for entry in (result["ours"], *result["peers"]):
        assert entry["status"] in ("measured", "absent"), entry


def test_cases_of_a_gpu_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda", "--list"]) == 0
    printed = capsys.readouterr().out
    assert len({case.name for case in cuda.CASES}) == len(cuda.CASES)
    assert "cuda/lstm-bfloat16-training/B64-T256-I512-H512-L2-bidirectional" in printed
    assert "bar 5 × torch.nn.GRU, packed" in printed
    assert "bar 1.5 × torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_asked_for_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda needs a GPU" in capsys.readouterr().err
