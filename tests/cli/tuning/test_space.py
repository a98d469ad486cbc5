"""The space of a search: default spaces, values, wrong files."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from llm_ext.cli import CommandError
from llm_ext.cli.training.config import CONFIGS
from llm_ext.cli.tuning import default_space, read_space
from llm_ext.cli.tuning.space import encloses, suggest


@pytest.mark.parametrize("task", CONFIGS)
def test_every_task_has_a_space_with_the_defaults_and_only_valid_values(task: str) -> None:
    space = read_space(default_space(task), task)
    defaults = CONFIGS[task]()
    # The first trial tries the defaults.
    assert all(encloses(values, getattr(defaults, name)) for name, values in space.items())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        values = suggest(study.ask(), task, space)
        CONFIGS[task](**values)
        assert all(encloses(space[name], value) for name, value in values.items())
    assert len({trial.params["lr"] for trial in study.trials}) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = [1]", "--task lm has no setting 'colour'"),
        ("label-smoothing = [0.1]", "it is a setting of --task translate"),
        ("seed = [1, 2]", "seed cannot be searched; give it as an option"),
        ("hidden = 8", "hidden: expected a list or a table with low and high, got 8"),
        ("hidden = []", "hidden: expected at least one value"),
        ("hidden = [8, 0]", "hidden: hidden must be at least 1 and at most 1048576, got 0"),
        ("hidden = [8, '9']", "hidden: hidden must be of type int, got '9'"),
        ("hidden = {low = 1.5, high = 2}", "hidden: hidden must be of type int, got 1.5"),
        ("hidden = {low = 1}", "hidden: expected low and high, and possibly step or log, got low"),
        ("hidden = {low = 1, high = 2, base = 2}", "got low, high, base"),
        ("hidden = {low = 2, high = 2}", "hidden: low must be below high, got 2 and 2"),
        ("hidden = {low = 2, high = 7, step = 2}", "hidden: high must be low plus a multiple of step, got 7"),
        ("hidden = {low = 2, high = 7, step = 0.5}", "hidden: step must be a positive int, got 0.5"),
        ("dropout = {low = 0, high = 0.5, step = 0}", "dropout: step must be a positive float, got 0"),
        ("lr = {low = 0, high = 1, log = true}", "lr: low must be above 0 for log = true, got 0"),
        ("lr = {low = 1, high = 2, log = 'yes'}", "lr: log must be true or false, got 'yes'"),
        ("lr = {low = 1, high = 2, log = true, step = 1}", "lr: step and log exclude each other"),
        ("lr = {low = 'a', high = 2}", "lr: lr must be of type float, got 'a'"),
        ("cell = {low = 'gru', high = 'rnn'}", "cell: expected a list, because its values are not numbers"),
        ("# nothing", "expected settings with their values, got none"),
        ("lr = [", "expected TOML"),
    ],
)
def test_a_wrong_space_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(CommandError) as error:
        read_space(path, "lm")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
