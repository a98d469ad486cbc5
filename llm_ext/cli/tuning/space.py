"""The values that a search tries: read from TOML, checked, suggested by Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from llm_ext.cli.data.files import read_toml
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import CONFIGS
from llm_ext.cli.training.config_file import setting_name

__all__ = ["NOT_SEARCHED", "Space", "default_space", "encloses", "read_space", "suggest"]

# By the name of a setting: a list of all its values, or a table with the keys of RANGE.
Space = dict[str, Any]

RANGE = {"low", "high", "step", "log"}
# Settings that do not change the model or its training, that a search sets itself, or that change the validation data.
NOT_SEARCHED = {
    *("device", "devices", "nodes", "strategy", "precision", "log_every", "seed"),
    *("minutes", "steps", "patience", "validate_every"),
    *("init", "init_from", "freeze"),
    *("longest", "val_fraction", "val_column", "val_values", "kind"),
}


def default_space(task: str) -> Path:
    """Return the file of a task's default space."""
    return Path(__file__).with_name("spaces") / f"{task}.toml"


def read_space(path: Path, task: str) -> Space:
    """Read a space and check that the settings accept its values.

    Args:
        path: A TOML file with the names of options as keys.
        task: The task of the settings.

    Raises:
        CommandError: The file cannot be read, is empty, or has an unknown key or wrong values.
    """
    space: Space = {}
    for key, values in read_toml(path).items():
        name = setting_name(path, task, key)
        if name in NOT_SEARCHED:
            raise CommandError(f"{path}: {key} cannot be searched; give it as an option")
        try:
            _check(task, name, values)
        except ValueError as error:
            raise CommandError(f"{path}: {key}: {error}") from None
        space[name] = values
    if not space:
        raise CommandError(f"{path}: expected settings with their values, got none")
    return space


def _check(task: str, name: str, values: object) -> None:
    """Raise a ValueError if a setting cannot have these values."""
    kind = CONFIGS[task].__dataclass_fields__[name].metadata["type"]
    if isinstance(values, list):
        if not values:
            raise ValueError("expected at least one value, got an empty list")
        tried = values
    elif isinstance(values, dict):
        if not {"low", "high"} <= values.keys() <= RANGE:
            raise ValueError(f"expected low and high, and possibly step or log, got {', '.join(values) or 'nothing'}")
        if kind not in (int, float):
            raise ValueError("expected a list, because its values are not numbers")
        low, high, step, log = _range(values)
        tried = [low, high]
        if not isinstance(log, bool):
            raise ValueError(f"log must be true or false, got {log!r}")
        if "step" in values:
            accepted = int if kind is int else (int, float)
            if not isinstance(step, accepted) or isinstance(step, bool) or not 0 < step < math.inf:
                raise ValueError(f"step must be a positive {kind.__name__}, got {step!r}")
            if log:
                raise ValueError("step and log exclude each other")
    else:
        raise ValueError(f"expected a list or a table with low and high, got {values!r}")
    for value in tried:
        CONFIGS[task](**{name: value})
    if isinstance(values, dict) and not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if isinstance(values, dict) and log and low <= 0:
        raise ValueError(f"low must be above 0 for log = true, got {low}")
    if isinstance(values, dict) and not encloses(values, high):
        raise ValueError(f"high must be low plus a multiple of step, got {high}")


def _range(values: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    return values["low"], values["high"], values.get("step"), values.get("log", False)


def suggest(trial: optuna.Trial, task: str, space: Space) -> dict[str, Any]:
    """Return the value of each setting in a trial."""
    return {name: _suggest(trial, task, name, values) for name, values in space.items()}


def _suggest(trial: optuna.Trial, task: str, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high, step, log = _range(values)
    if CONFIGS[task].__dataclass_fields__[name].metadata["type"] is int:
        return trial.suggest_int(name, low, high, step=step or 1, log=log)
    return trial.suggest_float(name, low, high, step=step, log=log)


def encloses(values: Any, value: object) -> bool:
    """Return whether a search may try a value."""
    if isinstance(values, list):
        return value in values
    low, high, step, _ = _range(values)
    if not isinstance(value, (int, float)) or not low <= value <= high:
        return False
    steps = 0.0 if step is None else (value - low) / step
    return math.isclose(steps, round(steps), abs_tol=1e-9)
