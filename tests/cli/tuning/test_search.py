"""A search of settings: folds, pruning, results, interruptions, failures, several processes."""

from __future__ import annotations

import math
import re
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from support.cli_process import CommandProcess, torchrun_environments
from support.cli_runs import LANGUAGE, SAMPLES, TRANSLATION, language_config, losses

from llm_ext.cli import main
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.inference import Score
from llm_ext.cli.training import train
from llm_ext.cli.training.trainer import Trainer
from llm_ext.cli.tuning import Study
from llm_ext.cli.tuning.results import table
from llm_ext.cli.tuning.search import _Watcher

pytestmark = pytest.mark.usefixtures("no_plot")

SignalAt = Callable[..., None]
SETTINGS = {"translate": TRANSLATION, "classify": SAMPLES}
SPACE = """
cell = ["rnn", "gru"]
hidden = { low = 8, high = 24, step = 8 }
lr = { low = 1e-5, high = 3e-2, log = true }
"""


@pytest.fixture
def tune(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `llm-ext tune` with a space: exit code, standard output, standard error."""

    def run(*arguments: object, space: str = SPACE) -> tuple[int, str, str]:
        capfd.readouterr()
        return main(command(tmp_path, *arguments, space=space)), *capfd.readouterr()

    return run


Tune = Callable[..., tuple[int, str, str]]


def command(folder: Path, *arguments: object, space: str = SPACE) -> list[str]:
    """The command line of a search; its space replaces the options of the same settings."""
    words = ["tune", *map(str, arguments)]
    if "--resume" in words:
        return words
    (folder / "space.toml").write_text(space)
    settings = next((each for task, each in SETTINGS.items() if task in words), LANGUAGE)
    defaults = {**settings, "folds": 2, "trial_steps": 12, "trials": 3}
    options = {f"--{name.replace('_', '-')}": value for name, value in defaults.items()}
    searched = [f"--{line.split(' =')[0]}" for line in space.strip().splitlines()]
    without = [*words, *searched, "--validate-every", "--log-every"]
    given = [str(word) for option, value in options.items() if option not in without for word in (option, value)]
    return [*words, *given, "--space", str(folder / "space.toml")]


def trials(out: Path) -> list[FrozenTrial]:
    """The trials of a search."""
    study = Study(out)
    with study.locked():
        study.open(study.definition(), {})
    return study.trials()


def contents(out: Path) -> list[Any]:
    """All of the trials of a search that does not depend on the time."""
    return [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in trials(out)]


def test_a_trial_has_the_mean_loss_of_trainings_without_one_fold(text: Path, tmp_path: Path, tune: Tune) -> None:
    whole, middle = text.read_text(), 2500
    whole = whole[: 2 * middle]
    text.write_text(whole)
    code, said, errors = tune(text, "--out", tmp_path / "out", "--trials", 1, "--hidden", 16, space="lr = [1e-2]\n")
    assert (code, errors) == (0, "")
    # A training without fold 0 is one on the text whose halves are swapped that holds out its last half.
    swapped = tmp_path / "swapped.txt"
    swapped.write_text(whole[middle:] + whole[:middle])
    found = []
    for path in (swapped, text):
        config = language_config(steps=12, validate_every=12, log_every=100, lr=1e-2, val_fraction=0.5)
        train(config, [path], tmp_path / f"run-{path.stem}")
        found += losses(tmp_path / f"run-{path.stem}")
    (trial,) = trials(tmp_path / "out")
    assert trial.value == pytest.approx(sum(found) / 2, abs=1e-6)
    assert trial.intermediate_values[3] == pytest.approx(found[0], abs=1e-6)
    assert f"trial 0: {trial.value:.4f} nats per token, best so far\n" in said


def test_the_lowest_loss_of_each_fold_counts() -> None:
    """The first training is validated twice, and its last loss may be the higher one."""
    optuna_study = optuna.create_study()
    trial = optuna_study.ask()
    study = SimpleNamespace(optuna_study=optuna_study, trial=lambda number: optuna_study.trials[number])
    keeps = SimpleNamespace(prune=lambda *_: False)
    search: Any = SimpleNamespace(study=study, definition=SimpleNamespace(folds=2, task="lm", space={}), pruner=keeps)
    for fold, done, loss in ((0, 0.4, 3.0), (0, 1.0, 4.0), (1, 1.0, 5.0)):
        _Watcher(search, trial, fold).validated(done, Score(10 * loss, 10, 10, 10))
    assert study.trial(0).intermediate_values == {1: 3.0, 3: 3.0, 6: 4.0}


def test_the_table_has_the_last_losses_best_first() -> None:
    COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
    records = [(COMPLETE, {1: 2.0, 3: 5.0}), (PRUNED, {1: 1.0, 3: 9.0}), (COMPLETE, {1: 3.0, 3: 4.0})]
    records += [(PRUNED, {1: 8.0}), (TrialState.FAIL, {1: 7.0}), (TrialState.RUNNING, {}), (TrialState.WAITING, {})]
    found = []
    for number, (state, losses_of_trial) in enumerate(records):
        space: dict[str, Any] = (
            {} if state == TrialState.WAITING else {"lr": optuna.distributions.FloatDistribution(0, 1)}
        )
        value = losses_of_trial[3] if state == COMPLETE else None
        values = dict.fromkeys(space, 0.5)
        trial = optuna.trial.create_trial(
            state=state, value=value, params=values, distributions=space, intermediate_values=losses_of_trial
        )
        trial.number = number
        found.append(trial)
    definition: Any = SimpleNamespace(task="translate", space={"lr": {"low": 0, "high": 1}})
    rows = [re.split("  +", line.strip()) for line in table(found, definition).splitlines()]
    assert rows[0] == ["trial", "result", "nats per token", "lr"]
    assert rows[2:6] == [
        [f"{number}", result, f"{loss}.0000", "0.5"]
        for number, result, loss in ((2, "complete", 4), (0, "complete", 5), (3, "pruned", 8), (1, "pruned", 9))
    ]
    assert rows[6:] == [["4", "failed", "0.5"], ["5", "under way", "0.5"]]


def test_results(text: Path, tmp_path: Path, tune: Tune) -> None:
    out = tmp_path / "out"
    code, said, errors = tune(text, "--out", out, "--trials", 9, "--seed", 3)
    assert (code, errors) == (0, "")
    found = trials(out)
    assert len(found) == 9
    # The first trial has the defaults where the space has them.
    assert found[0].params["cell"] == "rnn"
    assert found[0].params["lr"] == 2e-3
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in found if trial.state == TrialState.PRUNED]
    assert len(complete) + len(pruned) == 9
    assert pruned
    assert all(sorted(trial.intermediate_values) == [1, 3, 6] for trial in complete)
    assert {tuple(sorted(trial.intermediate_values)) for trial in pruned} <= {(1,), (1, 3)}
    best = min(complete, key=lambda trial: trial.value or math.inf)
    lines = said.splitlines()
    rows = lines[next(at for at, line in enumerate(lines) if line.split()[:2] == ["trial", "result"]) :]
    assert rows[0].split() == ["trial", "result", "nats", "per", "token", "cell", "hidden", "lr"]
    assert rows[2].split()[:3] == [str(best.number), "complete", f"{best.value:.4f}"]
    assert f"best: trial {best.number}, {best.value:.4f} nats per token; " in rows[12]
    assert (out / "trials.svg").read_text().lstrip().startswith("<?xml")
    assert list((out / "trials").iterdir()) == []
    # The best settings train.
    words = ["train", text, "--out", tmp_path / "run", "--config", out / "best.toml", "--steps", 9]
    assert main([str(word) for word in words]) == 0
    saved = Run(tmp_path / "run").checkpoint("last").config["training"]["config"]
    assert {**saved, **best.params, "seed": 3, "tokens": "chars"} == saved


def test_an_interrupted_search_continues_to_the_same_trials(
    text: Path, tmp_path: Path, tune: Tune, signal_at: SignalAt
) -> None:
    options = ("--trials", 4, "--dropout", 0.2)
    assert tune(text, "--out", tmp_path / "whole", *options)[0] == 0
    out = tmp_path / "parts"
    signal_at(7)  # in the first trial, after its first validation
    code, said, _ = tune(text, "--out", out, *options)
    assert code == 130
    assert f"stopped by SIGINT; saved; continue with: llm-ext tune --resume --out {out} --trials 4\n" in said
    assert [trial.state for trial in trials(out)] == [TrialState.RUNNING]
    assert tune("--resume", "--out", out, "--trials", 2)[0] == 0
    signal_at(2, signal.SIGTERM)
    assert tune(text, "--out", out, *options)[0] == 143  # the same command line continues, too
    assert tune("--resume", "--out", out, "--trials", 4)[0] == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / "best.toml").read_text() == (tmp_path / "whole/best.toml").read_text().replace("whole", "parts")


def test_a_failed_trial_is_recorded_and_the_search_goes_on(
    text: Path, tmp_path: Path, tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._step

    def step(self: Trainer, done: float) -> None:
        if self.config.embedding == 9:
            raise MemoryError
        if self.config.embedding == 10:
            raise RuntimeError("you tried to allocate 7 bytes")
        if self.config.embedding == 11:
            self.model.head.weight.data[0, 0] = float("nan")
        original(self, done)

    monkeypatch.setattr(Trainer, "_step", step)
    out, none = tmp_path / "out", tmp_path / "none"
    code, said, errors = tune(text, "--out", out, "--trials", 12, space="embedding = [8, 9, 10, 11]\n")
    assert (code, errors) == (0, "")
    failures = {trial.params["embedding"]: trial.user_attrs.get("failure", "") for trial in trials(out)}
    assert failures[8] == ""
    assert failures[9] == "MemoryError"
    assert failures[10] == "you tried to allocate 7 bytes"
    assert "step 1: the loss is nan; training stopped, nothing was saved yet" in failures[11]
    assert ": failed: you tried to allocate 7 bytes\n" in said
    assert said.count("  failed  ") == sum(trial.state == TrialState.FAIL for trial in trials(out))
    code, _, errors = tune(text, "--out", none, "--trials", 2, space="embedding = [9, 10]\n")
    assert (code, errors) == (1, f"llm-ext: {none}: none of 2 trials is complete; try other values or more time\n")


def test_a_translator_with_several_vocabularies(pairs: Path, tmp_path: Path, tune: Tune) -> None:
    space = 'tokens = ["chars", "bytes"]\nlr = { low = 1e-3, high = 1e-1, log = true }\n'
    code, said, errors = tune(
        pairs, "--task", "translate", "--out", tmp_path / "out", "--folds", 3, "--trials", 4, space=space
    )
    assert (code, errors) == (0, "")
    assert "bits per character" in said
    assert {trial.params["tokens"] for trial in trials(tmp_path / "out")} == {"chars", "bytes"}
    assert (tmp_path / "out/best.toml").read_text().splitlines()[1] == 'task = "translate"'


def test_a_classifier_by_groups(arrays: Path, tmp_path: Path, tune: Tune) -> None:
    """Each fold holds out two or three of five speakers."""
    options = ("--features", arrays, "--task", "classify", "--kind", "array", "--batch", 8, "--val-column", "speaker")
    out = tmp_path / "out"
    code, said, errors = tune(*options, "--out", out, "--trials", 2, space="layers = [1, 2]\nlr = [1e-2]\n")
    assert (code, errors) == (0, "")
    assert "nats per sample" in said
    best = (out / "best.toml").read_text()
    assert 'task = "classify"' in best
    assert 'val-column = "speaker"' in best
    for message, *more in (
        ("--val-values: each fold holds out other groups", "--val-values", "speaker 1"),
        ("--folds 6: the samples have only 5 groups", "--folds", 6),
    ):
        code, _, errors = tune(*options, "--out", tmp_path / "refused", *more)
        assert (code, message in errors) == (1, True), errors


def test_processes_share_a_search(text: Path, tmp_path: Path) -> None:
    """In the environment that torchrun gives two processes, which must not become one training."""
    out = tmp_path / "out"
    arguments: list[object] = [*command(tmp_path, text, "--out", out, "--trials", 8)]
    environments = torchrun_environments(2)
    processes = [CommandProcess(arguments, tmp_path, environment=environment) for environment in environments]
    ended = [process.wait() for process in processes]
    assert [(code, errors) for code, _, errors in ended] == [(0, "")] * 2
    found = trials(out)
    assert [trial.number for trial in found] == list(range(8))
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in found)
    said = "".join(said for _, said, _ in ended)
    assert sorted(re.findall(r"^trial (\d+):", said, re.MULTILINE)) == [str(number) for number in range(8)]
    assert "use it with: llm-ext train --config" in said


def test_the_trial_of_a_killed_process_is_continued(text: Path, tmp_path: Path, tune: Tune) -> None:
    out = tmp_path / "out"
    options = ("--folds", 1, "--trials", 1)
    process = CommandProcess([*command(tmp_path, text, "--out", out, *options, "--trial-steps", 10**6)], tmp_path)
    process.wait_until(lambda: any((out / "trials").rglob("log.jsonl")))
    process.kill()
    # Killed again and again, as by a lack of memory, it counts as failed.
    study = Study(out)
    with study.locked():
        study.open(study.definition(), {})
    # A process that saves its trial and leaves it to the next one does not count.
    for count in range(7):
        trial = study.claim(1)
        assert trial is not None
        assert trial.number == 0
        if count < 4:
            study.release(trial)
        else:
            study._release(0)
    code, _, errors = tune("--resume", "--out", out, "--trials", 1)
    assert (code, "none of 1 trials is complete" in errors) == (1, True)
    assert trials(out)[0].user_attrs["failure"] == "its process ended 3 times without a message"


def test_what_is_refused(text: Path, pairs: Path, tmp_path: Path, tune: Tune) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("abc" * 20)

    def refused(message: str, *arguments: object, space: str = SPACE) -> None:
        code, _, errors = tune(*arguments, space=space)
        assert (code, errors[:9]) == (1, "llm-ext: ")
        assert message in errors
        assert "Traceback" not in errors

    small = ("--batch", 1, "--chunk", 1)
    refused("--folds 31: the text has only 60 tokens", short, "--out", out, "--folds", 31, *small)
    translate = ("--task", "translate", "--out", out)
    refused("--folds 999: the pairs have only", pairs, *translate, "--folds", 999, "--batch", 1)
    refused("no such file", tmp_path / "no.txt", "--out", out)
    refused("space.toml: --task lm has no setting 'colour'", text, "--out", out, space="colour = [1]\n")
    refused("holds no search", "--resume", "--out", out)
    (tmp_path / "steps.toml").write_text("steps = 5\n")
    refused("a search sets --steps itself", text, "--out", out, "--config", tmp_path / "steps.toml")
    assert not (out / "study.json").exists()

    assert tune(text, "--out", out, "--trials", 1)[0] == 0
    refused("holds another search: folds 2 there, 3 here; choose another --out", text, "--out", out, "--folds", 3)
    saved = text.read_text()
    text.write_text(saved[:-100])
    refused("the text has changed since the search was started", text, "--out", out)
    text.write_text(saved)
    database = out / "study.db"
    good = database.read_bytes()
    for damaged in (b"no database, but as long as one" * 99, good[:2000] + b"\0" * (len(good) - 2000)):
        database.write_bytes(damaged)
        refused("study.db: damaged", "--resume", "--out", out)
    database.unlink()
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE birds (name TEXT)")
    refused("study.db: expected a database of Optuna, got one of another program", "--resume", "--out", out)
    database.write_bytes(good)
    (out / "study.json").write_text('{"format": "llm_ext study", "version": 1, "task": 7}')
    refused("study.json: damaged", "--resume", "--out", out)
    (out / "study.json").unlink()
    refused("study.db: exists, but study.json, which describes it, is missing", text, "--out", out)


def test_a_file_begins_the_search_and_an_option_fixes_a_setting(text: Path, tmp_path: Path, tune: Tune) -> None:
    (tmp_path / "begin.toml").write_text("hidden = 24\nlr = 3e-3\nembedding = 9\n")
    options = ("--config", tmp_path / "begin.toml", "--cell", "gru", "--trials", 1)
    words = command(tmp_path, text, "--out", tmp_path / "out", *options)
    words[words.index("--embedding") : words.index("--embedding") + 2] = []
    assert main(words) == 0
    assert trials(tmp_path / "out")[0].params == {"hidden": 24, "lr": 3e-3}
    assert Study(tmp_path / "out").definition().settings["embedding"] == 9


@pytest.mark.parametrize("directory", [Run, Study])
def test_a_lock_that_is_a_link_is_refused(directory: type[Run] | type[Study], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("contents")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError, match=r"/\.lock"), directory(tmp_path).locked():
        pass
    assert target.read_text() == "contents"


def test_optuna_is_named_if_it_is_missing(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llm_ext.cli.tuning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, errors = tune("text.txt", "--out", tmp_path / "out")
    assert (code, errors) == (
        1,
        "llm-ext: optuna is not installed: pip install 'llm_ext[cli,tune]'\n",
    )
