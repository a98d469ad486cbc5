"""The training loop of all tasks, on the devices and processes of Lightning Fabric."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from llm_ext.cli.checkpoint import STATE, Checkpoint, Layout, Run
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import EvaluationStoppedError, Processes, Score
from llm_ext.cli.training.config import MOST_STEPS, Config, PrivateConfig
from llm_ext.cli.training.privacy import Privacy, PrivateTask
from llm_ext.cli.training.report import Report
from llm_ext.cli.training.sharding import full_tensor, gathered, shard_like
from llm_ext.cli.training.signals import StopRequest
from llm_ext.cli.training.task import Task

__all__ = ["Progress", "Trainer", "Watcher"]

# Tensors of Adam for each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The progress of a training; checkpoints store it.

    Attributes:
        step: Number of steps done.
        seconds: Time spent, validation included.
        validated: Step of the last validation.
        best_step: Step of the best validation, or None.
        best_loss: Its loss in nats per token, or None.
        misses: Validations since the best one.
        losses: Sum of the training losses since the last record of the log.
        recent: Mean training loss in that record, or None.
    """

    step: int = 0
    seconds: float = 0.0
    validated: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    misses: int = 0
    losses: float = 0.0
    recent: float | None = None

    def __post_init__(self) -> None:
        """Check the types and ranges of what a checkpoint may hold."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            kinds = (int, float) if "float" in str(field.type) else (int,)
            if type(value) not in kinds or not 0 <= value <= MOST_STEPS:
                raise ValueError(f"progress: {field.name} must be from 0 to {MOST_STEPS}, got {value!r}")


class Watcher(Protocol):
    """Decides when a training validates, and receives each score; the training then prints nothing."""

    def due(self, done: float) -> bool:
        """Return whether to validate at a fraction `done` of the training; its end is validated in any case."""

    def validated(self, done: float, score: Score) -> None:
        """Receive a score; an exception ends the training without another checkpoint."""


class Trainer:
    """Trains a task: steps, validation, checkpoints, log.

    Args:
        fabric: Devices and processes.
        config: The settings.
        run: The run directory.
        task: Model and data.
        names: Paths of the data, stored in checkpoints.
        progress: The progress so far, from which to continue.
        watcher: Decides when to validate; None to validate every `validate_every` steps.

    Attributes:
        adam: The optimizer, not wrapped by Fabric.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        run: Run,
        task: Task,
        names: dict[str, list[str]],
        progress: Progress,
        watcher: Watcher | None = None,
    ) -> None:
        self.fabric, self.config, self.run, self.task = fabric, config, run, task
        self.names, self.progress, self.model = names, progress, task.model
        self.watcher = watcher
        if not isinstance(task, PrivateTask):  # before the optimizer, because dividing a model replaces its parameters
            self.module = fabric.setup_module(task.module)
        self.trained = [pair for pair in self.model.named_parameters() if pair[1].requires_grad]

        # fused: one kernel per step instead of several per parameter.
        self.adam = torch.optim.Adam([parameter for _, parameter in self.trained], lr=config.lr, fused=True)
        self.privacy: Privacy | None = None
        if isinstance(task, PrivateTask):
            assert isinstance(config, PrivateConfig)
            if fabric.world_size > 1:
                raise CommandError(f"--dp-epsilon trains in one process, got {fabric.world_size}")
            self.privacy = Privacy(config, task, self.adam, fabric.device)
            self.module = fabric.setup_module(self.privacy.model)
        self.optimizer: Any = fabric.setup_optimizers(self.adam)
        self.saved_step: int | None = None
        self.stop_request = StopRequest()
        # Tokens read and time spent on them since the last validation.
        self.tokens, self.busy_seconds = 0, 0.0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the optimizer and task state of a checkpoint; the model has its weights already.

        Raises:
            CommandError: The checkpoint is damaged, or has another number of rows per step.
        """
        self.saved_step = checkpoint.step
        found = checkpoint.layout(STATE)
        if not found:
            return  # saved before the first step
        # The fused kernel of Adam trusts the sizes of moments.
        expected = self.task.state_layout(found)
        for name, parameter in self.trained:
            expected[f"step.{name}"] = Layout([], torch.float32)
            for key in MOMENTS:
                expected[f"{key}.{name}"] = Layout(list(parameter.shape), parameter.dtype)
        tensors = checkpoint.tensors(STATE, expected)
        self.task.load_state_tensors(tensors)
        moments = {
            number: {"step": tensors[f"step.{name}"]}
            | {key: shard_like(tensors[f"{key}.{name}"], parameter) for key in MOMENTS}
            for number, (name, parameter) in enumerate(self.trained)
        }
        if self.privacy is not None:
            try:
                self.privacy.restore(checkpoint.config["training"]["privacy"], checkpoint.step)
            except (ArithmeticError, KeyError, TypeError, ValueError) as error:
                raise CommandError(f"{checkpoint.path / 'config.json'}: damaged: privacy: {error}") from None
        self.adam.load_state_dict({"state": moments, "param_groups": self.adam.state_dict()["param_groups"]})

    def fit(self, log: Path) -> int:
        """Train to the end or until a signal, writing to `log`.

        Returns:
            The number of the signal, or 0.

        Raises:
            CommandError: The loss or the gradient is not finite, or a checkpoint cannot be saved.
        """
        config, progress = self.config, self.progress
        self._started = time.perf_counter() - progress.seconds
        done = config.progress(progress.step, progress.seconds)
        silent, quiet = not self.fabric.is_global_zero, self.watcher is not None
        with self.stop_request, Report(log, progress.step, done, silent, quiet) as self.report:
            self._introduce()
            self._save(best=False, rehearsal=True)
            while not (stopped := self._stop_requested()):
                done = config.progress(progress.step, progress.seconds)
                if progress.step > progress.validated and (done >= 1 or self._validation_due(done)):
                    # A signal ends the validation; a resumed training repeats it from its beginning.
                    with contextlib.suppress(EvaluationStoppedError):
                        self._validate(done)
                elif done >= 1 or (config.patience and progress.misses >= config.patience):
                    break
                else:
                    self._step(done)
            if self.saved_step != progress.step:
                self._save(best=False)
        return (self.stop_request.number or signal.SIGTERM) if stopped else 0

    def _introduce(self) -> None:
        for note in [*self.task.notes, *(self.privacy.notes() if self.privacy is not None else [])]:
            self.report.say(note)
        processes = "1 process" if self.fabric.world_size == 1 else f"{self.fabric.world_size} processes"
        size = sum(parameter.numel() for parameter in self.model.parameters())
        frozen = size - sum(parameter.numel() for _, parameter in self.trained)
        self.report.say(
            f"{size:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}, {self.task.summary()}; "
            f"{self.fabric.device}, {processes}, {self.task.batch} {self.task.unit}"
        )

    def _step(self, done: float) -> None:
        """Do one training step; `done` is the fraction of the training before it."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        # Dropout depends on the step alone, so that a resumed training draws the same masks.
        torch.manual_seed(zlib.crc32(f"{config.seed} {progress.step} {self.fabric.global_rank}".encode()))
        loss, tokens = self.task.loss(self.module, progress.step)
        norm = self._gradients(loss)
        mean = self._sum(torch.stack((loss.detach(), norm)) / self.fabric.world_size)
        mean_loss, mean_norm = mean.tolist()
        # Checked before the update, so that the weights stay finite.
        self._check_finite(progress.step + 1, "loss", mean_loss)
        self._check_finite(progress.step + 1, "norm of the gradients", mean_norm)
        rate = config.learning_rate(done)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.optimizer.step()

        progress.step += 1
        progress.losses += mean_loss
        self.tokens += tokens
        self.busy_seconds += time.perf_counter() - started
        speed = self.tokens / self.busy_seconds
        self.report.advance(done, f"step {progress.step}, loss {mean_loss:.3f}, {speed:,.0f} {config.unit}s/s")
        if progress.step % config.log_every == 0:
            progress.recent = progress.losses / config.log_every
            progress.losses = 0.0
            self.report.record(
                "training",
                progress.step,
                loss=progress.recent,
                norm=mean_norm,
                rate=rate,
                tokens_per_second=round(speed),
                seconds=round(progress.seconds, 3),
            )

    def _gradients(self, loss: Tensor) -> Tensor:
        """Compute the gradients for the optimizer; return their norm, without privacy that before clipping."""
        if self.privacy is not None:
            return self.privacy.gradients(loss, self.fabric.backward)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.config.clip or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        return full_tensor(norm)

    def _validation_due(self, done: float) -> bool:
        if self.watcher is not None:
            return self.watcher.due(done)
        return self.progress.step % self.config.validate_every == 0

    def _validate(self, done: float) -> None:
        """Measure the validation loss and save a checkpoint; `done` is the fraction of the training before it."""
        progress = self.progress
        self.module.eval()
        processes = Processes(self.fabric.global_rank, self.fabric.world_size, self._sum, self._stop_requested)
        with gathered(self.task.module):
            score = self.task.validate(self.module, processes)
        self.module.train()
        self._check_finite(progress.step, "validation loss", score.loss)
        self._stop_requested()
        progress.validated = progress.step
        best = progress.best_loss is None or score.loss < progress.best_loss
        if best:
            progress.best_step, progress.best_loss, progress.misses = progress.step, score.loss, 0
        else:
            progress.misses += 1
        speed = self.tokens / self.busy_seconds if self.busy_seconds else 0.0
        self.tokens, self.busy_seconds = 0, 0.0
        spent = {} if self.privacy is None else {"epsilon": self.privacy.spent()}
        # Log before the checkpoint: resuming removes the records of later steps than that of the checkpoint.
        self.report.record(
            "validation",
            progress.step,
            loss=score.loss,
            **score.record(),
            best=best,
            tokens_per_second=round(speed),
            seconds=round(progress.seconds, 3),
            **spent,
        )
        if self.watcher is not None:
            self.watcher.validated(done, score)
        self._save(best)
        recent = "" if progress.recent is None else f"training {progress.recent:.4f}, "
        privacy = "".join(f"epsilon {epsilon:.3g}, " for epsilon in spent.values())
        self.report.say(
            f"step {progress.step}: {recent}validation {score.describe(self.config.unit)}, {privacy}"
            f"{speed:,.0f} {self.config.unit}s/s{', best' if best else ''}"
        )

    def _save(self, best: bool, rehearsal: bool = False) -> None:
        """Save a checkpoint, or only try to; all processes take part.

        Raises:
            CommandError: The checkpoint could not be written.
        """
        config, progress = self.config, self.progress
        # Before the first step Adam has no moments, and there is nothing to continue from.
        state = self.task.state_tensors(self._sum) if self.adam.state else {}
        for name, parameter in self.trained:
            moments = self.adam.state.get(parameter, {})
            state |= {f"{key}.{name}": full_tensor(tensor) for key, tensor in moments.items()}
        weights = {name: full_tensor(parameter) for name, parameter in self.model.named_parameters()}
        training = {
            **self.task.metadata(),
            "config": config.to_saved(),
            "progress": dataclasses.asdict(progress),
            "names": self.names,
            "fingerprints": self.task.fingerprints,
        }
        if self.privacy is not None:
            training["privacy"] = self.privacy.to_saved()
        failure = ""
        if self.fabric.is_global_zero:
            try:
                self.run.save(
                    progress.step,
                    self.model.config(),
                    weights,
                    training,
                    state,
                    best=best,
                    task=config.task,
                    rehearsal=rehearsal,
                )
            except OSError as error:
                reason = f"{error.strerror}; {self._last_saved()}"
                failure = f"step {progress.step} cannot be saved in {self.run.path}: {reason}"
        failure = self.fabric.broadcast(failure)
        if failure:
            raise CommandError(failure)
        if not rehearsal:
            self.saved_step = progress.step

    def _stop_requested(self) -> bool:
        """Return whether any process received a signal; update the time, which is that of the first process."""
        seconds, signals = time.perf_counter() - self._started, float(self.stop_request.number)
        if self.fabric.world_size > 1:
            values = [seconds if self.fabric.is_global_zero else 0.0, signals]
            total = self._sum(torch.tensor(values, dtype=torch.float64, device=self.fabric.device))
            seconds, signals = total.tolist()
        self.progress.seconds = seconds
        return signals > 0

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes."""
        return cast(Tensor, self.fabric.all_reduce(values, reduce_op="sum"))

    def _check_finite(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise CommandError(
                f"step {step}: the {name} is {value}; training stopped, {self._last_saved()}; try a smaller --lr"
            )

    def _last_saved(self) -> str:
        if not self.run.exists():
            return "nothing was saved yet"
        return f"the checkpoint of step {self.run.checkpoint('last').step} is kept"
