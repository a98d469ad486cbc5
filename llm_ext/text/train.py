"""Training: the loop that all tasks share, on devices and processes of Lightning Fabric."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor

from llm_ext.text.checkpoint import STATE, Checkpoint, Run
from llm_ext.text.config import CONFIGS, Config
from llm_ext.text.corpus import check_files
from llm_ext.text.device import default_device
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import EvaluationStoppedError
from llm_ext.text.language import LanguageTask
from llm_ext.text.memory import keep_freed_memory
from llm_ext.text.plot import plot_loss
from llm_ext.text.report import Report, read_log
from llm_ext.text.signals import Stop
from llm_ext.text.task import Task
from llm_ext.text.transfer import freeze, take_over
from llm_ext.text.translation import TranslationTask

LOG, PLOT, CACHE = "log.jsonl", "loss.svg", "cache"
TASKS: dict[str, Callable[..., Task]] = {"lm": LanguageTask, "translate": TranslationTask}


@dataclass
class Progress:
    """Where a training stands; with the tensors of a checkpoint, all that is needed to continue.

    step: steps done; `seconds`: spent on them, validation included.
    validated: the last step that was validated.
    best_step, best_loss: of the best validation, in nats a token.
    misses: validations since the best one.
    losses: of the training, summed since the last record of the log; `recent`: their mean in that record.
    """

    step: int = 0
    seconds: float = 0.0
    validated: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    misses: int = 0
    losses: float = 0.0
    recent: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    progress: where it stands.
    signal: number of the signal that stopped it before its end, or 0.
    first: whether this is the first of its processes, the one to speak.
    """

    progress: Progress
    signal: int
    first: bool


def train(
    config: Config,
    files: Sequence[Path],
    out: Path,
    *,
    val: Sequence[Path] = (),
    cache: Path | None = None,
) -> Outcome:
    """Train a model.

    Args:
        config: the settings; their class says what is learnt.
        files: the text; for a translator one file of tab-separated pairs, or that of the sources and that of the
            targets.
        out: run directory for vocabulary, checkpoints, log and plot; it must hold no run yet.
        val: likewise, for validation; if none, a part of `files`.
        cache: directory for the encoded text; by default inside `out`.

    Raises:
        TextError: a file is missing or cannot be used, the loss is no number, a checkpoint cannot be saved.
    """
    run = Run(out)
    if run.exists():
        raise TextError(f"{out}: holds a run already; continue it with --resume, or choose another --out")
    check_files([*files, *val])
    if config.init_from is not None:
        Run(Path(config.init_from)).checkpoint("best")
    fabric = _launch(config)
    task = TASKS[config.task](fabric, config, run, files, val, cache or out / CACHE, None)
    if config.init_from is not None:
        task.notes.append(take_over(task.model, task.vocabularies, Path(config.init_from), config.init))
    names = {"files": [str(path.resolve()) for path in files], "val": [str(path.resolve()) for path in val]}
    return _Trainer(fabric, config, run, task, names, Progress()).run_loop()


def resume(out: Path, changes: dict[str, Any], *, cache: Path | None = None) -> Outcome:
    """Continue a training from its last checkpoint, with the results it would have had without a stop.

    Args:
        out: the run directory.
        changes: settings to change, such as more steps.
        cache: directory for the encoded text; by default inside `out`.

    Raises:
        TextError: the checkpoint or the text is missing, damaged or another one; and as `train`.
    """
    run = Run(out)
    checkpoint = run.checkpoint("last")
    saved = checkpoint.config["training"]
    try:
        config = CONFIGS[checkpoint.task](**saved["config"])
        progress = Progress(**saved["progress"])
        names = saved["names"]
        files, val = ([Path(path) for path in names[part]] for part in ("files", "val"))
        fingerprints = saved["fingerprints"]
    except (KeyError, TypeError, ValueError) as error:
        raise TextError(f"{checkpoint.path / 'config.json'}: damaged: {error}") from None
    config = dataclasses.replace(config, **changes)
    check_files([*files, *val])
    model = checkpoint.model()
    run.vocabularies(model)
    fabric = _launch(config)
    task = TASKS[config.task](fabric, config, run, files, val, cache or out / CACHE, model)
    if task.fingerprints != fingerprints:
        raise TextError(f"{out}: cannot resume: the text has changed since the run was started")
    trainer = _Trainer(fabric, config, run, task, names, progress)
    trainer.restore(checkpoint)
    return trainer.run_loop()


def _launch(config: Config) -> Fabric:
    """Start the processes; under torchrun they run already, and it says how many.

    Their group is not taken down: DDP holds it last, and it would then wait, with Python's lock held, for threads of
    gloo that may want the lock.
    """
    devices = config.devices
    if TorchElasticEnvironment.detect():
        devices = TorchElasticEnvironment().world_size() // config.nodes
    try:
        fabric = Fabric(
            accelerator=default_device() if config.accelerator == "auto" else config.accelerator,
            devices=devices,
            num_nodes=config.nodes,
            precision=config.precision,  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        raise TextError(f"accelerator {config.accelerator!r} cannot be used: {error}") from None
    keep_freed_memory()
    fabric.launch()
    return fabric


class _Trainer:
    """The loop, and what it works on."""

    def __init__(
        self, fabric: Fabric, config: Config, run: Run, task: Task, names: dict[str, list[str]], progress: Progress
    ) -> None:
        self.fabric, self.config, self.run, self.task = fabric, config, run, task
        self.names, self.progress, self.model = names, progress, task.model
        freeze(self.model, config.frozen)
        self.trained = [pair for pair in self.model.named_parameters() if pair[1].requires_grad]

        # One fused kernel a step in place of several for each parameter.
        self.adam = torch.optim.Adam([parameter for _, parameter in self.trained], lr=config.lr, fused=True)
        self.wrapped, self.optimizer = fabric.setup(task.module, self.adam)
        self.saved: int | None = None  # step of the last checkpoint
        self.stop = Stop()
        # Tokens read and seconds spent on them since the last validation.
        self.read, self.busy = 0, 0.0

    def run_loop(self) -> Outcome:
        """Train to the end, or until a signal."""
        config, progress = self.config, self.progress
        self.started = time.perf_counter() - progress.seconds
        part = config.progress(progress.step, progress.seconds)
        log, first = self.run.path / LOG, self.fabric.is_global_zero
        with self.stop, Report(log, progress.step, part, silent=not first) as self.report:
            self._introduce()
            while not (stopped := self._stopped()):
                part = config.progress(progress.step, progress.seconds)
                due = part >= 1 or progress.step % config.validate_every == 0
                if due and progress.step > progress.validated:
                    # A signal ends the evaluation, which a resumed training then begins anew.
                    with contextlib.suppress(EvaluationStoppedError):
                        self._validate()
                elif part >= 1 or (config.patience and progress.misses >= config.patience):
                    break
                else:
                    self._step(part)
            if self.saved != progress.step:
                self._save(best=False)
        if first:
            plot_loss(read_log(log), self.run.path / PLOT)
        return Outcome(progress, (self.stop.number or signal.SIGTERM) if stopped else 0, first)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds besides the weights.

        Raises:
            TextError: it is damaged, or was saved with another number of streams.
        """
        self.saved = checkpoint.step
        tensors = checkpoint.tensors(STATE)
        if not tensors:
            return  # nothing was trained before it
        try:
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments = {
                number: {key: tensors[f"{key}.{name}"] for key in keys} for number, (name, _) in enumerate(self.trained)
            }
            self.task.restore(tensors)
        except KeyError as error:
            raise TextError(f"{checkpoint.path / STATE}: damaged: no {error} in it") from None
        self.adam.load_state_dict({"state": moments, "param_groups": self.adam.state_dict()["param_groups"]})

    def _introduce(self) -> None:
        """Say what is about to be trained."""
        for note in self.task.notes:
            self.report.say(note)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        fixed = size - sum(parameter.numel() for _, parameter in self.trained)
        self.report.say(
            f"{size:,} parameters{f', {fixed:,} of them frozen' if fixed else ''}, {self.task.introduction()}; "
            f"{self.fabric.device}, {self.fabric.world_size} process(es), {self.task.batch} {self.task.unit}"
        )

    def _stopped(self) -> bool:
        """Whether any process was asked to stop; also reads the clock, which is that of the first process."""
        seconds, signals = time.perf_counter() - self.started, float(self.stop.number)
        if self.fabric.world_size > 1:
            values = [seconds if self.fabric.is_global_zero else 0.0, signals]
            total = self._total(torch.tensor(values, dtype=torch.float64, device=self.fabric.device))
            seconds, signals = total.tolist()
        self.progress.seconds = seconds
        return signals > 0

    def _total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        return cast(Tensor, self.fabric.all_reduce(values, reduce_op="sum"))

    def _step(self, part: float) -> None:
        """Read what belongs to the step and learn from it; `part` of the training is done."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        # Dropout is a function of the step, so that a resumed training draws the same.
        seed = zlib.crc32(f"{config.seed} {progress.step} {self.fabric.global_rank}".encode())
        loss, tokens = self.task.loss(self.wrapped, progress.step, lambda: torch.manual_seed(seed))
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=config.clip or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        mean = self._total(torch.stack((loss.detach(), norm)) / self.fabric.world_size)
        loss_now, norm_now = mean.tolist()
        # Before the update, so that the weights stay good.
        self._check_finite(progress.step + 1, "loss", loss_now)
        self._check_finite(progress.step + 1, "norm of the gradients", norm_now)
        rate = config.rate(part)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.optimizer.step()

        progress.step += 1
        progress.losses += loss_now
        self.read += tokens
        self.busy += time.perf_counter() - started
        speed = self.read / self.busy
        self.report.advance(part, f"step {progress.step}, loss {loss_now:.3f}, {speed:,.0f} tokens/s")
        if progress.step % config.log_every == 0:
            progress.recent = progress.losses / config.log_every
            progress.losses = 0.0
            self.report.record(
                "training",
                progress.step,
                loss=progress.recent,
                norm=norm_now,
                rate=rate,
                tokens_per_second=round(speed),
                seconds=round(progress.seconds, 3),
            )

    def _validate(self) -> None:
        """Measure the loss on the text for validation, and save."""
        progress = self.progress
        self.wrapped.eval()
        score = self.task.validate(self.wrapped, self._total, self._stopped)
        self.wrapped.train()
        self._check_finite(progress.step, "loss on the text for validation", score.loss)
        self._stopped()
        progress.validated = progress.step
        best = progress.best_loss is None or score.loss < progress.best_loss
        if best:
            progress.best_step, progress.best_loss, progress.misses = progress.step, score.loss, 0
        else:
            progress.misses += 1
        speed = self.read / self.busy if self.busy else 0.0
        self.read, self.busy = 0, 0.0
        # The log before the checkpoint: resuming drops what it says of later steps than the checkpoint's.
        self.report.record(
            "validation",
            progress.step,
            loss=score.loss,
            bits_per_character=score.bits(score.characters),
            best=best,
            tokens_per_second=round(speed),
            seconds=round(progress.seconds, 3),
        )
        self._save(best)
        recent = "" if progress.recent is None else f"training {progress.recent:.4f}, "
        self.report.say(
            f"step {progress.step}: {recent}validation {score.loss:.4f} nats "
            f"({score.bits(score.tokens):.4f} bits) a token, {speed:,.0f} tokens/s{', best' if best else ''}"
        )

    def _check_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TextError(f"step {step}: the {name} is {value}; training stopped, {self._kept()}; try a smaller --lr")

    def _kept(self) -> str:
        """What is there to go back to."""
        if not self.run.exists():
            return "nothing was saved yet"
        return f"the checkpoint of step {self.run.checkpoint('last').step} is kept"

    def _save(self, best: bool) -> None:
        """Save a checkpoint; every process takes part.

        Raises:
            TextError: it could not be written.
        """
        config, progress = self.config, self.progress
        # Before the first step Adam has no moments, and there is nothing to continue.
        state = self.task.carried(self._total) if self.adam.state else {}
        for name, parameter in self.trained:
            state |= {f"{key}.{name}": tensor for key, tensor in self.adam.state.get(parameter, {}).items()}
        training = {
            **self.task.known(),
            "config": dataclasses.asdict(config),
            "progress": dataclasses.asdict(progress),
            "names": self.names,
            "fingerprints": self.task.fingerprints,
        }
        failure = ""
        if self.fabric.is_global_zero:
            try:
                weights = dict(self.model.named_parameters())
                self.run.save(progress.step, self.model.config(), weights, training, state, best=best, task=config.task)
            except OSError as error:
                reason = f"{error.strerror}; {self._kept()}"
                failure = f"step {progress.step} cannot be saved in {self.run.path}: {reason}"
        failure = self.fabric.broadcast(failure)
        if failure:
            raise TextError(failure)
        self.saved = progress.step
