"""Training with differential privacy: random batches, clipped and noisy gradients, and the account of epsilon."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Layout
from llm_ext.cli.data.batches import make_batch
from llm_ext.cli.data.pairs import Indices
from llm_ext.cli.errors import CommandError
from llm_ext.cli.training.config import PrivateConfig
from llm_ext.cli.training.language import LanguageTask
from llm_ext.cli.training.task import Task
from llm_ext.cli.training.translation import TranslationTask

__all__ = ["Privacy", "PrivateLanguageTask", "PrivateTask", "PrivateTranslationTask"]

# The accountant: Rényi differential privacy, whose bounds hold for any number of steps.
MECHANISM = "rdp"
# The orders of which it takes the best; fractional ones, which are slow to compute, count where epsilon is large.
ORDERS = (*(1 + n / 4 for n in range(1, 16)), *range(5, 64), 80, 96, 128, 256, 512)


class PrivateTask(Task):
    """A task whose steps read a random batch: each sample takes part with the same probability, independently.

    Attributes:
        samples: Number of samples for training.
        sample: What a sample is, in words: the unit that is private.
        drawn: Samples in the batch of the last step.
    """

    samples: int
    sample: str
    drawn = 0

    def prepare_sampling(self, samples: int) -> None:
        """Set the number of samples.

        Raises:
            CommandError: There are fewer than a batch.
        """
        if samples < self.batch:
            expected = f"at most {samples} with --dp-epsilon, the number of samples ({self.sample} each)"
            raise CommandError(f"--batch must be {expected}, got {self.batch}")
        self.samples = samples
        # From the system's randomness: the batches must not follow from --seed.
        self._random = np.random.default_rng()

    def draw(self) -> Indices:
        """Return the samples of a step; there may be none."""
        found: Indices = np.flatnonzero(self._random.random(self.samples) < self.batch / self.samples)
        self.drawn = len(found)
        return found

    def state_tensors(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return nothing: no step depends on the one before."""
        return {}

    def state_layout(self, found: Mapping[str, Layout]) -> dict[str, Layout]:
        """Return the layout of no tensors."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Do nothing."""


class PrivateLanguageTask(PrivateTask, LanguageTask):
    """A language model and its text, cut into windows that share no token; each begins without a state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sample = f"a window of {self.config.chunk + 1} tokens"
        self.prepare_sampling((self.streams.end - self.streams.begin) // (self.config.chunk + 1))

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        length, text = self.config.chunk + 1, self.streams
        windows = text.begin + length * self.draw()
        if not len(windows):
            return torch.zeros((), device=self.fabric.device), 0
        rows = self.fabric.to_device(text.corpus.rows(windows, length, text.begin, text.end))
        self.stateful.state = None
        # All windows have the same length, so this is the mean of their losses.
        loss = F.cross_entropy(module(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        return loss, len(windows) * self.config.chunk


class PrivateTranslationTask(PrivateTask, TranslationTask):
    """A translator or a summarizer, and its pairs; the loss of a pair is the mean over its tokens."""

    sample = "a pair"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.prepare_sampling(len(self.batches.chosen))

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        indices = self.batches.chosen[self.draw()]
        if not len(indices):
            return torch.zeros((), device=self.fabric.device), 0
        *inputs, expected = self.fabric.to_device(make_batch(self.batches.pairs, indices, self.ends))
        tokens = inputs[-1].sum(1)
        nats = F.cross_entropy(module(*inputs), expected, reduction="none", label_smoothing=self.config.label_smoothing)
        return (nats / tokens.repeat_interleave(tokens)).sum() / len(indices), len(expected)


class Privacy:
    """Clips the gradient of each sample, adds noise to their sum, and keeps account of the privacy that is spent.

    The noise is such that the planned steps spend epsilon.

    Args:
        config: The settings.
        task: The task.
        adam: The optimizer.
        device: The device of the training.

    Attributes:
        model: The module of the task, watched by Opacus; the steps of the training must call this one.

    Raises:
        CommandError: Delta is too large for the number of samples, or epsilon cannot be reached.
        ModuleNotFoundError: Opacus is not installed.
    """

    def __init__(
        self, config: PrivateConfig, task: PrivateTask, adam: torch.optim.Optimizer, device: torch.device
    ) -> None:
        # Here, because Opacus is in an extra of its own.
        from opacus import GradSampleModule
        from opacus.accountants import create_accountant
        from opacus.accountants.utils import get_noise_multiplier
        from opacus.optimizers import DPOptimizer

        import llm_ext.privacy  # noqa: F401  (registers the layers)

        assert config.dp_epsilon is not None
        self.epsilon, self.delta, self.task = config.dp_epsilon, config.dp_delta, task
        if self.delta * task.samples >= 1:
            most = f"below one divided by the samples, 1 / {task.samples} = {1 / task.samples:.2g}"
            raise CommandError(f"--dp-delta must be {most}, got {self.delta:g}")
        self.rate, self.steps = task.batch / task.samples, int(config.last_step)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Optimal order")
                self.noise = get_noise_multiplier(
                    target_epsilon=self.epsilon,
                    target_delta=self.delta,
                    sample_rate=self.rate,
                    steps=self.steps,
                    accountant=MECHANISM,
                    alphas=ORDERS,
                )
        except ValueError:
            raise CommandError(
                f"--dp-epsilon {self.epsilon:g} cannot be reached in {self.steps} steps; "
                "give a larger one, more samples, fewer --steps, or a smaller --batch"
            ) from None
        self.accountant = create_accountant(mechanism=MECHANISM)
        self.model = GradSampleModule(task.module, loss_reduction="sum")
        generator = torch.Generator(device)
        generator.seed()
        self.optimizer = DPOptimizer(
            adam,
            noise_multiplier=self.noise,
            max_grad_norm=config.dp_max_norm,
            expected_batch_size=task.batch,
            generator=generator,
        )
        self.max_norm = config.dp_max_norm
        self.vocabulary = "" if config.tokens == "bytes" else "the vocabulary, learned from the text, "

    def notes(self) -> list[str]:
        """Return what is private, and what is not, for the user."""
        return [
            f"private: epsilon {self.epsilon:g} at delta {self.delta:g} for {self.task.sample}, after {self.steps:,} "
            f"steps; each of {self.task.samples:,} takes part in a step with probability {self.rate:.3g}",
            f"noise multiplier {self.noise:.3g}, gradients of a sample of a norm above {self.max_norm:g} scaled down",
            f"not private: {self.vocabulary}the losses that are printed and logged, the validation",
        ]

    def gradients(self, loss: Tensor, backward: Callable[[Tensor], object]) -> Tensor:
        """Compute the noisy gradients of a step, for the optimizer, and count the step; return their norm.

        Args:
            loss: The mean loss of the drawn samples.
            backward: Runs a backward pass.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.drawn:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook")  # an embedding's ids have no gradient
                backward(loss * self.task.drawn)
        else:
            for parameter in self.optimizer.params:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
        self.optimizer.pre_step()
        self.accountant.step(noise_multiplier=self.noise, sample_rate=self.rate)
        for parameter in self.optimizer.params:
            parameter.grad_sample = None  # the largest tensors of a step
        gradients = [parameter.grad for parameter in self.optimizer.params]
        return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])

    def spent(self) -> float:
        """Return the epsilon of the steps so far."""
        if not len(self.accountant):
            return 0.0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order")  # of little importance: the bound holds for every order
            return float(self.accountant.get_epsilon(self.delta, alphas=ORDERS))

    def to_saved(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue the account, as JSON values."""
        return {
            "mechanism": MECHANISM,
            "noise": self.noise,
            "history": [list(each) for each in self.accountant.history],
        }

    def restore(self, saved: dict[str, Any], step: int) -> None:
        """Continue the account of a checkpoint.

        Args:
            saved: What `to_saved` returned.
            step: Steps done.

        Raises:
            CommandError: The remaining steps would spend more than epsilon.
            KeyError: The account is incomplete.
        """
        self.noise = self.optimizer.noise_multiplier = float(saved["noise"])
        history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in saved["history"]]
        remaining = max(self.steps - step, 0)
        self.accountant.history = [*history, *([(self.noise, self.rate, remaining)] if remaining else [])]
        whole = self.spent()
        self.accountant.history = history
        if whole > self.epsilon * (1 + 1e-9):
            raise CommandError(
                f"cannot resume: {self.steps} steps would spend epsilon {whole:.3g}, above --dp-epsilon "
                f"{self.epsilon:g}; the noise was chosen for fewer --steps"
            )
