from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_ext.text import language
from llm_ext.text import train as training
from llm_ext.text.carry import Carrier
from llm_ext.text.checkpoint import STATE, WEIGHTS, Run
from llm_ext.text.corpus import encode
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import evaluate
from llm_ext.text.report import read_log
from llm_ext.text.train import resume, train

from .conftest import small

CLOCK = ("seconds", "tokens_per_second")


def log(out: Path) -> list[dict[str, Any]]:
    records = [dict(record) for record in read_log(out / "log.jsonl")]
    for record in records:
        for key in CLOCK:
            assert record.pop(key) >= 0
    return records


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT, during: str = "_step") -> None:
    """Send this process a signal in the course of a step, or of the validation after it."""
    original: Callable[..., None] = getattr(training._Trainer, during)

    def wrapped(self: Any, *arguments: Any) -> None:
        if self.progress.step == step:
            os.kill(os.getpid(), number)
        original(self, *arguments)

    monkeypatch.setattr(training._Trainer, during, wrapped)


def assert_same(one: Path, other: Path) -> None:
    """Bitwise the same results, whatever the clock said."""
    assert log(one) == log(other)
    for which in ("last", "best"):
        a, b = Run(one).checkpoint(which), Run(other).checkpoint(which)
        assert a.step == b.step
        for file in (WEIGHTS, STATE):
            ours, theirs = a.tensors(file), b.tensors(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        progress = [checkpoint.config["training"]["progress"] for checkpoint in (a, b)]
        assert {**progress[0], "seconds": 0} == {**progress[1], "seconds": 0}


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "hidden", "layers": 1},
        {"attention": "embedding", "score": "tanh", "layers": 2},
        {"attention": "none", "layers": 2},
        {"attention": "none", "layers": 1, "cell": "gru"},
        {"attention": "hidden", "layers": 2, "cell": "lstm"},
    ],
)
def test_resuming_gives_the_numbers_of_a_run_that_never_stopped(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    config = small(**settings, dropout=0.2, steps=45, patience=20)
    assert train(config, [text], tmp_path / "whole").signal == 0
    out = tmp_path / "parts"
    # In the middle of a record of the log, in a validation, and at the start of another pass over the text.
    with monkeypatch.context() as context:
        signal_at(context, 7)
        assert train(config, [text], out).signal == signal.SIGINT
    assert Run(out).checkpoint("last").step == 8
    with monkeypatch.context() as context:
        signal_at(context, 20, signal.SIGTERM, during="_validate")
        assert resume(out, {}).signal == signal.SIGTERM
    assert Run(out).checkpoint("last").config["training"]["progress"]["validated"] == 10
    with monkeypatch.context() as context:
        signal_at(context, 33)
        assert resume(out, {}).signal == signal.SIGINT
    assert resume(out, {}).signal == 0
    assert_same(tmp_path / "whole", out)


def test_resuming_what_was_saved_before_there_was_a_choice_of_cells(text: Path, tmp_path: Path) -> None:
    for out in ("whole", "parts"):
        train(small(), [text], tmp_path / out)
    config = Run(tmp_path / "parts").checkpoint("last").path / "config.json"
    value = json.loads(config.read_text())
    assert value["model"].pop("cell") == value["training"]["config"].pop("cell") == "rnn"
    config.write_text(json.dumps(value))
    for out in ("whole", "parts"):
        assert resume(tmp_path / out, {"steps": 40}).progress.step == 40
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["cell", "attention.c"])
def test_a_state_that_is_not_whole(text: Path, tmp_path: Path, name: str) -> None:
    train(small(cell="lstm"), [text], tmp_path)
    run = Run(tmp_path)
    last = run.checkpoint("last")
    model, weights, state = last.config["model"], last.tensors(WEIGHTS), last.tensors(STATE)
    del state[name]
    run.save(last.step, model, weights, last.config["training"], state, best=False)
    with pytest.raises(TextError, match=rf"damaged: no '{name}' in it"):
        resume(tmp_path, {"steps": 40})


def test_a_signal_at_the_very_start(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(), [text], tmp_path / "whole")
    with monkeypatch.context() as context:
        context.setattr(training._Trainer, "_introduce", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        assert train(small(), [text], tmp_path / "parts").signal == signal.SIGTERM
    assert Run(tmp_path / "parts").checkpoint("last").step == 0
    assert resume(tmp_path / "parts", {}).signal == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_crash_after_the_checkpoint_is_forgotten(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log says of steps that were lost goes, as does a line cut short."""
    train(small(), [text], tmp_path / "whole")
    out = tmp_path / "parts"
    with monkeypatch.context() as context:
        original = training._Trainer._step

        def crash(self: Any, part: float) -> None:
            if self.progress.step == 18:
                raise RuntimeError("crash")
            original(self, part)

        context.setattr(training._Trainer, "_step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(small(), [text], out)
    assert log(out)[-1]["step"] == 15
    with open(out / "log.jsonl", "a") as file:
        file.write('{"event": "trai')
    assert Run(out).checkpoint("last").step == 10
    resume(out, {})
    assert_same(tmp_path / "whole", out)


def test_the_loss_falls_and_the_best_is_what_was_measured(text: Path, tmp_path: Path) -> None:
    outcome = train(small(steps=200, validate_every=50, lr=1e-2), [text], tmp_path / "run")
    records = log(tmp_path / "run")
    losses = [record["loss"] for record in records if record["event"] == "validation"]
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 3.2
    assert outcome.progress.best_loss == min(losses)
    run = Run(tmp_path / "run")
    model, tokens = run.load("best")
    corpus = encode([text], tokens, tmp_path / "run" / "cache")
    begin = corpus.split(0.1)
    score = evaluate(Carrier(model), corpus, begin, len(corpus), tokens, torch.device("cpu"))
    assert score.loss == pytest.approx(min(losses), abs=1e-6)
    assert (tmp_path / "run" / "loss.svg").read_text().lstrip().startswith("<?xml")


def test_early_stop_keeps_the_best(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.5, 1.6, 1.5, 1.7, 1.0])
    original = language.evaluate

    def scripted(*arguments: Any, **options: Any) -> Any:
        score = original(*arguments, **options)
        return type(score)(next(losses) * score.tokens, score.tokens, score.characters, score.bytes)

    monkeypatch.setattr(language, "evaluate", scripted)
    outcome = train(small(steps=1000, patience=3), [text], tmp_path / "run")
    assert outcome.progress.step == 50
    assert Run(tmp_path / "run").checkpoint("best").step == 20
    assert Run(tmp_path / "run").checkpoint("last").step == 50
    assert resume(tmp_path / "run", {}).progress.step == 50


def test_minutes_end_the_training_and_drive_the_schedule(text: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    outcome = train(small(steps=None, minutes=0.03, validate_every=10**6), [text], tmp_path / "run")
    assert 1.8 <= outcome.progress.seconds < time.perf_counter() - started < 20
    records = log(tmp_path / "run")
    rates = [record["rate"] for record in records if record["event"] == "training"]
    assert rates[-1] < 0.05 * max(rates)  # the last step may start a little before the time is over
    assert max(rates) > 1.9e-3
    assert records[-1]["event"] == "validation"
    more = resume(tmp_path / "run", {"minutes": 0.04})
    assert more.progress.step > outcome.progress.step


def test_more_steps_than_were_asked_for(text: Path, tmp_path: Path) -> None:
    train(small(), [text], tmp_path / "run")
    assert resume(tmp_path / "run", {}).progress.step == 30
    assert resume(tmp_path / "run", {"steps": 40}).progress.step == 40


def test_a_text_for_validation_of_its_own(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "val.txt"
    other.write_text("quiz: the mat was good " * 20)
    train(small(), [text], tmp_path / "run", val=[other])
    train(small(val_fraction=0.0), [text], tmp_path / "run2", val=[other])
    assert log(tmp_path / "run") == log(tmp_path / "run2")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_and_names_the_step(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str) -> None:
    original = training._Trainer._step

    def poisoned(self: Any, part: float) -> None:
        if self.progress.step == 13:
            weight = self.model.head.weight
            if poison == "loss":
                weight.data[0, 0] = float("nan")
            else:
                weight.register_hook(lambda gradient: gradient * float("inf"))
        original(self, part)

    monkeypatch.setattr(training._Trainer, "_step", poisoned)
    name = {"loss": "loss", "gradient": "norm of the gradients"}[poison]
    with pytest.raises(TextError, match=rf"step 14: the {name} is (nan|inf); .* the checkpoint of step 10 is kept"):
        train(small(), [text], tmp_path / "run")
    assert Run(tmp_path / "run").checkpoint("last").step == 10
    weights = Run(tmp_path / "run").checkpoint("last").tensors(WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_nan_before_anything_was_saved(text: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="nothing was saved yet"):
        train(small(lr=1e38, warmup=0.0, nonlinearity="relu", clip=0.0), [text], tmp_path / "run")


def test_a_disk_that_fills_up(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    original = os.fsync

    def full(descriptor: int) -> None:
        if Run(out).exists() and Run(out).checkpoint("last").step == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(
            TextError,
            match=r"step \d+ cannot be saved in .*: No space left.*; the checkpoint of step 10 is kept",
        ):
            train(small(), [text], out)
    Run(out).load("best")
    assert resume(out, {}).progress.step == 30
    train(small(), [text], tmp_path / "whole")
    assert_same(out, tmp_path / "whole")


def test_a_run_is_not_overwritten(text: Path, tmp_path: Path) -> None:
    train(small(), [text], tmp_path / "run")
    with pytest.raises(TextError, match="holds a run already"):
        train(small(), [text], tmp_path / "run")


def test_resuming_on_another_text_or_batch(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(), [text], out)
    config = Run(out).checkpoint("last").path / "config.json"
    saved = config.read_text()
    value = json.loads(saved)
    value["training"]["config"]["batch"] = 5
    config.write_text(json.dumps(value))
    with pytest.raises(TextError, match="batch × processes must be 4 as before, got 5"):
        resume(out, {"steps": 40})
    value["training"]["config"] = {"colour": "red"}
    config.write_text(json.dumps(value))
    with pytest.raises(TextError, match=r"config.json: damaged: .*colour"):
        resume(out, {})
    config.write_text(saved)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(TextError, match="the text has changed"):
        resume(out, {"steps": 40})
    text.unlink()
    with pytest.raises(TextError, match="no such file"):
        resume(out, {"steps": 40})


def test_a_text_too_short(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc" * 10)
    with pytest.raises(TextError, match=r"must have more than batch × chunk = 4 × 8 = 32 tokens, got 27"):
        train(small(), [path], tmp_path / "run")
    with pytest.raises(TextError, match=r"validation must have at least 2 tokens, got 0"):
        train(small(val_fraction=0), [path], tmp_path / "run")


def test_bf16(text: Path, tmp_path: Path) -> None:
    outcome = train(small(precision="bf16-mixed"), [text], tmp_path / "run")
    exact = train(small(), [text], tmp_path / "exact")
    assert outcome.progress.best_loss == pytest.approx(exact.progress.best_loss, abs=0.02)
    weights = Run(tmp_path / "run").checkpoint("last").tensors(WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_a_device_that_is_not_there(text: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="accelerator 'warp' cannot be used"):
        train(small(accelerator="warp"), [text], tmp_path / "run")
