"""What a training learns: the model, what it reads at each step, how well it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from llm_ext.model import LLM
from llm_ext.seq2seq import Seq2Seq
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import Score
from llm_ext.text.tokens import Tokens

Total = Callable[[Tensor], Tensor]


class Task(ABC):
    """One of the things that the loop of `train.py` can learn, a subclass for each.

    model: whose weights are learnt.
    module: what Fabric wraps: the model, and what it needs around it.
    vocabularies: that of the model, or those of its source and its target.
    fingerprints: of the texts, by which a changed one is noticed.
    batch: rows of a step, of all processes together; `unit` says of what.
    notes: what the user must know of the texts.
    """

    model: LLM | Seq2Seq
    module: nn.Module
    vocabularies: tuple[Tokens, ...]
    fingerprints: list[str]
    batch: int
    unit: str
    notes: list[str]

    @abstractmethod
    def introduction(self) -> str:
        """Say what there is to learn from."""

    @abstractmethod
    def loss(self, wrapped: nn.Module, step: int, draw: Callable[[], object]) -> tuple[Tensor, int]:
        """Read what belongs to a step.

        Args:
            wrapped: `module`, as Fabric has wrapped it.
            step: how many came before.
            draw: seeds what the model draws; called before it runs.

        Returns:
            A loss whose mean over the processes is that of the step, and how many tokens all processes read.
        """

    @abstractmethod
    def validate(self, wrapped: nn.Module, total: Total, stop: Callable[[], bool]) -> Score:
        """Measure the loss on what is kept for validation.

        Args:
            wrapped: `module`, as Fabric has wrapped it, in evaluation mode.
            total: adds up a tensor over the processes.
            stop: asked now and then.

        Raises:
            EvaluationStoppedError: `stop` said so.
        """

    @abstractmethod
    def carried(self, total: Total) -> dict[str, Tensor]:
        """Return what else than weights and moments is needed to continue, of all processes."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `carried` returned.

        Raises:
            KeyError: something is not in it.
            TextError: it does not fit.
        """

    def known(self) -> dict[str, int]:
        """Return what those who use the model want to know of its training."""
        return {}

    def check_batch(self, before: int) -> None:
        """Raise a TextError if there are not as many rows a step as before."""
        if before != self.batch:
            raise TextError(f"cannot resume: batch × processes must be {before} as before, got {self.batch}")
