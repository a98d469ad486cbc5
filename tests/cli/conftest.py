"""Fixtures of the tests of llm_ext.cli: small texts, pairs and trained models."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_runs import language_config, translation_config

from llm_ext.cli.training import train
from llm_ext.cli.training.trainer import Trainer

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "it", "was", "good", "but", "not", "all")

SignalAt = Callable[..., None]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are too small for a second thread, which would only wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> Iterator[None]:
    """A shell makes background jobs ignore SIGINT, and processes inherit that; here it must be received."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not plot the loss at the end of each training, which takes longer than the training."""
    monkeypatch.setattr("llm_ext.cli.training.pipeline.plot_loss", lambda records, path, unit: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of about 6,000 characters with some regularity."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(180)), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A tab-separated file of 200 pairs: a few words, and the same words in capitals in reverse order."""
    draw = random.Random(0)
    path = tmp_path / "pairs.tsv"
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(200)]
    reversed_lines = [" ".join(reversed(line.upper().split())) for line in lines]
    rows = zip(lines, reversed_lines, strict=True)
    path.write_text("".join(f"{source}\t{target}\tauthor\n" for source, target in rows), encoding="utf-8")
    return path


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """An archive of 120 sequences of pulses in one of three features: its label, and a letter for each pulse."""
    generator = np.random.default_rng(0)
    x = generator.normal(0, 0.1, (120, 16, 4)).astype(np.float32)
    lengths, labels, texts = generator.integers(9, 17, 120), generator.integers(3, size=120), []
    for row, label in enumerate(labels):
        letters = [int(label), *generator.integers(3, size=2).tolist()]
        for place, letter in zip((1, 4, 7), letters, strict=True):
            x[row, place : place + 2, letter] += 1
        texts.append("".join("abc"[letter] for letter in letters))
    path = tmp_path / "arrays.npz"
    speakers = [f"speaker {row % 5}" for row in range(120)]
    np.savez(path, x=x, lengths=lengths, label=[f"class {label}" for label in labels], text=texts, speaker=speakers)
    return path


@pytest.fixture(scope="session")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a translator that knows four words, with its `pairs.tsv` beside it."""
    folder = tmp_path_factory.mktemp("translator")
    words = {"one": "un", "two": "deux", "six": "six", "ten": "dix"}
    lines = [f"{a} {b}\t{words[b]}, {words[a]}.\n" for a in words for b in words]
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(lines * 8))
    config = translation_config(
        steps=300,
        batch=16,
        hidden=32,
        embedding=16,
        lr=1e-2,
        dropout=0.0,
        validate_every=150,
        label_smoothing=0.0,
    )
    assert train(config, [pairs], folder / "run", val=[pairs]).signal == 0
    return folder / "run"


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a language model, with its `text.txt` beside it."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text("one two six ten. " * 120)
    assert train(language_config(steps=20), [folder / "text.txt"], folder / "run").signal == 0
    return folder / "run"


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> SignalAt:
    """A function that sends this process a signal during one step of the next training, or during its validation.

    Its arguments are the step, the number of the signal, and the method of `Trainer` before which it is sent.
    """

    def schedule(step: int, number: int = signal.SIGINT, before: str = "_step") -> None:
        original: Callable[..., None] = getattr(Trainer, before)

        def send_once(self: Trainer, *arguments: Any) -> None:
            if self.progress.step == step:
                monkeypatch.setattr(Trainer, before, original)
                os.kill(os.getpid(), number)
            original(self, *arguments)

        monkeypatch.setattr(Trainer, before, send_once)

    return schedule


@pytest.fixture
def before_first_step(signal_at: SignalAt) -> None:
    """The next training stops before its first step, so that its initial weights are saved."""
    signal_at(0, signal.SIGTERM, before="_introduce")
