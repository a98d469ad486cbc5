"""`--weights`: every command that has it computes with weights of 8 or 16 bits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import classification_config, summary_config, transcription_config
from torch import nn

import llm_ext
from llm_ext.cli import main
from llm_ext.cli.commands.parser import _build_parser
from llm_ext.cli.training import train
from llm_ext.cli.training.config import CONFIGS, Config
from llm_ext.nn import quantized

pytestmark = pytest.mark.usefixtures("no_plot")

# The commands and tasks, and the settings of the model where it is trained here.
CASES: dict[tuple[str, str], Callable[..., Config] | None] = {
    ("eval", "lm"): None,
    ("generate", "lm"): None,
    ("eval", "translate"): None,
    ("translate", "translate"): None,
    ("eval", "summarize"): summary_config,
    ("summarize", "summarize"): summary_config,
    ("eval", "classify"): classification_config,
    ("eval", "transcribe"): transcription_config,
    ("predict", "classify"): classification_config,
    ("predict", "transcribe"): transcription_config,
}
LINES = "one two\n\nsix ten\n"


@pytest.fixture(params=CASES, ids=" ".join)
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command line without --weights."""
    name, task = request.param
    config = CASES[name, task]
    trained: Path = request.getfixturevalue("language_model" if task == "lm" else "translator")
    data: Path = trained.parent / ("text.txt" if task == "lm" else "pairs.tsv")
    if task in ("classify", "transcribe"):
        data = request.getfixturevalue("arrays")
    if task == "transcribe":
        pytest.importorskip("jiwer")
    if config is not None:
        trained = tmp_path / "run"
        train(config(steps=20), [data], trained, val=[data])
    (tmp_path / "lines").write_text(LINES)
    more = {"eval": [data, "--cache", tmp_path / "cache"], "generate": ["--prompt", "ten", "--length", 5]}
    more["predict"] = [data]
    return [name, str(trained), *map(str, more.get(name, [tmp_path / "lines"]))]


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_weights_are_rounded(
    command: list[str], weights: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command) == 0
    expected = capfd.readouterr().out
    rounded: list[str] = []
    computed: set[nn.Module] = set()

    def quantize(model: nn.Module, dtype: Any) -> Any:
        rounded.append(dtype)
        entries = llm_ext.conversion.quantize_(model, dtype)
        for module in model.modules():
            if type(module).__module__ == quantized.__name__:
                module.register_forward_hook(lambda module, *_: computed.add(module))
        return entries

    monkeypatch.setattr(llm_ext, "quantize_", quantize)
    assert main([*command, "--weights", weights]) == 0
    said, errors = capfd.readouterr()
    assert (rounded, errors) == ([weights], "")
    assert computed
    if command[0] == "eval":
        losses = [float(re.match(r"loss +(\S+) nats", text)[1]) for text in (expected, said)]  # type: ignore[index]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)
    elif command[0] == "generate":
        assert (said[:3], len(said)) == ("ten", 9)
    elif command[0] == "predict":
        assert said.count("\n") == expected.count("\n") > 0
    else:
        assert (said.count("\n"), said.split("\n")[1]) == (3, "")
    if command[0] == "translate":
        assert said == expected == "deux, un.\n\ndix, six.\n"


def test_every_command_is_here() -> None:
    (subparsers,) = (each for each in _build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    accept = {name for name, parser in subparsers.choices.items() if "--weights" in parser.format_help()}
    assert accept == {name for name, _ in CASES}
    assert {task for name, task in CASES if name == "eval"} == CONFIGS.keys()


def test_other_devices_are_refused(
    language_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_ext.cli.commands.arguments.find_device", lambda name: torch.device("cuda"))
    assert main(["generate", str(language_model), "--weights", "int8"]) == 1
    assert "--weights int8 needs --device cpu" in capfd.readouterr().err
