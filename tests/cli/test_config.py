from __future__ import annotations

import pytest

from llm_ext.text.config import TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch", 0, "batch must be at least 1, got 0"),
        ("val_fraction", 1.0, "val-fraction must be at least 0 and at most 0.9, got 1.0"),
        ("lr", float("nan"), "lr must be at least 0"),
        ("minutes", 0, "minutes must be at least"),
        ("attention", "self", "attention must be one of hidden, embedding, none, got 'self'"),
        ("cell", "elman", "cell must be one of rnn, gru, lstm, got 'elman'"),
        ("hidden", 1.5, "hidden must be of type int, got 1.5"),
        ("steps", True, "steps must be of type int"),
        ("seed", None, "seed must be of type int, got None"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_progress_is_by_steps_or_by_the_clock() -> None:
    assert TrainConfig().progress(300, 1e9) == 0.1
    assert TrainConfig(steps=10).progress(5, 1e9) == 0.5
    assert TrainConfig(minutes=2).progress(10**9, 30) == 0.25
    both = TrainConfig(minutes=2, steps=10)
    assert both.progress(1, 60) == 0.5
    assert both.progress(9, 60) == 0.9
    assert both.progress(11, 0) == 1


@pytest.mark.parametrize(("schedule", "end"), [("one-cycle", 0), ("cosine", 0.1), ("constant", 1)])
def test_the_rate_rises_and_falls(schedule: str, end: float) -> None:
    config = TrainConfig(lr=1.0, schedule=schedule, warmup=0.25)
    rates = [config.rate(part / 100) for part in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[25] == pytest.approx(1)
    assert rates[100] == pytest.approx(end, abs=1e-5)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warm_up_or_nothing_else(warmup: float) -> None:
    config = TrainConfig(lr=1.0, warmup=warmup)
    assert config.rate(warmup) == pytest.approx(1)
    assert all(0 <= config.rate(part / 10) <= 1 for part in range(11))
