"""Run directories: checkpoints survive failures, and damage is reported."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as tensors_to_bytes
from support.run_files import edit_json

from llm_ext import LLM
from llm_ext.cli import CommandError, checkpoint
from llm_ext.cli.checkpoint import STATE, WEIGHTS, Run
from llm_ext.cli.data import CharTokenizer

MODEL: dict[str, Any] = {
    "vocab_size": 5,
    "embedding_dim": 4,
    "hidden_dim": 6,
    "output_dim": 5,
    "n_layers": 1,
    "dropout": 0.0,
}


def save(run: Run, step: int, best: bool = False, value: float | None = None) -> None:
    model = LLM(**MODEL)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, step if value is None else value)
    state = {"hidden": torch.full((1, 2, 6), float(step))}
    run.save(step, model.config(), model.state_dict(), {"progress": step}, state, best)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    CharTokenizer("abcde").save(run.vocabulary)
    save(run, 1, best=True)
    save(run, 2)
    return run


def assert_whole(run: Run, last: int, best: int) -> None:
    for which, step in (("last", last), ("best", best)):
        saved = run.checkpoint(which)
        assert saved.step == saved.config["training"]["progress"] == step
        assert all((tensor == step).all() for tensor in saved.tensors(WEIGHTS).values())
        assert (saved.tensors(STATE)["hidden"] == step).all()


def names(run: Run) -> set[str]:
    return {path.name for path in run.path.iterdir()} - {"vocabulary.json", "run.json"}


def test_last_and_best_are_kept_and_nothing_else(run: Run) -> None:
    assert_whole(run, last=2, best=1)
    save(run, 3)
    assert_whole(run, last=3, best=1)
    assert names(run) == {"step-1", "step-3"}
    save(run, 4, best=True)
    assert_whole(run, last=4, best=4)
    assert names(run) == {"step-4"}


def test_the_same_step_again(run: Run) -> None:
    save(run, 2, best=True)
    assert_whole(run, last=2, best=2)
    save(run, 2)
    assert_whole(run, last=2, best=2)
    assert len(names(run)) == 2


def test_a_checkpoint_that_is_replaced_while_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name, pending = run._name, ["step-7"]
    monkeypatch.setattr(run, "_name", lambda which: pending.pop() if pending else name(which))
    assert run.checkpoint("last").step == 2


def test_a_model_is_restored(run: Run) -> None:
    model, tokenizer = run.load_language_model("best")
    assert model.config() == LLM(**MODEL).config()
    assert (model.head.weight == 1).all()
    assert not model.training
    assert tokenizer.size == 5


def test_a_checkpoint_without_a_cell_is_an_elman_network(run: Run) -> None:
    edit(model=MODEL)(run.path / "step-1" / "config.json")
    assert run.load_language_model("best")[0].config() == LLM(**MODEL).config()


def test_nothing_is_unpickled(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    run.load_language_model("last")
    assert_whole(run, last=2, best=1)


class Killed(BaseException):
    """Ends a call as if the process had been killed."""


def fail_at(monkeypatch: pytest.MonkeyPatch, failure: BaseException, at: int) -> None:
    """Let call number `at` of those that change the disk fail, and all later ones."""
    calls: list[str] = []

    def wrap(module: object, name: str) -> None:
        original: Callable[..., object] = getattr(module, name)

        def wrapped(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) > at:
                raise failure
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, wrapped)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        wrap(os, name)


@pytest.mark.parametrize("failure", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, failure: BaseException) -> None:
    at = 0
    while True:
        run = Run(tmp_path / str(at))
        run.path.mkdir()
        save(run, 1, best=True)
        save(run, 2)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, failure, at)
            try:
                save(run, 3)
                failed = False
            except (Killed, OSError):
                failed = True
        last = run.checkpoint("last").step
        assert last == 3 if not failed else last in (2, 3)
        assert_whole(run, last, best=1)
        save(run, 4)
        assert_whole(run, last=4, best=1)
        assert names(run) == {"step-1", "step-4"}
        if not failed:
            assert at > 8
            break
        at += 1


def test_a_short_write_is_no_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: object) -> str:
        path.write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(OSError, match="No space"):
        save(run, 3)
    assert_whole(run, last=2, best=1)
    assert names(run) == {"step-1", "step-2"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(value: dict[str, Any]) -> None:
        for key, new in changes.items():
            if new is None:
                del value[key]
            else:
                value[key] = new

    return lambda path: edit_json(path, change)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (f"step-2/{WEIGHTS}", truncate, "damaged"),
        (f"step-2/{WEIGHTS}", flip, "checksum differs"),
        (f"step-2/{WEIGHTS}", lambda path: path.write_bytes(b""), "damaged"),
        (
            f"step-2/{WEIGHTS}",
            lambda path: path.write_bytes(b"PK\x03\x04 a pickle"),
            "expected safetensors",
        ),
        (f"step-2/{WEIGHTS}", Path.unlink, "no such file"),
        ("step-2/config.json", truncate, "expected JSON"),
        ("step-2/config.json", lambda path: path.write_text('{"model_type": "gpt2"}'), "another program"),
        ("step-2/config.json", edit(version=2), "expected version 1"),
        ("step-2/config.json", edit(model=None), "no model in it"),
        ("step-2/config.json", edit(files=[]), "no files in it"),
        ("step-2/config.json", edit(model={**MODEL, "hidden_dim": 7}), "do not fit the configuration"),
        ("step-2/config.json", edit(model={**MODEL, "colour": 7}), "do not fit the configuration"),
        ("step-2/config.json", Path.unlink, "no such file"),
        ("run.json", truncate, "expected JSON"),
        ("run.json", edit(last="step-9"), "no such file"),
        ("run.json", edit(last="../step-2"), "must name a checkpoint"),
        ("run.json", edit(last=None), "must name a checkpoint"),
        ("run.json", Path.unlink, "holds no checkpoint"),
        ("vocabulary.json", Path.unlink, "no such file"),
        ("vocabulary.json", edit(characters="abc"), "expected the 5 tokens of the model, got 3"),
    ],
)
def test_damage_is_reported(run: Run, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(run.path / file)
    with pytest.raises(CommandError, match=message) as error:
        run.load_language_model("last")
    assert str(run.path) in str(error.value)


def test_every_flipped_bit_is_found(run: Run) -> None:
    """Whatever is read is what was written; the fields that nobody reads may be damaged without notice."""
    run.vocabulary.unlink()
    CharTokenizer("abcdé").save(run.vocabulary)
    model, tokenizer = run.load_language_model("last")
    weights, draw = dict(model.named_parameters()), random.Random(0)
    files = ["run.json", "vocabulary.json", "step-2/config.json", f"step-2/{WEIGHTS}"]
    for path in (run.path / file for file in files):
        data, read = path.read_bytes(), 0
        indices = range(0, len(data), max(1, len(data) // 200))
        for index in indices:
            damaged = bytearray(data)
            damaged[index] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                other, other_tokenizer = run.load_language_model("last")
            except CommandError:
                continue
            read += 1
            assert other_tokenizer.contents() == tokenizer.contents()
            assert all(torch.equal(each, weights[name]) for name, each in other.named_parameters())
        path.write_bytes(data)
        # Spaces between values, the name of the checksum, and NaN in place of what is compared with it.
        assert read <= len(indices) // 4, f"{path.name}: {read} of {len(indices)}"


def test_weights_of_another_program(run: Run) -> None:
    """Even with the right checksum."""
    data = tensors_to_bytes({"transformer.wte.weight": torch.zeros(3)})
    (run.path / "step-2" / WEIGHTS).write_bytes(data)
    edit(files={WEIGHTS: hashlib.sha256(data).hexdigest()})(run.path / "step-2" / "config.json")
    with pytest.raises(CommandError, match="do not fit the configuration"):
        run.load_language_model("last")
    garbage = b"\xff" * 64
    (run.path / "step-2" / WEIGHTS).write_bytes(garbage)
    edit(files={WEIGHTS: hashlib.sha256(garbage).hexdigest()})(run.path / "step-2" / "config.json")
    with pytest.raises(CommandError, match="expected safetensors"):
        run.load_language_model("last")


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such run directory"):
        Run(tmp_path / "nowhere").load_language_model("best")
    with pytest.raises(CommandError, match="holds no checkpoint"):
        Run(tmp_path).load_language_model("best")
