"""`llm-ext tune`: choose settings by cross-validation."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ext.cli.commands.arguments import add_traceback, check_ranges
from llm_ext.cli.commands.train import (
    add_data,
    add_settings,
    given_settings,
    make_config,
    option_name,
    read_settings,
    training_files,
)
from llm_ext.cli.errors import CommandError
from llm_ext.cli.streams import optional_output
from llm_ext.cli.training.config import MOST_STEPS
from llm_ext.cli.training.pipeline import fingerprints, input_files
from llm_ext.cli.training.task import Fold

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands
    from llm_ext.cli.tuning import Definition, Study

__all__ = ["add_parser", "run"]

# Settings of `train` that a search sets itself, or that have no meaning for it.
WITHOUT = (
    "devices",
    "dp_delta",
    "dp_epsilon",
    "dp_max_norm",
    "log_every",
    "minutes",
    "nodes",
    "patience",
    "steps",
    "strategy",
    "validate_every",
)
TRIALS, FOLDS = 20, 3


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "tune",
        help="choose settings by cross-validation",
        usage="llm-ext tune FILE [FILE ...] --out DIR --trial-minutes X [options]\n"
        "       llm-ext tune --task translate|summarize FILE.tsv --out DIR --trial-minutes X [options]\n"
        "       llm-ext tune --task translate|summarize --source FILE --target FILE --out DIR --trial-minutes X "
        "[options]\n"
        "       llm-ext tune --task classify|transcribe --kind KIND PATH --out DIR --trial-minutes X [options]\n"
        "       llm-ext tune --resume --out DIR [--trials N] [--minutes M]",
        description="Search settings of `llm-ext train` by trials: trainings on all but one of several parts of the "
        "data, measured on that part. The settings given as options are the same in all trials; --space names the "
        "others and their values. Several processes may search in the same directory at the same time.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory, created if missing")
    parser.add_argument("--resume", action="store_true", help="continue the search in DIR, or join it")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--space", type=Path, metavar="FILE", help="TOML file of the values to try (default: those of the task)"
    )
    search.add_argument(
        "--trials",
        type=int,
        default=TRIALS,
        metavar="N",
        help=f"trials of the search, those of earlier calls and of other processes included (default: {TRIALS})",
    )
    search.add_argument("--minutes", type=float, metavar="M", help="begin no trial after this time (default: no limit)")
    search.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="parts of the data: a trial trains K times, and holds out another part each time; 1 trains once and holds "
        f"out --val-fraction (default: {FOLDS})",
    )
    search.add_argument("--trial-minutes", type=float, metavar="X", help="time of each training (default: no limit)")
    search.add_argument(
        "--trial-steps",
        type=int,
        metavar="N",
        help="steps of each training; it ends at the earlier of both (default: 3000 without --trial-minutes)",
    )
    add_traceback(parser)
    add_settings(parser, WITHOUT)


def run(options: argparse.Namespace) -> int:
    """Search, print what was found, and return the exit code."""
    check_ranges(
        options,
        ("trials", 1, 10**6),
        ("minutes", 1e-6, 1e8),
        ("folds", 1, 10**6),
        ("trial-minutes", 0.001, 1e8),
        ("trial-steps", 1, MOST_STEPS),
    )
    # The setting of this name is that of a training.
    minutes = vars(options).pop("minutes")
    # Imported here, because only this command needs Optuna.
    from llm_ext.cli.tuning import Budget, Study, tune

    study = Study(options.out)
    definition = _begin(options, study)
    budget = Budget(options.trials, minutes)

    def say(line: str) -> None:
        with optional_output():
            print(line)

    stopped = tune(study, definition, budget, say)
    _report(study, definition, complete=not stopped)
    if stopped:
        name = signal.Signals(stopped).name
        print(f"stopped by {name}; saved; continue with: {_continue(options)}")
        return 128 + stopped
    if (count := len(study.trials())) < options.trials:
        print(f"{count} of {options.trials} trials; continue with: {_continue(options)}")
    return 0


def _continue(options: argparse.Namespace) -> str:
    return f"llm-ext tune --resume --out {options.out} --trials {options.trials}"


def _begin(options: argparse.Namespace, study: Study) -> Definition:
    """Begin a search, or join the one in the directory, after a check of its data."""
    from llm_ext.cli.tuning import base_config

    first: dict[str, Any] = {}
    if options.resume:
        definition = _saved(options, study)
    else:
        definition, first = _define(options, study)
    config, fold = base_config(definition), Fold(0, definition.folds) if definition.folds > 1 else None
    with study.locked(), tempfile.TemporaryDirectory(prefix=".check.", dir=study.path) as scratch:
        files = [Path(path) for path in definition.files]
        found = fingerprints(config, files, Path(scratch), study.cache, fold)
        definition = dataclasses.replace(definition, fingerprints=found)
        values = {name: first.get(name, getattr(config, name)) for name in definition.space}
        study.open(definition, values)
    return definition


def _saved(options: argparse.Namespace, study: Study) -> Definition:
    """Return the definition of a search to continue."""
    names = ("task", "config", "source", "target", "features", "space", "folds", "trial_minutes", "trial_steps")
    given = [name for name in names if getattr(options, name) is not None] + [*given_settings(options)]
    if given or options.files:
        words = [*map(option_name, given), *["FILE"] * bool(options.files)]
        options.fail(f"--resume continues with the settings of the search: leave out {', '.join(words)}")
    if not study.exists():
        raise CommandError(f"{study.path}: holds no search")
    return study.definition()


def _define(options: argparse.Namespace, study: Study) -> tuple[Definition, dict[str, Any]]:
    """Return the definition of the search that the options describe, and values of its first trial."""
    from llm_ext.cli.tuning import Definition, default_space, read_space

    task, from_file, given = read_settings(options)
    files = training_files(options, task)
    if own := [name for name in WITHOUT if name in from_file]:
        raise CommandError(f"{options.config}: a search sets {', '.join(map(option_name, own))} itself: leave it out")
    path = options.space or default_space(task)
    # An option fixes its setting in all trials. A file only gives the first value of a setting that is searched.
    space = {name: values for name, values in read_space(path, task).items() if name not in given}
    if not space:
        options.fail(f"the options leave nothing to search: each setting of {path} is given")
    settings = {name: value for name, value in (from_file | given).items() if name not in space}
    config = make_config(options, task, settings)
    for name, value in settings.items():
        if isinstance(value, str) and not value.isprintable():
            options.fail(f"{option_name(name)} must be text that {study.best.name} can hold, got {value!r}")
    inputs = input_files(config, files, (), study.cache, None)
    definition = Definition(
        task=task,
        files=inputs.names()["files"],
        fingerprints=[],
        settings=settings,
        space=space,
        folds=options.folds or FOLDS,
        minutes=options.trial_minutes,
        steps=options.trial_steps,
    )
    return definition, from_file


def _report(study: Study, definition: Definition, complete: bool) -> None:
    """Print and draw the trials, unless other processes still work on some; those do it at their end."""
    from llm_ext.cli.tuning import best_trial, draw_trials, measure, table

    if others := study.under_way():
        print(f"{others} more in other processes; the last one prints the results")
        return
    trials = study.trials()
    best = best_trial(trials)
    print(f"\n{table(trials, definition)}\n")
    if best is None:
        if complete:
            raise CommandError(f"{study.path}: none of {len(trials)} trials is complete; try other values or more time")
        return
    draw_trials(study, definition)
    print(f"best: trial {best.number}, {best.value:.4f} {measure(definition)}; all trials are drawn in {study.picture}")
    print(f"use it with: llm-ext train --config {study.best} FILE --out DIR")
