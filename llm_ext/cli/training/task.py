"""The interface between the training loop and what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Layout, Model, Vocabulary
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Processes, Score

__all__ = ["Fold", "InputFiles", "Task", "rows_of_process"]


class Fold(NamedTuple):
    """One of the equal parts of the training data in a cross-validation: it is held out, the others are trained on."""

    number: int
    folds: int


@dataclass(frozen=True)
class InputFiles:
    """The files that a training reads.

    Attributes:
        training: The text, one or two files of pairs, or one path of samples.
        val: The same for validation; empty to hold out a part of `training`.
        cache: Directory for the encoded text.
        fold: The part of `training` to hold out, without `val`; None to hold out `val_fraction` of it.
    """

    training: Sequence[Path]
    val: Sequence[Path]
    cache: Path
    fold: Fold | None = None

    @property
    def parts(self) -> list[Sequence[Path]]:
        """Training files, and validation files if there are any."""
        return [files for files in (self.training, self.val) if files]

    def names(self) -> dict[str, list[str]]:
        """Return the absolute paths as JSON values."""
        return {
            "files": [str(path.resolve()) for path in self.training],
            "val": [str(path.resolve()) for path in self.val],
        }


def rows_of_process(fabric: Fabric, batch: int) -> slice:
    """Return the rows that this process reads of a batch, which the number of processes divides."""
    size = batch // fabric.world_size
    return slice(size * fabric.global_rank, size * (fabric.global_rank + 1))


class Task(ABC):
    """A model with its data, for the loop of `Trainer`.

    Attributes:
        model: The model to train.
        module: What Fabric wraps: the model, or a module around it.
        vocabularies: Names of the rows of embeddings and head, as `Run.vocabularies` returns it.
        fingerprints: Hashes of the texts, to detect changes when a run is resumed.
        batch: Rows per step of all processes together.
        unit: What a row is, in words.
        notes: Messages about the data for the user.
        folds: Whether the task holds out `InputFiles.fold`, if there is one.
    """

    model: Model
    module: nn.Module
    vocabularies: tuple[Vocabulary, ...]
    fingerprints: list[str]
    batch: int
    unit: str
    notes: list[str]
    folds = False

    @abstractmethod
    def summary(self) -> str:
        """Return the sizes of vocabulary and data in words."""

    @abstractmethod
    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        """Compute the loss of a step.

        Args:
            module: `self.module` as wrapped by Fabric.
            step: Number of steps before this one.

        Returns:
            A loss whose mean over the processes is that of the step, and the number of tokens of all processes.
        """

    @abstractmethod
    def validate(self, module: nn.Module, processes: Processes) -> Score:
        """Measure the loss on the validation data.

        Args:
            module: `self.module` as wrapped by Fabric, in evaluation mode.
            processes: The processes that share the work.

        Raises:
            EvaluationStoppedError: `processes.stop` returned True.
        """

    def state_tensors(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the tensors besides weights and moments that are needed to continue, those of all processes.

        By default the number of rows per step, which with the step determines the rows to read.
        """
        return {"batch": torch.tensor([self.batch])}

    def state_layout(self, found: Mapping[str, Layout]) -> dict[str, Layout]:
        """Return the layout of what `state_tensors` returns.

        Args:
            found: The layout of the saved tensors.

        Raises:
            CommandError: The number of rows per step was another one.
        """
        return {"batch": Layout([1], torch.int64)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state_tensors` returned.

        Args:
            tensors: Saved tensors of the layout that `state_layout` returns.

        Raises:
            CommandError: The number of rows per step was another one.
        """
        self.check_batch(int(tensors["batch"]))

    def metadata(self) -> dict[str, int]:
        """Return JSON values that inference needs from the training."""
        return {}

    def check_batch(self, saved: int) -> None:
        """Raise a CommandError if the number of rows per step differs from that of the saved run."""
        if saved != self.batch:
            rows = self.unit.split()[0]
            raise CommandError(f"cannot resume: each step must have {saved} {rows} as before, got {self.batch}")
