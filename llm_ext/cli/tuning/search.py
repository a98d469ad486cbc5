"""The search: trials of settings, each trained on every fold, pruned at its validations."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.pruners import HyperbandPruner
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Score
from llm_ext.cli.training.config import CONFIGS, Config
from llm_ext.cli.training.pipeline import resume, train
from llm_ext.cli.training.task import Fold
from llm_ext.cli.tuning.results import best_trial, in_bits, measure, write_best
from llm_ext.cli.tuning.space import suggest
from llm_ext.cli.tuning.study import Definition, Study

__all__ = ["Budget", "base_config", "tune"]

# Hyperband keeps a third of the trials at each rung: a third of the first training, which includes the warm-up of most
# schedules, the first fold, three folds, and so on. Losses earlier in the warm-up would favour large learning rates.
REDUCTION = 3
# Trials drawn at random before TPE has enough of them to learn from; Optuna's default is half of a search of 20 trials.
RANDOM_TRIALS = 6


class Budget(NamedTuple):
    """The end of a search.

    Attributes:
        trials: Number of trials of all processes together, failed ones included.
        minutes: No trial begins in this process after this time; None for no limit.
    """

    trials: int
    minutes: float | None


def base_config(definition: Definition) -> Config:
    """Return the settings that a search starts from, with the limits of each training."""
    limits = {"minutes": definition.minutes, "steps": definition.steps}
    return CONFIGS[definition.task](**{**definition.settings, **limits})


def tune(study: Study, definition: Definition, budget: Budget, say: Callable[[str], object]) -> int:
    """Run trials until the budget is spent, together with other processes on the same directory.

    A trial whose training fails is recorded, and the search goes on.

    Args:
        study: The directory, opened.
        definition: The description of the search.
        budget: The end of the search.
        say: Receives one line for each trial.

    Returns:
        The number of the signal that stopped the search early, after it has saved; 0 if none did.

    Raises:
        CommandError: The database cannot be used.
    """
    search = _Search(study, definition, say)
    end = math.inf if budget.minutes is None else time.monotonic() + 60 * budget.minutes
    try:
        while time.monotonic() < end and (trial := study.claim(budget.trials)) is not None:
            if stopped := search.run(trial):
                return stopped
    except KeyboardInterrupt:
        return signal.SIGINT
    except optuna.exceptions.StorageInternalError as error:
        raise CommandError(f"{study.database}: cannot be used: {error}") from None
    return 0


class _Search:
    """Runs trials one by one."""

    def __init__(self, study: Study, definition: Definition, say: Callable[[str], object]) -> None:
        self.study, self.definition, self.say = study, definition, say
        self.base = base_config(definition)
        # Not the pruner of the study: TPE would learn from the trials of one bracket only.
        self.pruner = HyperbandPruner(
            min_resource=1, max_resource=REDUCTION * definition.folds, reduction_factor=REDUCTION
        )

    def run(self, trial: optuna.Trial) -> int:
        """Run a trial, or what is left of it; return the number of a signal, or 0."""
        # A sampler of its own for each trial, so that a search that was interrupted draws the same values.
        seed = zlib.crc32(f"{self.base.seed} {trial.number}".encode())
        self.study.optuna_study.sampler = TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
        values = suggest(trial, self.definition.task, self.definition.space)
        try:
            config = dataclasses.replace(self.base, **values)
            for index in range(self.definition.folds):
                if stopped := self._train(trial, config, index):
                    self.study.release(trial)
                    return stopped
        except optuna.TrialPruned:
            self.study.end(trial, TrialState.PRUNED)
        except KeyboardInterrupt:
            self.study.release(trial)
            raise
        # torch reports a lack of memory as a RuntimeError.
        except (CommandError, MemoryError, RuntimeError, ValueError) as error:
            self.study.end(trial, TrialState.FAIL, failure=f"{error}" or type(error).__name__)
        else:
            self.study.end(trial, TrialState.COMPLETE, self._last_loss(trial))
            write_best(self.study, self.definition)
        self.say(self._describe(trial.number))
        return 0

    def _train(self, trial: optuna.Trial, config: Config, index: int) -> int:
        """Train on all folds but one, unless that was done already; return the number of a signal, or 0."""
        watcher = _Watcher(self, trial, index)
        if watcher.done:
            return 0
        folds, study = self.definition.folds, self.study
        fold = Fold(index, folds) if folds > 1 else None
        out = study.folder(trial.number) / f"fold-{index}"
        if Run(out).exists():
            outcome = resume(out, {}, cache=study.cache, fold=fold, watcher=watcher)
        else:
            files = [Path(path) for path in self.definition.files]
            outcome = train(config, files, out, cache=study.cache, fold=fold, watcher=watcher)
        if not outcome.signal:
            shutil.rmtree(out)
        return outcome.signal

    def _last_loss(self, trial: optuna.Trial) -> float:
        return self.study.trial(trial.number).intermediate_values[REDUCTION * self.definition.folds]

    def _describe(self, number: int) -> str:
        trial, unit = self.study.trial(number), measure(self.definition)
        if trial.state == TrialState.FAIL:
            return f"trial {number}: failed: {trial.user_attrs['failure']}"
        losses = trial.intermediate_values
        if trial.state == TrialState.PRUNED:
            done = max(losses) / (REDUCTION * self.definition.folds)
            return f"trial {number}: pruned after {100 * done:.0f} %, at {losses[max(losses)]:.4f} {unit}"
        best = best_trial(self.study.trials())
        return f"trial {number}: {trial.value:.4f} {unit}{', best so far' if best and best.number == number else ''}"


class _Watcher:
    """Reports the loss of a training on one fold, and ends it if its trial is pruned.

    The resource of a trial counts thirds of trainings. Its value is the mean over the folds so far of the lowest loss.
    """

    def __init__(self, search: _Search, trial: optuna.Trial, index: int) -> None:
        self.search, self.trial, self.index = search, trial, index
        self.reported = set(search.study.trial(trial.number).intermediate_values)
        self.begin, self.end = REDUCTION * index, REDUCTION * (index + 1)
        self.done = self.end in self.reported

    def due(self, done: float) -> bool:
        return self.index == 0 and not self.reported and done >= 1 / REDUCTION

    def validated(self, done: float, score: Score) -> None:
        resource = self.end if done >= 1 else self.begin + 1
        loss = score.bits(score.characters) if in_bits(self.search.definition) else score.loss
        losses = self.trial.user_attrs.get("losses", [])
        losses = [*losses[: self.index], min([loss, *losses[self.index :]])]
        self.trial.set_user_attr("losses", losses)
        if resource not in self.reported:
            self.trial.report(sum(losses) / len(losses), resource)
            self.reported.add(resource)
        record = self.search.study.trial(self.trial.number)
        if resource < REDUCTION * self.search.definition.folds and self.search.pruner.prune(
            self.search.study.optuna_study, record
        ):
            raise optuna.TrialPruned
