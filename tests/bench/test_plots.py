"""Pictures are drawn from a record."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from bench import plots
from bench.cases import cpu

pytest.importorskip("matplotlib")


def _entry(name: str, library: str, ratio: float, work: float) -> dict[str, Any]:
    return {"name": name, "library": library, "ratio": ratio, "median_s": ratio * work, "peak_bytes": 10**6}


def _fill(record: dict[str, Any]) -> dict[str, Any]:
    """Add every case of the CPU: torch takes twice as long, or eight times the second shape; JAX takes thrice."""
    for case in cpu.CASES:
        kind = case.name.split("/")[1]
        ratio = 8.0 if "/B8-T128-I256-H512" in case.name else 2.0
        ours = _entry(f"llm_ext.{kind}", "llm_ext", 1.0, case.work)
        others = [_entry(f"torch.{kind}", "torch", ratio, case.work), _entry("JAX", "jax", 3.0, case.work)]
        if case.group == plots.SCALING_GROUP:
            del others[1]
        record["cases"].append({"case": case.name, "group": case.group, "ours": ours, "others": others})
    return record


def test_speedup_is_the_geometric_mean_over_whole_sequences(record: dict[str, Any], tmp_path: Path) -> None:
    run = _fill(record)
    for phase, shapes in (("inference", 7), ("training", 8)):
        for cell in ("RNN", "GRU", "LSTM"):
            expected = statistics.geometric_mean([8.0] + [2.0] * (shapes - 1)), 3.0
            assert plots.mean_speedups(run, phase, cell) == pytest.approx(expected)
    plots.draw_speedup(run, tmp_path / "speedup.svg")
    drawn = (tmp_path / "speedup.svg").read_text(encoding="utf-8")
    for words in ("Inference, 7 shapes", "Training, 8 shapes", "over torch.nn", "over JAX", "2.44", "a CPU, AVX2"):
        assert words in drawn
    # A case without a peer would change what the mean is over.
    run["cases"][0]["others"] = []
    assert plots.mean_speedups(run, "inference", "RNN") is None


def test_pictures_of_all_cases(record: dict[str, Any], tmp_path: Path) -> None:
    run = _fill(record)
    words = {
        "overview": ("recurrence/gru-odd-training", "torch", "JAX", "time of the candidate"),
        "scaling": (
            "B, sequences in the batch",
            "H, hidden size",
            "T, time steps",
            "B 8, T 128",
            "llm_ext.gru-inference",
        ),
        "lengths": ("T, positions", "peak memory, MB", "llm_ext.training", "torch.training"),
    }
    for name, expected in words.items():
        path = tmp_path / f"{name}.svg"
        getattr(plots, f"draw_{name}")(run, path)
        drawn = path.read_text(encoding="utf-8")
        assert [text for text in expected if text not in drawn] == []
    plots.draw_overview(run, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_cases_can_be_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    for draw in (plots.draw_speedup, plots.draw_overview, plots.draw_lengths):
        draw(record, tmp_path / "empty.svg")
    plots.draw_scaling(record, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
