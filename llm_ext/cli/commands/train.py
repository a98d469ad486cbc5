"""`llm-ext train`: train a model, or continue a training."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ext.cli.commands.arguments import (
    add_cache,
    add_features,
    add_pair_files,
    add_traceback,
    pair_files,
    sample_path,
)
from llm_ext.cli.training.config import CONFIGS, Config, SampleConfig, TranslationConfig
from llm_ext.cli.training.config_file import read_config
from llm_ext.cli.training.pipeline import Outcome, resume, train

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = [
    "add_data",
    "add_parser",
    "add_settings",
    "given_settings",
    "make_config",
    "option_name",
    "read_settings",
    "run",
    "training_files",
]

# A setting of one or more tasks: its field of each task's config.
Setting = dict[str, dataclasses.Field[Any]]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "train",
        help="train a model on text, pairs or samples",
        usage="llm-ext train FILE [FILE ...] --out DIR [options]\n"
        "       llm-ext train --task translate|summarize FILE.tsv --out DIR [options]\n"
        "       llm-ext train --task translate|summarize --source FILE --target FILE --out DIR [options]\n"
        "       llm-ext train --task classify|transcribe --kind KIND MANIFEST.tsv --out DIR [options]\n"
        "       llm-ext train --task classify|transcribe --kind KIND --features FILE.npz|DIR --out DIR [options]\n"
        "       llm-ext train --resume --out DIR [options]",
        description="Train a language model on text, a translator or a summarizer on pairs of lines, or a classifier "
        "or a transcriber of sound, images, video or arrays.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run directory, created if missing")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in DIR with its saved files and settings"
    )
    parser.add_argument(
        "--val",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="files for validation (default: hold out a part)",
    )
    add_pair_files(parser, "val-", " for validation")
    add_cache(parser)
    add_traceback(parser)
    add_settings(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the task and its files, and --config."""
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="text; one file of tab-separated pairs; or, for samples, a manifest with the columns file and label or "
        "text",
    )
    parser.add_argument(
        "--task",
        choices=CONFIGS,
        help="lm: predict the next token of a text; translate: write the target of a source; summarize: likewise, with "
        "long sources and copying; classify: label a sample; transcribe: write the text of a sample (default: lm)",
    )
    add_pair_files(parser)
    add_features(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with settings; its keys are the names of options, and options replace its values",
    )


def run(options: argparse.Namespace) -> int:
    """Train a model, or continue a training; return the exit code."""
    outcome = _resume(options) if options.resume else _train(options)
    if outcome.first:
        print(_describe(outcome, options.out))
    return 128 + outcome.signal if outcome.signal else 0


def _train(options: argparse.Namespace) -> Outcome:
    task, from_file, given = read_settings(options)
    files, val = training_files(options, task), options.val
    if _reads_pairs(task):
        val = pair_files(options, val, "val-")
    elif _reads_samples(task) and len(val) > 1:
        options.fail(f"--val takes one path of samples, got {len(val)}")
    return train(make_config(options, task, from_file | given), files, options.out, val=val, cache=options.cache)


def read_settings(options: argparse.Namespace) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the task, the settings of --config, and those of the command line, which replace them."""
    given, settings, task = given_settings(options), _settings(), options.task
    from_file: dict[str, Any] = {}
    if options.config is not None:
        task, from_file = read_config(options.config, task)
    task = task or "lm"
    others = [option_name(name) for name in given if task not in settings[name]]
    if not _reads_pairs(task):
        others += _given_pair_files(options)
    if not _reads_samples(task) and options.features is not None:
        others.append("--features")
    if others:
        options.fail(f"not for --task {task}: {', '.join(others)}")
    return task, from_file, given


def training_files(options: argparse.Namespace, task: str) -> list[Path]:
    """Return the files to train on."""
    files: list[Path] = options.files
    if _reads_pairs(task):
        files = pair_files(options, files)
    elif _reads_samples(task):
        files = sample_path(options, files)
    if not files:
        options.fail(f"FILE is missing: give {'samples' if _reads_samples(task) else 'text'} to train on")
    return files


def _reads_pairs(task: str) -> bool:
    return issubclass(CONFIGS[task], TranslationConfig)


def _reads_samples(task: str) -> bool:
    return issubclass(CONFIGS[task], SampleConfig)


def _resume(options: argparse.Namespace) -> Outcome:
    given, settings = given_settings(options), _settings()
    fixed = [option_name(name) for name in given if not _can_change(settings[name])]
    fixed += ["--task"] * (options.task is not None) + ["--config"] * (options.config is not None)
    fixed += ["FILE"] * bool(options.files) + ["--features"] * (options.features is not None)
    fixed += ["--val"] * bool(options.val) + _given_pair_files(options)
    if fixed:
        options.fail(f"--resume continues with the settings of the run: leave out {', '.join(fixed)}")
    make_config(options, "lm", given)  # all tasks have the settings that can change, with the same ranges
    return resume(options.out, given, cache=options.cache)


def make_config(options: argparse.Namespace, task: str, settings: dict[str, Any]) -> Config:
    """Return the config of some settings; report one that is out of range as a wrong command line."""
    try:
        return CONFIGS[task](**settings)
    except ValueError as error:
        options.fail(f"--{error}")
        raise


def _describe(outcome: Outcome, out: Path) -> str:
    progress = outcome.progress
    if outcome.signal:
        return (
            f"stopped by {signal.Signals(outcome.signal).name} at step {progress.step}; saved; "
            f"continue with: llm-ext train --resume --out {out}"
        )
    return (
        f"done: step {progress.step}; best validation loss {progress.best_loss:.4f} nats per {outcome.unit} "
        f"at step {progress.best_step}; saved in {out}"
    )


def _settings() -> dict[str, Setting]:
    """Return the settings of all tasks by name."""
    settings: dict[str, Setting] = {}
    for task, config in CONFIGS.items():
        for field in dataclasses.fields(config):
            settings.setdefault(field.name, {})[task] = field
    return settings


def add_settings(parser: argparse.ArgumentParser, without: Container[str] = ()) -> None:
    """Add an option for each setting, except those named by `without`."""
    groups: dict[str, Any] = {}
    for name, setting in _settings().items():
        if name in without:
            continue
        meta = next(iter(setting.values())).metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        kind: dict[str, Any]
        if meta["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = None if meta["choices"] else meta["metavar"] or {int: "N", float: "X", str: "NAME"}[meta["type"]]
            kind = {"type": meta["type"], "choices": meta["choices"], "metavar": metavar}
        groups[meta["group"]].add_argument(
            option_name(name),
            # Not the default of the setting, because --resume must know which options were given.
            default=argparse.SUPPRESS,
            help=meta["help"].replace("%", "%%") + _defaults(setting),
            **kind,
        )


def _defaults(setting: Setting) -> str:
    """Return the defaults of a setting, and the task it belongs to, for its help."""
    names = {True: "on", False: "off"}
    tasks: dict[str, list[str]] = {}
    for task, field in setting.items():
        if field.default not in (None, ""):
            value = names[field.default] if isinstance(field.default, bool) else str(field.default)
            tasks.setdefault(value, []).append(task)
    words = [*tasks] if len(tasks) == 1 else [f"{value} for {_listed(each)}" for value, each in tasks.items()]
    only = "" if len(setting) == len(CONFIGS) or len(tasks) > 1 else f"; only for --task {_listed([*setting])}"
    return f" (default: {'; '.join(words)}{only})" if words else ""


def _listed(names: list[str]) -> str:
    """Return names as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _can_change(setting: Setting) -> bool:
    return all(field.metadata["resume"] for field in setting.values())


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    settings = _settings()
    return {name: value for name, value in vars(options).items() if name in settings}


def _given_pair_files(options: argparse.Namespace) -> list[str]:
    names = ("source", "target", "val_source", "val_target")
    return [option_name(name) for name in names if getattr(options, name, None) is not None]


def option_name(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"
