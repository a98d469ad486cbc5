"""Trainings that end in a second, each in a directory of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.cli_runs import classification_config, language_config, options_of, translation_config

from llm_ext.cli.training import Config, train

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "it", "was", "good", "but", "not", "all")
# A task and a cell.
NAMES = (*(f"{task}-{cell}" for cell in ("rnn", "gru", "lstm") for task in ("lm", "translate")), "classify-gru")


@dataclass
class Case:
    """A training with its data, and what it gives if nothing happens.

    Attributes:
        name: For messages.
        config: The settings.
        data: The text or the pairs.
        whole: The run directory of the training that was not disturbed.
    """

    name: str
    config: Config
    data: Path
    whole: Path

    def command(self, out: Path) -> list[object]:
        """The command line of the training."""
        return ["train", self.data, "--out", out, *options_of(self.config)]


def cases(folder: Path, steps: int = 60, names: Sequence[str] = NAMES) -> Iterator[Case]:
    """Yield trainings by their names, each with its end if nothing happens."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(300)]
    text, pairs = folder / "text.txt", folder / "pairs.tsv"
    text.write_text("\n".join(lines))
    pairs.write_text("".join(f"{line}\t{' '.join(reversed(line.upper().split()))}\n" for line in lines))
    arrays = folder / "arrays.npz"
    x = np.random.default_rng(0).normal(size=(60, 9, 4)).astype(np.float32)
    np.savez(arrays, x=x, label=["odd", "even"] * 30)
    tasks = {"lm": (language_config, text), "translate": (translation_config, pairs)}
    for name in names:
        task, cell = name.split("-")
        config: Config
        settings: dict[str, Any] = {"cell": cell, "steps": steps, "validate_every": 3, "dropout": 0.1}
        if task == "classify":
            config, data = classification_config(**settings), arrays
        else:
            make, data = tasks[task]
            config = make(**settings, tokens="bpe", vocab_size=300)
        case = Case(name, config, data, folder / name)
        train(config, [data], case.whole)
        yield case
