"""Training from start to end: settings, data, task, loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.files import check_files, copy_pipes
from llm_ext.cli.errors import CommandError
from llm_ext.cli.streams import warn
from llm_ext.cli.training.classification import ClassificationTask
from llm_ext.cli.training.config import CONFIGS, Config, PrivateConfig, SampleConfig
from llm_ext.cli.training.failures import Failures
from llm_ext.cli.training.language import LanguageTask
from llm_ext.cli.training.launch import launch, process_count
from llm_ext.cli.training.plot import plot_loss
from llm_ext.cli.training.privacy import PrivateLanguageTask, PrivateTranslationTask
from llm_ext.cli.training.report import read_log
from llm_ext.cli.training.task import Fold, InputFiles, Task
from llm_ext.cli.training.trainer import Progress, Trainer, Watcher
from llm_ext.cli.training.transcription import TranscriptionTask
from llm_ext.cli.training.transfer import freeze, initialize_from
from llm_ext.cli.training.translation import TranslationTask

__all__ = ["CACHE", "LOG", "PLOT", "Outcome", "fingerprints", "input_files", "resume", "train"]

# Names in a run directory.
LOG, PLOT, CACHE = "log.jsonl", "loss.svg", "cache"

TASKS: dict[str, Callable[..., Task]] = {
    "lm": LanguageTask.create,
    "translate": TranslationTask.create,
    "summarize": TranslationTask.create,
    "classify": ClassificationTask.create,
    "transcribe": TranscriptionTask.create,
}
PRIVATE_TASKS: dict[str, Callable[..., Task]] = {
    "lm": PrivateLanguageTask.create,
    "translate": PrivateTranslationTask.create,
    "summarize": PrivateTranslationTask.create,
}


@dataclass(frozen=True)
class Outcome:
    """The end of a training.

    Attributes:
        progress: The steps and losses so far.
        signal: Number of the signal that stopped the training early; 0 if none did.
        first: Whether this is the first process, which reports to the user.
        unit: Unit over which the loss is the mean.
    """

    progress: Progress
    signal: int
    first: bool
    unit: str = "token"


def train(
    config: Config,
    files: Sequence[Path],
    out: Path,
    *,
    val: Sequence[Path] = (),
    cache: Path | None = None,
    fold: Fold | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Train a model.

    Args:
        config: The settings, an instance of one of `CONFIGS`.
        files: The text; for pairs one file of tab-separated pairs, or a file of sources and one of targets; for samples
            a manifest, an `.npz` file or a directory.
        out: Run directory for tokenizers, checkpoints, log and plot; it must not hold a run.
        val: The same for validation; empty to hold out a part of `files`.
        cache: Directory for the encoded text; by default inside `out`.
        fold: The part of `files` to hold out; by default as the settings say.
        watcher: Decides when to validate. Then the training is one of several: in this process only, without a plot.

    Raises:
        CommandError: A file cannot be used, the loss is not finite, or a checkpoint cannot be saved.
    """
    run, alone = Run(out), watcher is not None
    with Failures(alone) as failures:
        pipes = [path for path in (*files, *val) if path.is_fifo() or path.is_char_device()]
        if pipes and process_count(config, alone) > 1:
            raise CommandError(f"{pipes[0]}: several processes cannot read a pipe; save it in a file")
        fabric = launch(config, alone)
        failures.watch(fabric)
        _refuse_a_run(run)
        inputs = input_files(config, files, val, cache or out / CACHE, fold)
        init_from = None if config.init_from is None else Path(config.init_from)
        if init_from is not None:
            Run(init_from).checkpoint("best")  # reports an error before the text is encoded
        with _locked(run, fabric):
            _refuse_a_run(run)  # another process may have trained here meanwhile
            task = _tasks(config)[config.task](fabric, config, run, inputs)
            if init_from is not None:
                task.notes.append(initialize_from(task.model, task.vocabularies, init_from, config.init))
            freeze(task.model, config.frozen)
            return _fit(Trainer(fabric, config, run, task, inputs.names(), Progress(), watcher))


def resume(
    out: Path,
    changes: dict[str, Any],
    *,
    cache: Path | None = None,
    fold: Fold | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Continue a training from its last checkpoint, with the results of an uninterrupted one.

    Args:
        out: The run directory.
        changes: Settings to change, such as more steps.
        cache: Directory for the encoded text; by default inside `out`.
        fold: The same as that of `train`.
        watcher: The same as that of `train`.

    Raises:
        CommandError: The checkpoint or the text is missing, damaged or changed; and as `train`.
    """
    run, alone = Run(out), watcher is not None
    with Failures(alone) as failures:
        checkpoint = run.checkpoint("last")
        run.checkpoint("best")  # reports an error before the training, whose saves keep its name
        saved = checkpoint.config["training"]
        try:
            config = CONFIGS[checkpoint.task].from_saved(saved["config"])
            progress = Progress(**saved["progress"])
            if progress.step != checkpoint.step:
                raise ValueError(f"progress: step must be {checkpoint.step}, got {progress.step}")
            names = saved["names"]
            files, val = ([Path(path) for path in names[part]] for part in ("files", "val"))
            fingerprints = saved["fingerprints"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{checkpoint.path / 'config.json'}: damaged: {error}") from None
        for path in (*files, *val):
            # A training has copies of pipes, so another one is not from a training, and may have no end.
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise CommandError(f"{path}: cannot resume: expected a file, got a pipe or a device")
        try:
            config = dataclasses.replace(config, **changes)
        except ValueError as error:
            raise CommandError(f"cannot resume: --{error}") from None
        if "strategy" not in changes and process_count(config, alone) == 1:
            config = dataclasses.replace(config, strategy="auto")  # that of the run needs several processes
        fabric = launch(config, alone)
        failures.watch(fabric)
        inputs = input_files(config, files, val, cache or out / CACHE, fold)
        with _locked(run, fabric):
            if run.checkpoint("last").path != checkpoint.path:
                raise CommandError(f"{out}: cannot resume: another process has just trained here; try again")
            model = checkpoint.model()
            run.vocabularies(model, checkpoint.task)  # reports an error if they do not fit the model
            task = _tasks(config)[config.task](fabric, config, run, inputs, model)
            if task.fingerprints != fingerprints:
                raise CommandError(f"{out}: cannot resume: the text has changed since the run was started")
            freeze(task.model, config.frozen)
            trainer = Trainer(fabric, config, run, task, names, progress, watcher)
            trainer.restore(checkpoint)
            return _fit(trainer)


def fingerprints(config: Config, files: Sequence[Path], scratch: Path, cache: Path, fold: Fold | None) -> list[str]:
    """Check that `train` can begin with some settings and a fold; return the hashes of the encoded texts.

    Args:
        config: The settings.
        files: As for `train`.
        scratch: Directory for tokenizers.
        cache: Directory for the encoded text.
        fold: As for `train`.

    Raises:
        CommandError: A file, or one of the settings, cannot be used.
    """
    inputs = input_files(config, files, (), cache, fold)
    task = TASKS[config.task](launch(config, alone=True), config, Run(scratch), inputs)
    if fold is not None and not task.folds:
        raise CommandError(f"--folds: not for --task {config.task}; --folds 1 holds out --val-fraction")
    freeze(task.model, config.frozen)
    return task.fingerprints


def input_files(
    config: Config, files: Sequence[Path], val: Sequence[Path], cache: Path, fold: Fold | None
) -> InputFiles:
    """Return the files of a training, with copies of pipes; paths of samples are checked as they are read.

    Raises:
        CommandError: A file cannot be used.
    """
    if isinstance(config, SampleConfig):
        return InputFiles(files, val, cache, fold)
    check_files([*files, *val])
    return InputFiles(copy_pipes(files, cache), copy_pipes(val, cache), cache, fold)


def _refuse_a_run(run: Run) -> None:
    if run.exists():
        raise CommandError(f"{run.path}: holds a run already; continue it with --resume, or choose another --out")


def _locked(run: Run, fabric: Fabric) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the first of the processes keeps others from training in a run directory."""
    return run.locked() if fabric.is_global_zero else contextlib.nullcontext()


def _tasks(config: Config) -> dict[str, Callable[..., Task]]:
    """Return what builds the task of a config."""
    return PRIVATE_TASKS if isinstance(config, PrivateConfig) and config.dp_epsilon is not None else TASKS


def _fit(trainer: Trainer) -> Outcome:
    """Run the training loop and plot its log."""
    first, out = trainer.fabric.is_global_zero, trainer.run.path
    signal = trainer.fit(out / LOG)
    if first and trainer.watcher is None:
        try:
            plot_loss(read_log(out / LOG), out / PLOT, trainer.config.unit)
        except (ArithmeticError, OSError, ValueError) as error:  # of a damaged log, or of a disk; the model is saved
            warn(f"{out / PLOT}: the loss cannot be drawn: {getattr(error, 'strerror', None) or error}")
    # torchrun ends all processes when one ends with the code of a signal.
    trainer.fabric.barrier()
    return Outcome(trainer.progress, signal, first, trainer.config.unit)
