"""llm-ext train --dp-epsilon."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_runs import language_config, translation_config

from llm_ext.cli import main
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training import read_log, resume, train
from llm_ext.cli.training.privacy import Privacy, PrivateLanguageTask, PrivateTask
from llm_ext.cli.training.trainer import Trainer

pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")

PRIVATE: dict[str, Any] = {"dp_epsilon": 4.0, "dp_delta": 1e-3, "steps": 20}


def account(run: Path) -> Any:
    return Run(run).checkpoint("last").config["training"]["privacy"]["history"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two six ten. " * 120)
    return path


def test_the_batches_do_not_follow_from_the_seed() -> None:
    drawn = []
    for _ in range(2):
        task: Any = object.__new__(PrivateLanguageTask)
        task.config = language_config(**PRIVATE)
        task.batch = 50
        task.prepare_sampling(1000)
        drawn.append(task.draw().tolist())
    assert drawn[0] != drawn[1]


def test_a_resumed_training_adds_the_noise_of_the_account() -> None:
    """Fewer steps than before would need less noise."""
    from opacus.accountants import create_accountant

    privacy: Any = object.__new__(Privacy)
    privacy.steps, privacy.rate, privacy.delta, privacy.epsilon = 20, 0.1, 1e-3, 100.0
    privacy.optimizer, privacy.accountant = SimpleNamespace(noise_multiplier=0.5), create_accountant("rdp")
    privacy.restore({"noise": 2.0, "history": [[2.0, 0.1, 5]]}, 5)
    assert privacy.noise == privacy.optimizer.noise_multiplier == 2.0


def test_a_resumed_training_continues_the_account(text: Path, tmp_path: Path, signal_at: Any, capsys: Any) -> None:
    config, out = language_config(**PRIVATE), tmp_path / "run"
    signal_at(12, signal.SIGTERM)
    assert train(config, [text], out).signal == signal.SIGTERM
    ((_, rate, steps),) = account(out)
    windows = int(len(text.read_text()) * 0.9) // 9
    assert (rate, steps) == (4 / windows, 13)
    with pytest.raises(CommandError, match=r"40 steps would spend epsilon .*, above --dp-epsilon 4"):
        resume(out, {"steps": 40})
    with pytest.raises(CommandError, match="--dp-epsilon trains in one process, got 2"):
        resume(out, {"devices": 2})
    assert resume(out, {}).signal == 0
    assert [each[2] for each in account(out)] == [20]
    spent = [record["epsilon"] for record in read_log(out / "log.jsonl") if record["event"] == "validation"]
    assert spent == sorted(spent)
    assert 3.9 < spent[-1] <= 4
    printed = capsys.readouterr().out
    assert "private: epsilon 4 at delta 0.001 for a window of 9 tokens, after 20 steps" in printed
    assert "epsilon 4," in printed


def test_a_translator_and_a_step_without_samples(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    gradients = Trainer._gradients

    def recorded(self: Trainer, loss: torch.Tensor) -> torch.Tensor:
        assert self.privacy is not None
        self.privacy.optimizer.noise_multiplier = 1e-9  # to see the gradients
        norm = gradients(self, loss)
        norms.append(norm.item() * self.task.batch)
        return norm

    draw = PrivateTask.draw
    steps = iter([True, False] * 50)

    def no_pairs_in_every_second_step(self: PrivateTask) -> Any:
        found = draw(self)
        if next(steps):
            return found
        self.drawn = 0
        return found[:0]

    monkeypatch.setattr(Trainer, "_gradients", recorded)
    monkeypatch.setattr(PrivateTask, "draw", no_pairs_in_every_second_step)
    config = translation_config(**PRIVATE, dp_max_norm=0.01)
    assert train(config, [pairs], tmp_path / "run").signal == 0
    assert max(norms[1::2]) < 1e-8
    # Each of about 8 pairs adds at most the largest norm.
    assert min(norms[::2]) > 0.005
    assert max(norms[::2]) < 0.01 * 25


def test_each_pair_counts_once(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that is drawn n times has the same loss, and n times the gradient, over the expected number of pairs."""
    found: list[tuple[float, float]] = []
    gradients = Trainer._gradients

    def recorded(self: Trainer, loss: torch.Tensor) -> torch.Tensor:
        assert self.privacy is not None
        self.privacy.optimizer.noise_multiplier = 1e-9
        found.append((loss.item(), gradients(self, loss).item()))
        return torch.zeros(())

    def draw(self: PrivateTask) -> Any:
        self.drawn = len(found) + 1
        return np.zeros(self.drawn, dtype=np.int64)

    monkeypatch.setattr(Trainer, "_gradients", recorded)
    monkeypatch.setattr(PrivateTask, "draw", draw)
    options = {"steps": 3, "dp_max_norm": 100.0, "lr": 1e-9, "dropout": 0.0}
    assert train(translation_config(**PRIVATE | options), [pairs], tmp_path / "run").signal == 0
    losses, norms = zip(*found, strict=True)
    assert losses == pytest.approx([losses[0]] * 3)
    assert norms == pytest.approx([n * norms[0] for n in (1, 2, 3)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dp-epsilon", "0"], "--dp-epsilon must be at least 0.01"),
        (["--dp-epsilon", "nan"], "--dp-epsilon must be at least 0.01"),
        (["--dp-epsilon", "3", "--dp-delta", "0.5"], "--dp-delta must be at least 1e-15 and at most 0.1"),
        (["--dp-epsilon", "3", "--minutes", "1"], "--dp-epsilon needs --steps beside --minutes"),
        (["--dp-epsilon", "3", "--precision", "bf16-mixed"], "--dp-epsilon needs --precision 32-true"),
        (["--dp-epsilon", "3", "--task", "classify"], "not for --task classify: --dp-epsilon"),
        (["--dp-epsilon", "3", "--dp-delta", "0.1", "--chunk", "8", "--batch", "4"], "--dp-delta must be below one"),
        (["--dp-epsilon", "3", "--batch", "40", "--chunk", "45"], "--batch must be at most 39 with --dp-epsilon"),
    ],
)
def test_bad_values(options: list[str], message: str, text: Path, tmp_path: Path, capsys: Any) -> None:
    try:
        code = main(["train", str(text), "--out", str(tmp_path / "run"), "--hidden", "8", *options])
    except SystemExit as error:
        code = int(str(error.code))
    assert code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_run_without_privacy_has_no_account(language_model: Path) -> None:
    assert "privacy" not in Run(language_model).checkpoint("last").config["training"]
    assert "epsilon" not in json.dumps(list(read_log(language_model / "log.jsonl")))
