"""The common half of the demos: options, a new training run, exit codes."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llm_ext.cli import CommandError
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import Config, train

# The command as a user can type it, also where .venv is not activated.
COMMAND = "llm-ext" if shutil.which("llm-ext") else os.path.relpath(Path(sys.executable).with_name("llm-ext"))


def length(minutes: float) -> str:
    """Return the length of a training in words, such as "for 3 minutes on 2 threads"."""
    counts = (minutes, "minute"), (torch.get_num_threads(), "thread")
    return "for {} on {}".format(*(f"{count:g} {unit}{'s' * (count != 1)}" for count, unit in counts))


def parser(description: str | None, minutes: float, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options --minutes and --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help=f"time to train (default: {minutes:g})")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"run directory, replaced (default: {out})")
    return parser


def start_run(out: Path) -> Run:
    """Return an empty run directory; a run that it held is removed."""
    run = Run(out)
    if run.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return run


def train_or_exit(config: Config, files: Sequence[Path], run: Run, val: Sequence[Path] = ()) -> None:
    """Train a model; after a signal, exit as `llm-ext train` does."""
    outcome = train(config, files, run.path, val=val)
    if outcome.signal:
        sys.exit(128 + outcome.signal)


def run_demo(demo: Callable[[], None]) -> None:
    """Run a demo and exit; errors that the user can fix are printed in one line."""
    try:
        demo()
    except (CommandError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
