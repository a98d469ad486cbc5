"""Training of all tasks: results, resuming, failures."""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_runs import (
    assert_same_runs,
    classification_config,
    language_config,
    last_step,
    log_without_times,
    losses,
    summary_config,
    transcription_config,
    translation_config,
)
from support.run_files import edit_json

from llm_ext.cli import CommandError, checkpoint
from llm_ext.cli.checkpoint import STATE, WEIGHTS, Run
from llm_ext.cli.data import encode_text
from llm_ext.cli.inference import Score, StatefulLLM, evaluate_text
from llm_ext.cli.training import Config, language, pipeline, resume, train, trainer
from llm_ext.cli.training.trainer import Progress, Trainer

pytestmark = pytest.mark.usefixtures("no_plot")

SignalAt = Callable[..., None]


@pytest.fixture
def files(request: pytest.FixtureRequest, config: Config) -> list[Path]:
    """Training data of a config's task."""
    names = {"lm": "text", "translate": "pairs", "summarize": "pairs"}
    return [request.getfixturevalue(names.get(config.task, "arrays"))]


@pytest.mark.parametrize(
    "config",
    [
        language_config(dropout=0.2, steps=45, patience=20, attention="hidden", cell="lstm", layers=2),
        language_config(dropout=0.2, steps=45, patience=20, attention="embedding", score="tanh", cell="gru"),
        language_config(dropout=0.2, steps=45, patience=20, attention="none", layers=2),
        translation_config(steps=45, patience=20, cell="lstm", layers=2, vocabularies="two", tie_head=False),
        translation_config(steps=45, patience=20, cell="rnn", input_feeding=True, tokens="bpe", vocab_size=300),
        summary_config(steps=45, patience=20, cell="gru", longest_source=12),
        classification_config(steps=45, patience=20, cell="lstm", augment="mask,noise,shift,warp,mix"),
        transcription_config(steps=45, patience=20, cell="gru", augment="mask"),
        transcription_config(steps=45, patience=20, cell="rnn", decoder="attention"),
    ],
    ids=lambda config: f"{config.task}-{config.cell}",
)
def test_resuming_gives_the_results_of_an_uninterrupted_run(
    config: Config, files: list[Path], tmp_path: Path, signal_at: SignalAt
) -> None:
    assert train(config, files, tmp_path / "whole").signal == 0
    out = tmp_path / "parts"
    # Within a record of the log, during a validation, and after it.
    signal_at(7)
    assert train(config, files, out).signal == signal.SIGINT
    assert last_step(out) == 8
    signal_at(20, signal.SIGTERM, before="_validate")
    assert resume(out, {}).signal == signal.SIGTERM
    assert Run(out).checkpoint("last").config["training"]["progress"]["validated"] == 10
    signal_at(33)
    assert resume(out, {}).signal == signal.SIGINT
    assert resume(out, {}).signal == 0
    assert_same_runs(tmp_path / "whole", out)
    assert len(log_without_times(out)) == 9 + 5


def test_a_signal_before_the_first_step(text: Path, tmp_path: Path, before_first_step: None) -> None:
    config = language_config(steps=10)
    assert train(config, [text], tmp_path / "parts").signal == signal.SIGTERM
    assert last_step(tmp_path / "parts") == 0
    assert resume(tmp_path / "parts", {}).signal == 0
    train(config, [text], tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_after_a_crash_drops_later_records_of_the_log(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(language_config(), [text], tmp_path / "whole")
    out = tmp_path / "parts"
    with monkeypatch.context() as context:
        original = Trainer._step

        def crash(self: Trainer, done: float) -> None:
            if self.progress.step == 18:
                raise RuntimeError("crash")
            original(self, done)

        context.setattr(Trainer, "_step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(language_config(), [text], out)
    assert log_without_times(out)[-1]["step"] == 15
    with open(out / "log.jsonl", "a") as file:
        file.write('{"event": "trai')  # an incomplete line
    assert last_step(out) == 10
    resume(out, {})
    assert_same_runs(tmp_path / "whole", out)


@pytest.mark.parametrize(
    "config", [language_config(), translation_config(), classification_config()], ids=lambda config: config.task
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "summary"])
def test_a_damaged_cache_is_written_again(config: Config, files: list[Path], tmp_path: Path, damage: str) -> None:
    train(replace(config, steps=5), files, tmp_path / "whole", cache=tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        data = path.read_bytes()
        if damage == "summary":
            path.write_bytes(data[: -len(data) // 2] if path.suffix == ".json" else data)
        elif path.suffix != ".json":
            size = len(data) // 64 * 32
            path.write_bytes(data[:size] if damage == "truncated" else data[:size] + b"\0" + data[size + 1 :])
    train(replace(config, steps=5), files, tmp_path / "again", cache=tmp_path / "cache")
    assert_same_runs(tmp_path / "whole", tmp_path / "again")


def test_what_prevents_a_save_is_found_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write", full)
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(CommandError, match=r"step 0 cannot be saved in .*: No space left .*; nothing was saved yet"):
        train(language_config(), [text], tmp_path / "run")


@pytest.mark.parametrize(
    "config", [language_config(), translation_config(), classification_config()], ids=lambda config: config.task
)
def test_paths_that_are_not_utf8(config: Config, files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    out = folder / os.fsdecode(b"run\xff")
    folder.mkdir()
    if config.task == "classify":
        draw = np.random.default_rng(0)
        for number in range(60):
            path = folder / "samples" / os.fsdecode(b"\xe9" if number % 2 else b"\xe8") / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, draw.normal(size=(9, 4)) + number % 2)
        file = folder / "samples"
    else:
        file = files[0].rename(folder / os.fsdecode(b"\xff" + os.fsencode(files[0].name)))
    config = replace(config, steps=10)
    assert train(config, [file], out).progress.step == 10
    assert resume(out, {"steps": 20}).progress.step == 20
    train(replace(config, steps=5, init_from=str(out)), [file], folder / "next")
    assert resume(folder / "next", {"steps": 8}).progress.step == 8


def test_checkpoints_without_a_cell_are_elman_networks(text: Path, tmp_path: Path) -> None:
    """They were saved before there was a choice of cells."""
    for out in ("whole", "parts"):
        train(language_config(steps=10), [text], tmp_path / out)
    path = Run(tmp_path / "parts").checkpoint("last").path / "config.json"

    def age(value: dict[str, Any]) -> None:
        assert value["model"].pop("cell") == value["training"]["config"].pop("cell") == "rnn"

    edit_json(path, age)
    for out in ("whole", "parts"):
        assert resume(tmp_path / out, {"steps": 20}).progress.step == 20
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_the_names_of_saved_settings(text: Path, tmp_path: Path) -> None:
    """The device has the name it had when it was the option --accelerator."""
    train(language_config(steps=1), [text], tmp_path)
    settings = Run(tmp_path).checkpoint("last").config["training"]["config"]
    assert settings["accelerator"] == "cpu"
    assert "device" not in settings


@pytest.mark.parametrize(
    "config",
    [language_config(cell="lstm", steps=5), classification_config(steps=5)],
    ids=lambda config: config.task,
)
def test_every_tensor_of_a_state_is_checked(config: Config, files: list[Path], tmp_path: Path) -> None:
    """Moments of another size would let the fused kernel of Adam write out of bounds."""
    out = tmp_path / "run"
    train(config, files, out)
    run = Run(out)
    last = run.checkpoint("last")
    model, weights, state, step = last.config["model"], last.tensors(WEIGHTS), last.tensors(STATE), last.step
    changes: Iterator[Callable[[torch.Tensor], torch.Tensor | None]] = itertools.cycle(
        [
            torch.Tensor.double,
            lambda tensor: None,
            lambda tensor: tensor.flatten().repeat(3),
            lambda tensor: tensor.unsqueeze(-1),
        ]
    )
    for name, tensor in state.items():
        changed = {key: value for key, value in {**state, name: next(changes)(tensor)}.items() if value is not None}
        run.save(step, model, weights, last.config["training"], changed, best=False, task=config.task)
        with pytest.raises(CommandError, match=rf"{STATE}: damaged: {re.escape(name)} must be "):
            resume(out, {"steps": 10})
    run.save(step, model, weights, last.config["training"], state, best=False, task=config.task)
    assert resume(out, {"steps": 10}).progress.step == 10


@pytest.mark.parametrize("config", [language_config(), translation_config()], ids=lambda config: config.task)
def test_what_cannot_be_resumed(config: Config, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, files, out)
    with pytest.raises(CommandError, match="holds a run already"):
        train(config, files, out)
    path = Run(out).checkpoint("last").path / "config.json"
    saved = path.read_text()
    edit_json(path, lambda value: value["training"]["config"].update(batch=5))
    with pytest.raises(CommandError, match=f"each step must have {config.batch} (streams|pairs) as before, got 5"):
        resume(out, {"steps": 40})
    damaged: list[Callable[[dict[str, Any]], object]] = [
        lambda value: value["training"].update(config={"colour": "red"}),
        lambda value: value["training"].update(config=7),
    ]
    for change in damaged:
        edit_json(path, change)
        with pytest.raises(CommandError, match=r"config.json: damaged: "):
            resume(out, {})
    path.write_text(saved)
    lines = files[0].read_text().splitlines()
    files[0].write_text("\n".join(lines[: len(lines) * 3 // 4]))
    with pytest.raises(CommandError, match="the text has changed"):
        resume(out, {"steps": 40})
    files[0].unlink()
    with pytest.raises(CommandError, match="no such file"):
        resume(out, {"steps": 40})


def test_a_run_that_begins_meanwhile_is_refused(
    language_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock = tmp_path / "run", pipeline._locked

    def begun(*arguments: Any) -> Any:
        shutil.copytree(language_model, out)
        return lock(*arguments)

    monkeypatch.setattr(pipeline, "_locked", begun)
    with pytest.raises(CommandError, match="holds a run already"):
        train(language_config(steps=1), [text], out)


@pytest.mark.parametrize("config", [classification_config(), translation_config()], ids=lambda config: config.task)
def test_labels_are_smoothed(config: Config, files: list[Path], tmp_path: Path) -> None:
    found = []
    for smoothing in (0.0, 0.5):
        changed: dict[str, Any] = {"steps": 1, "log_every": 1, "label_smoothing": smoothing}
        train(replace(config, **changed), files, tmp_path / f"{smoothing}")
        found.append(next(record["loss"] for record in log_without_times(tmp_path / f"{smoothing}")))
    assert found[0] != found[1]


def test_a_validation_loss_that_is_not_finite_ends_the_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "evaluate_text", lambda *_: Score(math.nan, 10, 10, 10))
    with pytest.raises(CommandError, match="the validation loss is nan"):
        train(language_config(steps=1), [text], tmp_path / "run")


def test_the_loss_falls_and_the_best_checkpoint_has_the_logged_loss(text: Path, tmp_path: Path) -> None:
    outcome = train(language_config(steps=200, validate_every=50, lr=1e-2), [text], tmp_path / "run")
    validation = [r["loss"] for r in log_without_times(tmp_path / "run") if r["event"] == "validation"]
    assert len(validation) == 4
    assert validation[-1] < validation[0] < 3.2
    assert outcome.progress.best_loss == min(validation)
    model, tokenizer = Run(tmp_path / "run").load_language_model("best")
    corpus = encode_text([text], tokenizer, tmp_path / "run" / "cache")
    begin = corpus.split(0.1)
    score = evaluate_text(StatefulLLM(model), corpus, begin, len(corpus), tokenizer, torch.device("cpu"))
    assert score.loss == pytest.approx(min(validation), abs=1e-6)


def test_patience_stops_and_the_best_checkpoint_is_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = iter([2.0, 2.1, 1.5, 1.6, 1.5, 1.7, 1.0])
    monkeypatch.setattr(language, "evaluate_text", lambda *_: Score(next(scripted) * 10, 10, 10, 10))
    out = tmp_path / "run"
    assert train(language_config(steps=1000, patience=3), [text], out).progress.step == 60
    assert Run(out).checkpoint("best").step == 30
    assert last_step(out) == 60
    assert resume(out, {}).progress.step == 60


def test_a_record_has_the_mean_loss_since_the_one_before(text: Path, tmp_path: Path) -> None:
    found = []
    for log_every in (1, 3):
        out = tmp_path / f"run-{log_every}"
        train(language_config(steps=6, log_every=log_every), [text], out)
        found.append([record["loss"] for record in log_without_times(out) if record["event"] == "training"])
    assert found[1] == pytest.approx([sum(found[0][:3]) / 3, sum(found[0][3:]) / 3])


def test_the_speed_is_that_since_the_last_validation(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    validate = Trainer._validate

    def recorded(self: Trainer, done: float) -> None:
        tokens.append(self.tokens)
        validate(self, done)

    monkeypatch.setattr(Trainer, "_validate", recorded)
    config = language_config(steps=6, validate_every=2)
    train(config, [text], tmp_path / "run")
    assert tokens == [2 * config.batch * config.chunk] * 3


def test_a_clip_of_0_disables_clipping(text: Path, tmp_path: Path) -> None:
    found = []
    for clip in (0.0, 1e30):
        train(language_config(steps=6, log_every=1, clip=clip), [text], tmp_path / f"run-{clip}")
        found.append(losses(tmp_path / f"run-{clip}"))
    assert found[0] == found[1]


def test_dropout_depends_on_the_step_and_the_process() -> None:
    class DrawnError(Exception):
        pass

    def loss(*_: Any) -> None:
        raise DrawnError

    seeds = set()
    for rank, step in itertools.product(range(2), repeat=2):
        stub: Any = object.__new__(Trainer)
        stub.config, stub.progress, stub.module = language_config(), Progress(step=step), None
        stub.fabric, stub.task = SimpleNamespace(global_rank=rank), SimpleNamespace(loss=loss)
        with pytest.raises(DrawnError):
            stub._step(0.0)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 4


def test_minutes_end_the_training_and_determine_the_schedule(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.01 * next(readings))
    monkeypatch.setattr(trainer, "time", clock)
    config = language_config(steps=None, minutes=0.02, validate_every=10**6, log_every=1)
    outcome = train(config, [text], tmp_path / "run")
    assert 1.2 <= outcome.progress.seconds < 1.3
    records = log_without_times(tmp_path / "run")
    rates = [record["rate"] for record in records if record["event"] == "training"]
    assert rates[-1] < 0.05 * max(rates)
    assert max(rates) > 1.9e-3
    assert records[-1]["event"] == "validation"
    more = resume(tmp_path / "run", {"minutes": 0.025})
    assert more.progress.step > outcome.progress.step
    assert 1.5 <= more.progress.seconds < 1.6


def test_more_steps_on_resuming(text: Path, tmp_path: Path) -> None:
    train(language_config(steps=10), [text], tmp_path / "run")
    assert resume(tmp_path / "run", {}).progress.step == 10
    assert resume(tmp_path / "run", {"steps": 20}).progress.step == 20


def test_a_validation_text_replaces_the_held_out_part(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "val.txt"
    other.write_text("quiz: the mat was good " * 20)
    train(language_config(steps=10), [text], tmp_path / "run", val=[other])
    train(language_config(steps=10, val_fraction=0.0), [text], tmp_path / "run2", val=[other])
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "run2")


def test_pairs_in_one_file_or_in_two(pairs: Path, tmp_path: Path) -> None:
    columns = [line.split("\t") for line in pairs.read_text().splitlines()]
    for side, name in enumerate(("en", "fr")):
        (tmp_path / name).write_text("\n".join(row[side] for row in columns))
    train(translation_config(steps=10), [pairs], tmp_path / "one")
    train(translation_config(steps=10), [tmp_path / "en", tmp_path / "fr"], tmp_path / "two")
    assert log_without_times(tmp_path / "one") == log_without_times(tmp_path / "two")


def test_tied_weights_are_saved_once(translator: Path) -> None:
    checkpoint = Run(translator).checkpoint("best")
    weights = checkpoint.tensors(WEIGHTS)
    assert "head.weight" not in weights
    assert "target_embedding.weight" not in weights
    parameters = dict(checkpoint.model().named_parameters(remove_duplicate=False))
    assert parameters["head.weight"] is parameters["source_embedding.weight"]
    assert checkpoint.tensors(STATE).keys() >= {"batch", "exp_avg.readout.weight"}


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    original = Trainer._step

    def poisoned(self: Any, done: float) -> None:
        if self.progress.step == 13:
            weight = self.model.head.weight
            if poison == "loss":
                weight.data[0, 0] = float("nan")
            else:
                weight.register_hook(lambda gradient: gradient * float("inf"))
        original(self, done)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    name = {"loss": "loss", "gradient": "norm of the gradients"}[poison]
    with pytest.raises(CommandError, match=rf"step 14: the {name} is (nan|inf); .* the checkpoint of step 10 is kept"):
        train(language_config(), [text], tmp_path / "run")
    assert last_step(tmp_path / "run") == 10
    weights = Run(tmp_path / "run").checkpoint("last").tensors(WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_failure_before_anything_was_saved(text: Path, tmp_path: Path) -> None:
    config = language_config(lr=1e38, warmup=0.0, nonlinearity="relu", clip=0.0)
    with pytest.raises(CommandError, match="nothing was saved yet"):
        train(config, [text], tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    original = os.fsync

    def full(descriptor: int) -> None:
        if Run(out).exists() and last_step(out) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    message = r"step \d+ cannot be saved in .*: No space left.*; the checkpoint of step 10 is kept"
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(CommandError, match=message):
            train(language_config(), [text], out)
    Run(out).load_language_model("best")
    assert resume(out, {}).progress.step == 30
    train(language_config(), [text], tmp_path / "whole")
    assert_same_runs(out, tmp_path / "whole")


def test_too_little_data(tmp_path: Path) -> None:
    text, pairs = tmp_path / "short.txt", tmp_path / "pairs.tsv"
    text.write_text("abc" * 10)
    pairs.write_text("a\tb\n" * 20)
    with pytest.raises(CommandError, match=r"must have more than batch × chunk = 4 × 8 = 32 tokens, got 27"):
        train(language_config(), [text], tmp_path / "run")
    with pytest.raises(CommandError, match=r"validation must have at least 2 tokens, got 0"):
        train(language_config(val_fraction=0), [text], tmp_path / "run")
    with pytest.raises(CommandError, match="at least one pair for validation, got none"):
        train(translation_config(val_fraction=0.0), [pairs], tmp_path / "run")


@pytest.mark.parametrize(
    "config",
    [
        language_config(steps=20),
        translation_config(steps=20, dropout=0.0, cell="lstm", layers=2, input_feeding=True),
    ],
    ids=lambda config: config.task,
)
def test_mixed_precision_trains_like_float32(config: Config, files: list[Path], tmp_path: Path) -> None:
    train(replace(config, precision="bf16-mixed"), files, tmp_path / "mixed")
    train(config, files, tmp_path / "exact")
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "exact"), abs=0.03)
    assert losses(tmp_path / "mixed") != losses(tmp_path / "exact")
    weights = Run(tmp_path / "mixed").checkpoint("last").tensors(WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_a_device_that_is_not_available(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="device 'warp' cannot be used"):
        train(language_config(device="warp"), [text], tmp_path / "run")
