"""Learning to predict the next token of a text: parallel streams with the state carried along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.model import LLM, LLMState
from llm_ext.text import corpus as corpora
from llm_ext.text import tokens as vocabulary
from llm_ext.text.carry import Carrier
from llm_ext.text.checkpoint import Run
from llm_ext.text.config import TrainConfig
from llm_ext.text.corpus import Streams
from llm_ext.text.errors import TextError
from llm_ext.text.evaluate import Score, evaluate
from llm_ext.text.task import Task, Total


class LanguageTask(Task):
    """A language model and its text.

    Args:
        fabric: the processes.
        config: the settings.
        run: where the vocabulary is, or is to be.
        files: the text.
        val: text for validation; if none, the last part of `files`.
        cache: directory for the encoded text.
        model: what is to be trained on; None for a new one, with a new vocabulary.

    Raises:
        TextError: a file cannot be used, or there is too little text.
    """

    model: LLM
    unit = "streams"

    def __init__(
        self,
        fabric: Fabric,
        config: TrainConfig,
        run: Run,
        files: Sequence[Path],
        val: Sequence[Path],
        cache: Path,
        model: LLM | None,
    ) -> None:
        self.fabric, self.config, self.notes = fabric, config, []
        with fabric.rank_zero_first():
            if model is None and fabric.is_global_zero:
                run.path.mkdir(parents=True, exist_ok=True)
                # Characters that only the validation has would be impossible to encode.
                sources = [*files, *val] if config.tokens == "chars" else files
                vocabulary.train(config.tokens, sources, config.vocab_size).save(run.vocabulary)
            self.tokens = vocabulary.load(run.vocabulary, None if model is None else model.vocab_size)
            texts = [corpora.encode(part, self.tokens, cache) for part in (files, val) if part]
        self.vocabularies = (self.tokens,)
        if model is None:
            torch.manual_seed(config.seed)
            model = LLM(
                self.tokens.size,
                config.embedding,
                config.hidden,
                self.tokens.size,
                config.layers,
                config.dropout,
                cell=config.cell,
                nonlinearity=config.nonlinearity,
                attention=config.attention,
                attn_dim=config.attn_dim,
                score=config.score,
            )
        self.model, self.module = model, Carrier(model)
        self.carrier = self.module

        self.fingerprints = [text.fingerprint() for text in texts]
        training, validation = texts[0], texts[-1]
        split = len(training) if len(texts) == 2 else training.split(config.val_fraction)
        self.validation, self.val_begin = validation, 0 if len(texts) == 2 else split
        self.val_size = len(validation) - self.val_begin
        if self.val_size < 2:
            raise TextError(
                f"the text for validation must have at least 2 tokens, got {self.val_size}; "
                "give more text, a larger --val-fraction, or --val"
            )
        self.batch = config.batch * fabric.world_size
        first = config.batch * fabric.global_rank
        self.mine = slice(first, first + config.batch)
        self.streams = Streams(training, 0, split, self.batch, config.chunk, self.mine)

    def introduction(self) -> str:
        return (
            f"{self.tokens.size:,} tokens in the vocabulary ({self.tokens.kind}), "
            f"{self.streams.end:,} tokens to train on, {self.val_size:,} to validate"
        )

    def loss(self, wrapped: nn.Module, step: int, draw: Callable[[], object]) -> tuple[Tensor, int]:
        x, y = self.fabric.to_device(self.streams.read(step))
        if step % self.streams.steps_per_pass == 0:
            self.carrier.state = None
        draw()
        return F.cross_entropy(wrapped(x).flatten(0, 1), y.flatten()), self.batch * self.config.chunk

    def validate(self, wrapped: nn.Module, total: Total, stop: Callable[[], bool]) -> Score:
        with self.carrier.afresh():
            return evaluate(
                wrapped,
                self.validation,
                self.val_begin,
                len(self.validation),
                self.tokens,
                self.fabric.device,
                rank=self.fabric.global_rank,
                world=self.fabric.world_size,
                total=total,
                stop=stop,
            )

    def carried(self, total: Total) -> dict[str, Tensor]:
        """Return the state of all streams, those of other processes included."""
        state = self.carrier.state
        if state is None:
            return {}

        def gather(mine: Tensor, dim: int) -> Tensor:
            shape = list(mine.shape)
            shape[dim] = self.batch
            whole = mine.new_zeros(shape)
            whole.movedim(dim, 0)[self.mine] = mine.movedim(dim, 0)
            return total(whole)

        tensors = {"hidden": gather(state.hidden, 1)}
        if state.attention is not None:
            L, c = state.attention
            tensors |= {"attention.L": gather(L, 0), "attention.c": gather(c, 0)}
        if state.cell is not None:
            tensors["cell"] = gather(state.cell, 1)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        hidden, attention, cell = tensors["hidden"], None, None
        self.check_batch(hidden.shape[1])
        if self.config.attention != "none":
            attention = (tensors["attention.L"][self.mine], tensors["attention.c"][self.mine])
        if self.config.cell == "lstm":
            cell = tensors["cell"][:, self.mine]
        self.carrier.state = LLMState(*self.fabric.to_device((hidden[:, self.mine], attention, cell)))
