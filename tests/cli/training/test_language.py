"""The task of a language model."""

from __future__ import annotations

from pathlib import Path

from lightning_fabric import Fabric
from support.cli_runs import language_config

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training.language import LanguageTask
from llm_ext.cli.training.task import InputFiles


def test_the_state_starts_from_zero_at_each_pass(text: Path, tmp_path: Path) -> None:
    files = InputFiles([text], [], tmp_path / "cache")
    fabric = Fabric(accelerator="cpu", devices=1)
    task = LanguageTask.create(fabric, language_config(chunk=250), Run(tmp_path / "run"), files)
    steps = task.streams.steps_per_pass
    assert steps > 2
    zero: list[bool] = []
    task.stateful.register_forward_pre_hook(lambda module, inputs: zero.append(module.state is None))
    for step in range(2 * steps):
        task.loss(task.module, step)
    assert zero == [True, *[False] * (steps - 1)] * 2
