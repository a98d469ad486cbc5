"""Trainings that end in a second, each in a directory of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cli_runs import language_config, options_of, translation_config

from llm_ext.cli.training import Config, train

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "it", "was", "good", "but", "not", "all")
CELLS = ("rnn", "gru", "lstm")


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


def cases(folder: Path, steps: int = 60, cells: Sequence[str] = CELLS) -> Iterator[Case]:
    """Yield a language model and a translator of byte pairs with each cell, trained without a fault."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(300)]
    text, pairs = folder / "text.txt", folder / "pairs.tsv"
    text.write_text("\n".join(lines))
    pairs.write_text("".join(f"{line}\t{' '.join(reversed(line.upper().split()))}\n" for line in lines))
    common: dict[str, Any] = {"steps": steps, "validate_every": 3, "dropout": 0.1, "tokens": "bpe", "vocab_size": 300}
    for cell in cells:
        for make, data in ((language_config, text), (translation_config, pairs)):
            config = make(cell=cell, **common)
            case = Case(f"{config.task}-{cell}", config, data, folder / f"{config.task}-{cell}")
            train(config, [data], case.whole)
            yield case
