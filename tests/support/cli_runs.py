"""Small models for the tests of llm_ext.cli: their settings, and comparisons of run directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llm_ext.cli.checkpoint import STATE, WEIGHTS, Run
from llm_ext.cli.training import (
    ClassificationConfig,
    Config,
    LanguageConfig,
    SummaryConfig,
    TranscriptionConfig,
    TranslationConfig,
    read_log,
)

ROOT = Path(__file__).resolve().parents[2]

# Values that depend on the time.
TIMES = ("seconds", "tokens_per_second")

COMMON: dict[str, Any] = {
    "hidden": 16,
    "embedding": 8,
    "tokens": "chars",
    "validate_every": 10,
    "log_every": 5,
    "device": "cpu",
}
LANGUAGE: dict[str, Any] = {**COMMON, "batch": 4, "chunk": 8}
SAMPLES: dict[str, Any] = {**COMMON, "batch": 8, "dropout": 0.1, "layers": 1, "kind": "array"}
TRANSLATION: dict[str, Any] = {**COMMON, "batch": 8, "dropout": 0.1}


def language_config(**changes: Any) -> LanguageConfig:
    """Settings of a language model that trains in a fraction of a second."""
    return LanguageConfig(**{**LANGUAGE, "steps": 30, **changes})


def translation_config(**changes: Any) -> TranslationConfig:
    """Settings of a translator that trains in a fraction of a second."""
    return TranslationConfig(**{**TRANSLATION, "steps": 30, **changes})


def summary_config(**changes: Any) -> SummaryConfig:
    """Settings of a summarizer that trains in a fraction of a second."""
    return SummaryConfig(**{**TRANSLATION, "steps": 30, **changes})


def classification_config(**changes: Any) -> ClassificationConfig:
    """Settings of a classifier of arrays that trains in a fraction of a second."""
    return ClassificationConfig(**{**SAMPLES, "steps": 30, **changes})


def transcription_config(**changes: Any) -> TranscriptionConfig:
    """Settings of a transcriber of arrays that trains in a fraction of a second."""
    return TranscriptionConfig(**{**SAMPLES, "steps": 30, **changes})


def language_options(**changes: Any) -> list[str]:
    """Options of `llm-ext train` for the same language model."""
    return _options({**LANGUAGE, **changes})


def translation_options(**changes: Any) -> list[str]:
    """Options of `llm-ext train` for the same translator."""
    return ["--task", "translate", *_options({**TRANSLATION, **changes})]


def options_of(config: Config) -> list[str]:
    """Options of `llm-ext train` for any settings; those that are flags may only be on."""
    given = [(field.name, getattr(config, field.name), field.default) for field in dataclasses.fields(config)]
    changed = {name: value for name, value, default in given if value != default}
    flags = [f"--{name.replace('_', '-')}" for name, value in changed.items() if value is True]
    return ["--task", config.task, *flags, *_options({n: value for n, value in changed.items() if value is not True})]


def _options(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def log_without_times(out: Path) -> list[dict[str, Any]]:
    """The records of a run's log without the values that depend on the time."""
    records = [dict(record) for record in read_log(out / "log.jsonl")]
    for record in records:
        for key in TIMES:
            assert record.pop(key) >= 0
    return records


def losses(out: Path) -> list[float]:
    """The training and validation losses in a run's log."""
    return [record["loss"] for record in read_log(out / "log.jsonl")]


def last_step(out: Path) -> int:
    """The step of a run's last checkpoint."""
    return Run(out).checkpoint("last").step


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    """The parameters of a run's last checkpoint; tied parameters have all their names."""
    return dict(Run(out).checkpoint("last").model().named_parameters(remove_duplicate=False))


def assert_same_runs(one: Path, other: Path) -> None:
    """Log, weights, state and progress are equal bit by bit, up to values that depend on the time."""
    assert log_without_times(one) == log_without_times(other)
    assert_same_checkpoints(one, other)


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """Weights, state and progress are equal bit by bit, up to values that depend on the time."""
    for which in ("last", "best"):
        a, b = Run(one).checkpoint(which), Run(other).checkpoint(which)
        assert a.step == b.step
        for file in (WEIGHTS, STATE):
            ours, theirs = a.tensors(file), b.tensors(file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        progress = [checkpoint.config["training"]["progress"] for checkpoint in (a, b)]
        assert {**progress[0], "seconds": 0} == {**progress[1], "seconds": 0}
