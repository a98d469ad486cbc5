"""`python -m bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import peers
from bench.__main__ import listing, main, select_cases
from bench.cases import cpu, cuda
from bench.comparison import Case, Mean


@pytest.mark.parametrize(("device", "cases"), [("cpu", cpu.CASES), ("cuda", cuda.CASES)])
def test_list_names_every_case_once(device: str, cases: tuple[Case, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", device, "--list"]) == 0
    printed = capsys.readouterr().out
    assert [case.name for case in cases if case.name not in printed] == []
    assert len({case.name for case in cases}) == len(cases)
    assert "python -m bench PATTERN" in printed.splitlines()[-1]


def test_listing_has_targets_of_cases_and_means() -> None:
    printed = listing(cpu.CASES, cpu.MEANS)
    assert "target 3x torch.nn.RNN" in printed
    assert "recurrence/lstm-training/*: target 1.5x torch.nn.LSTM" in printed
    printed = listing(cuda.CASES, cuda.MEANS)
    assert "cuda/lstm-bfloat16-training/B64-T256-I512-H512-L2-bidirectional" in printed
    assert "target 5x torch.nn.GRU, packed" in printed
    assert "target 1.5x torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM" in printed


def test_patterns_select_groups_and_parts_of_names() -> None:
    assert select_cases(cpu.CASES, ["all"]) == list(cpu.CASES)
    assert {case.group for case in select_cases(cpu.CASES, ["step", "model"])} == {"step", "model"}
    assert {case.group for case in select_cases(cpu.CASES, ["recurrence"])} == {"recurrence", "step"}
    assert {case.group for case in select_cases(cpu.CASES, ["attention"])} == {"pooling", "prefix", "additive"}
    assert [case.name for case in select_cases(cpu.CASES, ["training/B32*-L2"])] == [
        "recurrence/training/B32-T128-I256-H512-L2",
        "recurrence/gru-training/B32-T128-I256-H512-L2",
        "recurrence/lstm-training/B32-T128-I256-H512-L2",
    ]
    with pytest.raises(ValueError, match="no case matches 'B3000'"):
        select_cases(cpu.CASES, ["B32", "B3000"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-of-this-name"], "no case matches"),
        (["all", "--peers", "torch,haste"], "got haste"),
        (["all", "--threads", "0"], "must be above 0"),
        (["all", "--json", "no/x"], "folder does not exist"),
        (["step", "--curves", "x.svg"], "none is selected"),
        (["--from", "no.json"], "no.json"),
        (["--from", "pyproject.toml"], "Expecting value"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--curves" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.split("error: ")[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("measured_limits")
def test_run_is_printed_written_and_read_again(
    make_case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(peers, "not_installed", lambda device: ["jax"])
    monkeypatch.setattr(peers, "set_environment", lambda threads: None)
    path, picture = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["small", "--threads", "2", "--seconds", "0.01", "--rounds", "3", "--json", str(path)]
    means = [Mean(["small/*"], ["slow"], target=0.001), Mean(["small/*"], ["slow", "missing"], target=2)]
    assert main([*arguments, "--overview", str(picture)], [make_case()], means) == 0
    printed = capsys.readouterr().out
    assert "over slow: small/* (1 of 1 cases), target 0.001x met" in printed
    assert "Targets met: 2 of 4." in printed
    assert "small/inference" in picture.read_text(encoding="utf-8")

    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["settings"]["dtype"] == "float32"
    assert [(mean["cases_measured"], mean["met"]) for mean in run["means"]] == [(1, True), (0, None)]
    (case,) = run["cases"]
    assert (case["ours"]["rounds"], case["others"][0]["target"]) == (3, 1.5)

    assert main(["--from", str(path)]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line for line in printed.splitlines() if "×" in line or line not in again] == []
    assert main(arguments, [make_case(ours=0.0)]) == 1
