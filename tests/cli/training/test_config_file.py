"""Settings in a TOML file: what is written is read again, wrong files are refused, options have precedence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import LANGUAGE, TRANSLATION, assert_same_runs, language_config, translation_config

from llm_ext.cli import CommandError, main
from llm_ext.cli.training import train
from llm_ext.cli.training.config import CONFIGS
from llm_ext.cli.training.config_file import read_config, write_config

pytestmark = pytest.mark.usefixtures("no_plot")


# Settings of type str that do not take any value.
FORMATTED = {"freeze": "head,embedding", "augment": "mask,noise", "image_size": "8x9"}


def other_value(field: dataclasses.Field[Any]) -> Any:
    """A value of a setting that is not its default."""
    meta = field.metadata
    if field.name in FORMATTED:
        return FORMATTED[field.name]
    if meta["choices"]:
        return next(choice for choice in meta["choices"] if choice != field.default)
    if meta["type"] is bool:
        return not field.default
    return {int: 300, float: 0.0625, str: 'a "quoted" \\ näme\n'}[meta["type"]]


@pytest.mark.parametrize("task", CONFIGS)
def test_every_setting_is_read_as_it_was_written(task: str, tmp_path: Path) -> None:
    settings = {field.name: other_value(field) for field in dataclasses.fields(CONFIGS[task])}
    if settings.get("copy"):
        settings["vocabularies"] = "shared"  # copying needs it
    if "dp_epsilon" in settings:
        settings |= {"devices": 1, "nodes": 1, "precision": "32-true"}  # so does privacy
    write_config(tmp_path / "all.toml", task, settings, "all")
    assert read_config(tmp_path / "all.toml", None) == (task, settings)
    assert read_config(tmp_path / "all.toml", task) == (task, settings)
    empty = {field.name: None for field in dataclasses.fields(CONFIGS[task]) if field.default is None}
    write_config(tmp_path / "few.toml", task, empty, "few")
    assert read_config(tmp_path / "few.toml", task) == (task, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flavour = 'red'", "--task lm has no setting 'flavour'; see llm-ext train --help"),
        ("label-smoothing = 0.1", "has no setting 'label-smoothing'; it is a setting of --task translate"),
        ("hidden = '7'", "hidden must be of type int, got '7'"),
        ("hidden = 7.5", "hidden must be of type int, got 7.5"),
        ("lr = {low = 1}", "lr must be of type float, got {'low': 1}"),
        ("val-fraction = 2", "val-fraction must be at least 0 and at most 0.9, got 2"),
        ("cell = 'elman'", "cell must be one of rnn, gru, lstm, got 'elman'"),
        ("task = 'sing'", "task must be one of lm, translate"),
        ("task = ['lm']", "task must be one of lm, translate"),
        ("task = 'translate'", "is for --task translate, not for --task lm"),
        ("hidden = ", "expected TOML, got something else: "),
        ("hidden = 1\nhidden = 2", "expected TOML, got something else: "),
        ("", "expected text, got an empty file"),
        (None, "no such file"),
    ],
)
def test_a_wrong_file_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CommandError) as error:
        read_config(path, "lm")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert main(["train", "--task", "lm", "text.txt", "--out", "run", "--config", str(path)]) == 1
    assert capsys.readouterr().err == f"llm-ext: {error.value}\n"


def test_options_replace_settings_of_the_file(text: Path, pairs: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "lm.toml", "lm", {**LANGUAGE, "hidden": 9, "steps": 20}, "lm")
    main(["train", str(text), "--out", str(tmp_path / "a"), "--config", str(tmp_path / "lm.toml"), "--hidden", "16"])
    train(language_config(steps=20), [text], tmp_path / "b")
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    write_config(tmp_path / "translate.toml", "translate", {**TRANSLATION, "steps": 10}, "translate")
    main(["train", str(pairs), "--out", str(tmp_path / "c"), "--config", str(tmp_path / "translate.toml")])
    train(translation_config(steps=10), [pairs], tmp_path / "d")
    assert_same_runs(tmp_path / "c", tmp_path / "d")
