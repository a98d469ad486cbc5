"""Settings in a TOML file, in place of options of the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_ext.cli.data.files import atomic_write, read_toml
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import CONFIGS

__all__ = ["read_config", "setting_name", "write_config"]


def read_config(path: Path, task: str | None) -> tuple[str, dict[str, Any]]:
    """Read the settings of a training.

    Args:
        path: A TOML file with the names of options as keys, without their dashes at the beginning.
        task: The task that the file must be for; None for that of the file, or "lm" if it has none.

    Returns:
        The task, and the settings by the names of their fields.

    Raises:
        CommandError: The file cannot be read, is for another task, or has an unknown key or a wrong value.
    """
    values = read_toml(path)
    own = values.pop("task", task or "lm")
    if own not in [*CONFIGS]:  # a list, because the file may have any type here
        raise CommandError(f"{path}: task must be one of {', '.join(CONFIGS)}, got {own!r}")
    if own != (task or own):
        raise CommandError(f"{path}: is for --task {own}, not for --task {task}")
    settings = {setting_name(path, own, key): value for key, value in values.items()}
    try:
        CONFIGS[own](**settings)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None
    return own, settings


def setting_name(path: Path, task: str, key: str) -> str:
    """Return the field that a key of a TOML file names.

    Raises:
        CommandError: The task has no such setting.
    """
    name = key.replace("-", "_")
    if name not in {field.name for field in dataclasses.fields(CONFIGS[task])}:
        others = [other for other, config in CONFIGS.items() if name in config.__dataclass_fields__]
        reason = f"it is a setting of --task {' and '.join(others)}" if others else "see llm-ext train --help"
        raise CommandError(f"{path}: --task {task} has no setting {key!r}; {reason}")
    return name


def write_config(path: Path, task: str, settings: Mapping[str, Any], comment: str) -> None:
    """Write settings for `read_config`; those without a value are left out."""
    values = {"task": task} | {name.replace("_", "-"): value for name, value in settings.items() if value is not None}
    # The JSON of strings without control characters, numbers and booleans is TOML, too.
    lines = [f"# {comment}", *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
