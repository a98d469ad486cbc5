"""Run directories that someone else wrote: each is refused with one line that names the file, at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from support.cli_runs import classification_config, language_config
from support.run_files import edit_json

from llm_ext.cli import main
from llm_ext.cli.checkpoint import STATE, WEIGHTS, Run
from llm_ext.cli.data import load_tokenizer
from llm_ext.cli.training import train

pytestmark = pytest.mark.usefixtures("no_plot")

# Seconds in which every one of them must be refused; a run of the same size loads in less than 0.1.
PATIENCE = 5


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_pairs")
    (folder / "text.txt").write_text("one two six ten. " * 120)
    config = language_config(steps=2, tokens="bpe", vocab_size=300, validate_every=2)
    train(config, [folder / "text.txt"], folder / "run")
    return folder / "run"


@pytest.fixture
def run(byte_pairs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(byte_pairs, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """A command that waits for a pipe would otherwise wait for ever."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer in {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; return its message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("llm-ext: ")
    assert errors.count("\n") == 1
    assert "--traceback" not in errors
    return errors


def model(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["model"].update(changes)


def training(part: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["training"][part].update(changes)


def tokenizer(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["tokenizer"].update(changes)


PADDING = {
    "strategy": {"Fixed": 1 << 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        *(
            ("config.json", model(**change), "the weights do not fit the configuration")
            for change in (
                {"hidden_dim": 30000},
                {"hidden_dim": 10**20},
                {"hidden_dim": "16"},
                {"vocab_size": 1 << 62},
                {"n_layers": 10**9},
                {"n_layers": None},
                {"cell": ["gru"]},
                {"attn_dim": 0},
                {"dropout": "much"},
            )
        ),
        ("config.json", lambda value: value.update(task=["lm"]), "no task is called"),
        ("config.json", lambda value: value.update(task="classify"), "holds a classifier"),
        *(
            ("run.json", lambda value, name=name: value.update(best=name), "must name a checkpoint")
            for name in ("..", ".", "", "step-2/../..", "/", "run.json", "step-2\n", 7, None, ["step-2"])
        ),
        ("vocabulary.json", tokenizer(padding=PADDING), "must have no padding"),
        ("vocabulary.json", tokenizer(truncation={"max_length": 0}), "must have no truncation"),
        ("vocabulary.json", tokenizer(model={"vocab": {"a": 0}, "merges": [["b", "c"]]}), "the merge 'b' 'c'"),
        ("vocabulary.json", tokenizer(model={"vocab": {"a": 1 << 31}, "merges": []}), "the ids of 1 tokens"),
        ("vocabulary.json", tokenizer(model={"vocab": [], "merges": {}}), "damaged"),
        ("vocabulary.json", lambda value: value.update(tokenizer=[]), "damaged"),
    ],
)
def test_a_file_that_lies(
    run: Path, file: str, change: Callable[[dict[str, Any]], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / file if file != "config.json" else Run(run).checkpoint("best").path / file
    edit_json(path, change)
    commands: list[tuple[object, ...]] = [("generate", run)]
    if file == "run.json":
        commands.append(("train", "--resume", "--steps", 4, "--out", run))
    for command in commands:
        said = refused(capsys, *command)
        assert message in said
        assert str(run) in said


FILES = ("run.json", "vocabulary.json", "step-2/config.json", f"step-2/{WEIGHTS}", f"step-2/{STATE}")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "link", "nothing"])
def test_a_file_that_is_none(run: Path, file: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    arguments = ["train", "--resume", "--steps", 3, "--out"] if file.endswith(STATE) else ["generate"]
    said = refused(capsys, *arguments, run)
    assert path.name in said


@pytest.mark.parametrize("file", ["run.json", "vocabulary.json", "step-2/config.json"])
@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a":' * 10**5, "", "\0" * 100, "[]", "7" * 10**5, '{"format": ' + "9" * 5000 + "}", '"\ud800"'],
    ids=["deep", "deeper", "empty", "zeros", "list", "number", "long", "surrogate"],
)
def test_text_that_is_no_object(run: Path, file: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / file).write_bytes(text.encode(errors="surrogatepass"))
    assert str(run / file) in refused(capsys, "generate", run)


def test_a_sparse_file_of_a_terabyte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("vocabulary.json", f"step-2/{WEIGHTS}"):
        with open(run / file, "r+b") as target:
            target.truncate(1 << 40)
        assert str(run / file).removesuffix(WEIGHTS) in refused(capsys, "generate", run)


@pytest.mark.parametrize(
    "change",
    [
        training("progress", step=-1),
        training("progress", step=10**30),
        training("progress", step="2"),
        training("progress", losses=float("nan")),
        training("progress", colour=1),
        training("config", batch=1 << 62),
        training("config", hidden=None),
        training("names", files=["/dev/zero"]),
        training("names", files=["/dev/fd/0"]),
        training("names", files=[7]),
        training("names", files=["\0"]),
        lambda value: value["training"].pop("names"),
        lambda value: value["training"].update(config=[]),
        lambda value: value["training"].update(progress=[]),
        lambda value: value["training"].update(names=[]),
    ],
)
def test_a_state_that_lies(
    run: Path, change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(run / "step-2/config.json", change)
    refused(capsys, "train", "--resume", "--out", run, "--steps", 4)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("features.json", lambda value: value["front_end"].update(kind="smell")),
        ("features.json", lambda value: value["front_end"].update(size=[10**6, 10**6])),
        ("features.json", lambda value: value["front_end"].update(size=[0, 3])),
        ("features.json", lambda value: value["front_end"].update(rate=1 << 60)),
        ("features.json", lambda value: value["front_end"].update(stack="2")),
        ("features.json", lambda value: value.update(std=[0.0] * 4)),
        ("features.json", lambda value: value.update(mean=[float("inf")] * 4)),
        ("features.json", lambda value: value.update(mean=[[1.0]] * 4)),
        ("features.json", lambda value: value.update(mean=[1, 2])),
        ("features.json", lambda value: value.update(mean=None)),
        ("labels.json", lambda value: value["labels"].reverse()),
        ("labels.json", lambda value: value["labels"].pop()),
        ("labels.json", lambda value: value.update(labels="abc")),
    ],
)
def test_features_and_labels_that_lie(
    arrays: Path,
    classifier: Path,
    tmp_path: Path,
    file: str,
    change: Callable[[dict[str, Any]], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(classifier, tmp_path / "run"))
    edit_json(run / file, change)
    assert str(run / file) in refused(capsys, "predict", run, arrays)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    x = np.random.default_rng(0).normal(size=(40, 9, 4)).astype(np.float32)
    np.savez(folder / "arrays.npz", x=x, label=["odd", "even"] * 20)
    train(classification_config(steps=2), [folder / "arrays.npz"], folder / "run")
    return folder / "run"


def test_loading_costs_no_initialization(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Initial weights are orthogonal, which takes seconds for a model of 2,048 units; the file may name a device."""

    def on_meta(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        assert tensor.is_meta
        return tensor

    monkeypatch.setattr(torch.nn.init, "orthogonal_", on_meta)
    checkpoint = Run(run).checkpoint("best")
    assert not any(parameter.is_meta for parameter in checkpoint.model().parameters())
    for device in ("cpu", "cuda:0", None):
        edit_json(checkpoint.path / "config.json", model(device=device))
        assert "'device'" in refused(capsys, "generate", run)


def test_old_files_without_checksums_and_with_joined_merges_load(run: Path) -> None:
    def age(value: dict[str, Any]) -> None:
        merges = value["tokenizer"]["model"]["merges"]
        value["tokenizer"]["model"]["merges"] = [" ".join(pair) for pair in merges]

    before = load_tokenizer(run / "vocabulary.json")
    edit_json(run / "vocabulary.json", age)
    for path in (*run.glob("*.json"), *run.glob("*/config.json")):
        edit_json(path, lambda value: None, sealed=False)
    after = load_tokenizer(run / "vocabulary.json")
    assert before.contents() == after.contents()
    assert before.encode("one two thirteen").tolist() == after.encode("one two thirteen").tolist()
    whole = tokenizers.Tokenizer.from_str(json.dumps(before.contents()["tokenizer"]))
    assert whole.encode("one two thirteen").ids == after.encode("one two thirteen").tolist()
    assert main(["generate", str(run)]) == 0
