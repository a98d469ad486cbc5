"""Settings: ranges, progress, learning rate."""

from __future__ import annotations

from typing import Any

import pytest

from llm_ext.cli.training import LanguageConfig, SummaryConfig, TranslationConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", 0, "batch must be at least 1 and at most 1048576, got 0"),
        ("val_fraction", 1.0, "val-fraction must be at least 0 and at most 0.9, got 1.0"),
        ("lr", float("nan"), "lr must be at least 0"),
        ("minutes", 0, "minutes must be at least"),
        ("attention", "self", "attention must be one of hidden, embedding, none, got 'self'"),
        ("cell", "elman", "cell must be one of rnn, gru, lstm, got 'elman'"),
        ("hidden", 1.5, "hidden must be of type int, got 1.5"),
        ("steps", True, "steps must be of type int"),
        ("seed", None, "seed must be of type int, got None"),
        ("freeze", "head,brain", "freeze must name some of embedding, encoder, attention, decoder, head, got 'brain'"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**{name: value})


def test_copying_needs_one_vocabulary() -> None:
    assert SummaryConfig().copy
    assert not TranslationConfig().copy
    with pytest.raises(ValueError, match="copy needs --vocabularies shared, got 'two'"):
        SummaryConfig(vocabularies="two")


def test_settings_are_restored_from_their_saved_form() -> None:
    config = TranslationConfig(device="cuda", hidden=7, tie_head=False)
    saved = config.to_saved()
    assert (saved["accelerator"], saved["hidden"]) == ("cuda", 7)
    assert TranslationConfig.from_saved(saved) == config
    with pytest.raises(TypeError, match="colour"):
        TranslationConfig.from_saved({"colour": "red"})


def test_progress_is_the_larger_of_steps_and_time() -> None:
    assert LanguageConfig().progress(300, 1e9) == 0.1
    assert LanguageConfig(steps=10).progress(5, 1e9) == 0.5
    assert LanguageConfig(minutes=2).progress(10**9, 30) == 0.25
    both = LanguageConfig(minutes=2, steps=10)
    assert both.progress(1, 60) == 0.5
    assert both.progress(9, 60) == 0.9
    assert both.progress(11, 0) == 1


@pytest.mark.parametrize(("schedule", "end"), [("one-cycle", 0), ("cosine", 0.1), ("constant", 1)])
def test_the_learning_rate_rises_and_falls(schedule: str, end: float) -> None:
    config = LanguageConfig(lr=1.0, schedule=schedule, warmup=0.25)
    rates = [config.learning_rate(percent / 100) for percent in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[25] == pytest.approx(1)
    assert rates[100] == pytest.approx(end, abs=1e-5)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_or_only_warmup(warmup: float) -> None:
    config = LanguageConfig(lr=1.0, warmup=warmup)
    assert config.learning_rate(warmup) == pytest.approx(1)
    assert all(0 <= config.learning_rate(tenth / 10) <= 1 for tenth in range(11))
