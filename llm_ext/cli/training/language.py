"""Training of a language model: parallel streams of text with the state carried along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Layout, Run
from llm_ext.cli.data.corpus import Corpus, Streams, encode_text
from llm_ext.cli.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Processes, Score, evaluate_text
from llm_ext.cli.inference.stateful import StatefulLLM
from llm_ext.cli.training.config import LanguageConfig
from llm_ext.cli.training.task import InputFiles, Task, rows_of_process
from llm_ext.models import LLM, LLMState

__all__ = ["LanguageData", "LanguageTask"]


@dataclass(frozen=True)
class LanguageData:
    """An encoded text with its tokenizer.

    Attributes:
        tokenizer: Tokenizer of the text.
        texts: The training text, and the validation text if it has files of its own.
        training: Begin and end of the training text in `texts[0]`; see `Streams`.
        validation: Begin and end of the validation text in `texts[-1]`.
    """

    tokenizer: Tokenizer
    texts: list[Corpus]
    training: tuple[int, int]
    validation: tuple[int, int]

    @classmethod
    def prepare(
        cls, fabric: Fabric, config: LanguageConfig, run: Run, files: InputFiles, new_vocabulary: bool
    ) -> LanguageData:
        """Encode the text; the first process does it for all of them.

        Args:
            fabric: The processes.
            config: The settings.
            run: Directory of the tokenizer.
            files: The text.
            new_vocabulary: Build and save the tokenizer first.

        Raises:
            CommandError: A file cannot be used.
        """
        with fabric.rank_zero_first():
            if new_vocabulary and fabric.is_global_zero:
                run.path.mkdir(parents=True, exist_ok=True)
                # Characters that occur in the validation text only must be known as well.
                texts = [*files.training, *files.val] if config.tokens == "chars" else files.training
                tokenizer_from_files(config.tokens, texts, config.vocab_size).save(run.vocabulary)
            tokenizer = load_tokenizer(run.vocabulary)
            corpora = [encode_text(part, tokenizer, files.cache) for part in files.parts]
        text = corpora[0]
        if files.val:
            return cls(tokenizer, corpora, (0, len(text)), (0, len(corpora[1])))
        if files.fold is None:
            split = text.split(config.val_fraction)
            return cls(tokenizer, corpora, (0, split), (split, len(text)))
        begin, end = text.fold(*files.fold)
        if end - begin < 2:
            raise CommandError(f"--folds {files.fold.folds}: the text has only {len(text)} tokens")
        # The training text begins behind the held-out part and continues from the end of the text at its beginning.
        return cls(tokenizer, corpora, (end, begin + len(text)), (begin, end))


class LanguageTask(Task):
    """A language model and its text.

    Args:
        fabric: The processes.
        config: The settings.
        data: The text.
        model: The model to train.

    Raises:
        CommandError: The text is too short.
    """

    model: LLM
    unit = "streams"
    folds = True

    def __init__(self, fabric: Fabric, config: LanguageConfig, data: LanguageData, model: LLM) -> None:
        self.fabric, self.config, self.notes = fabric, config, []
        self.tokenizer = data.tokenizer
        self.vocabularies = (data.tokenizer,)
        self.model = model
        self.module = self.stateful = StatefulLLM(model)

        self.fingerprints = [text.fingerprint() for text in data.texts]
        self.validation = data.texts[-1]
        self.val_begin, self.val_end = data.validation
        self.val_size = self.val_end - self.val_begin
        if self.val_size < 2:
            raise CommandError(
                f"the text for validation must have at least 2 tokens, got {self.val_size}; "
                "give more text, a larger --val-fraction, or --val"
            )
        self.batch, self.mine = config.batch, rows_of_process(fabric, config.batch)
        self.streams = Streams(data.texts[0], *data.training, self.batch, config.chunk, self.mine)

    @classmethod
    def create(
        cls, fabric: Fabric, config: LanguageConfig, run: Run, files: InputFiles, model: LLM | None = None
    ) -> LanguageTask:
        """Prepare the data and build the model, or continue with a saved `model` and its tokenizer.

        Raises:
            CommandError: A file cannot be used, or the text is too short.
        """
        data = LanguageData.prepare(fabric, config, run, files, new_vocabulary=model is None)
        return cls(fabric, config, data, model or cls._new_model(config, data.tokenizer.size))

    @staticmethod
    def _new_model(config: LanguageConfig, vocab_size: int) -> LLM:
        torch.manual_seed(config.seed)
        return LLM(
            vocab_size,
            config.embedding,
            config.hidden,
            vocab_size,
            config.layers,
            config.dropout,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            attention=config.attention,
            attn_dim=config.attn_dim,
            score=config.score,
        )

    def summary(self) -> str:
        return (
            f"{self.tokenizer.size:,} tokens in the vocabulary ({self.tokenizer.kind}), "
            f"{self.streams.end - self.streams.begin:,} tokens for training, {self.val_size:,} for validation"
        )

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        x, y = self.fabric.to_device(self.streams.read(step))
        if step % self.streams.steps_per_pass == 0:
            self.stateful.state = None
        return F.cross_entropy(module(x).flatten(0, 1), y.flatten()), self.batch * self.config.chunk

    def validate(self, module: nn.Module, processes: Processes) -> Score:
        with self.stateful.fresh_state():
            return evaluate_text(
                module,
                self.validation,
                self.val_begin,
                self.val_end,
                self.tokenizer,
                self.fabric.device,
                processes,
            )

    def state_tensors(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the state of all streams, those of other processes included."""
        state = self.stateful.state
        if state is None:
            return {}

        def gather(mine: Tensor, dim: int) -> Tensor:
            shape = list(mine.shape)
            shape[dim] = self.batch
            whole = mine.new_zeros(shape)
            whole.movedim(dim, 0)[self.mine] = mine.movedim(dim, 0)
            return sum_over_processes(whole)

        tensors = {"hidden": gather(state.hidden, 1)}
        if state.attention is not None:
            L, c = state.attention
            tensors |= {"attention.L": gather(L, 0), "attention.c": gather(c, 0)}
        if state.cell is not None:
            tensors["cell"] = gather(state.cell, 1)
        return tensors

    def state_layout(self, found: Mapping[str, Layout]) -> dict[str, Layout]:
        if "hidden" in found and len(found["hidden"].shape) == 3:
            self.check_batch(found["hidden"].shape[1])
        rnn, pool, B = self.model.rnn, self.model.pool, self.batch
        dtype = torch.float32 if self.config.precision == "32-true" else torch.bfloat16
        layout = {"hidden": Layout([rnn.num_layers, B, rnn.hidden_size], dtype)}
        if pool is not None:
            layout["attention.L"] = Layout([B, 2], torch.float32)
            layout["attention.c"] = Layout([B, pool.embed_dim], torch.float32)
        return layout | ({"cell": layout["hidden"]} if rnn.mode == "LSTM" else {})

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        hidden, attention, cell = tensors["hidden"], None, None
        if self.model.pool is not None:
            attention = (tensors["attention.L"][self.mine], tensors["attention.c"][self.mine])
        if self.model.rnn.mode == "LSTM":
            cell = tensors["cell"][:, self.mine]
        self.stateful.state = LLMState(*self.fabric.to_device((hidden[:, self.mine], attention, cell)))
