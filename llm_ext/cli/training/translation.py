"""Training of a translator or a summarizer: batches of pairs of similar length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.batches import PairBatches
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.pairs import EncodedPairs, PairFiles, encode_pairs, tokenizer_from_pairs
from llm_ext.cli.data.tokenizer import load_tokenizer
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Processes, Score, evaluate_pairs
from llm_ext.cli.training.config import SummaryConfig, TranslationConfig
from llm_ext.cli.training.task import Fold, InputFiles, Task, rows_of_process
from llm_ext.models import Seq2Seq

__all__ = ["TranslationData", "TranslationTask"]


@dataclass(frozen=True)
class TranslationData:
    """Encoded pairs with their tokenizers.

    Attributes:
        source: Tokenizer of the sources.
        target: Tokenizer of the targets.
        pairs: The training pairs, and the validation pairs if they have files of their own.
        notes: Messages about pairs that were left out or cut.
        fold: The part of the pairs to hold out, or None.
    """

    source: LineTokenizer
    target: LineTokenizer
    pairs: list[EncodedPairs]
    notes: list[str]
    fold: Fold | None

    @classmethod
    def prepare(
        cls, fabric: Fabric, config: TranslationConfig, run: Run, files: InputFiles, new_vocabulary: bool
    ) -> TranslationData:
        """Encode the pairs; the first process does it for all of them.

        Args:
            fabric: The processes.
            config: The settings.
            run: Directory of the tokenizers.
            files: The pairs.
            new_vocabulary: Build and save the tokenizers first.

        Raises:
            CommandError: A file cannot be used.
        """
        shared = config.vocabularies == "shared"
        parts = [PairFiles(*part) for part in files.parts]
        notes: list[str] = []
        with fabric.rank_zero_first():
            if new_vocabulary and fabric.is_global_zero:
                run.path.mkdir(parents=True, exist_ok=True)
                # Characters that occur in the validation pairs only must be known as well.
                val = parts[1] if len(parts) == 2 else None
                for side, path in enumerate([run.vocabulary] if shared else [run.vocabulary, run.target_vocabulary]):
                    sides = (0, 1) if shared else (side,)
                    tokenizer_from_pairs(config.tokens, parts[0], config.vocab_size, sides, val).save(path)
            source = LineTokenizer(load_tokenizer(run.vocabulary))
            target = source if shared else LineTokenizer(load_tokenizer(run.target_vocabulary))
            limits = config.longest, notes.append, _longest_source(config)
            pairs = [encode_pairs(part, source, target, files.cache, *limits) for part in parts]
        return cls(source, target, pairs, notes, files.fold)


class TranslationTask(Task):
    """A translator or a summarizer, and its pairs.

    Args:
        fabric: The processes.
        config: The settings.
        data: The pairs.
        model: The model to train.

    Raises:
        CommandError: There are too few pairs.
    """

    model: Seq2Seq
    unit = "pairs per step"
    folds = True

    def __init__(self, fabric: Fabric, config: TranslationConfig, data: TranslationData, model: Seq2Seq) -> None:
        self.fabric, self.config, self.notes = fabric, config, data.notes
        self.source, self.target = data.source, data.target
        self.vocabularies = (data.source.tokenizer, data.target.tokenizer)
        self.ends = (data.source.end, data.target.end)
        self.model = self.module = model

        self.fingerprints = [pairs.fingerprint() for pairs in data.pairs]
        training, self.validation = data.pairs[0], data.pairs[-1]
        chosen, self.held_out = np.arange(len(training)), np.arange(len(self.validation))
        if len(data.pairs) == 1:
            split = training.split(config.val_fraction) if data.fold is None else training.fold(*data.fold)
            chosen, self.held_out = split
        if not len(self.held_out):
            raise CommandError(
                "there must be at least one pair for validation, got none; "
                "give more pairs, a larger --val-fraction, or --val"
            )
        self.batch, self.mine = config.batch, rows_of_process(fabric, config.batch)
        self.batches = PairBatches(training, chosen, self.batch, config.seed, self.ends)
        self.longest = int(training.source_lengths[chosen].max()) + 1

    @classmethod
    def create(
        cls, fabric: Fabric, config: TranslationConfig, run: Run, files: InputFiles, model: Seq2Seq | None = None
    ) -> TranslationTask:
        """Prepare the data and build the model, or continue with a saved `model` and its tokenizers.

        Raises:
            CommandError: A file cannot be used, or there are too few pairs.
        """
        data = TranslationData.prepare(fabric, config, run, files, new_vocabulary=model is None)
        return cls(fabric, config, data, model or cls._new_model(config, data.source.size, data.target.size))

    @staticmethod
    def _new_model(config: TranslationConfig, source_vocab_size: int, target_vocab_size: int) -> Seq2Seq:
        torch.manual_seed(config.seed)
        return Seq2Seq(
            source_vocab_size,
            target_vocab_size,
            config.embedding,
            config.hidden,
            config.layers,
            config.dropout,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            attn_dim=config.attn_dim,
            input_feeding=config.input_feeding,
            share_embedding=config.vocabularies == "shared",
            tie_head=config.tie_head,
            copy=config.copy,
        )

    def summary(self) -> str:
        sizes = f"{self.source.size:,} tokens in the vocabulary"
        if self.config.vocabularies == "two":
            sizes = f"{self.source.size:,} and {self.target.size:,} tokens in the vocabularies"
        return (
            f"{sizes} ({self.source.tokenizer.kind}), "
            f"{len(self.batches.chosen):,} pairs for training, {len(self.held_out):,} for validation"
        )

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        batch, tokens = self.batches.read(step, self.mine)
        *inputs, expected = self.fabric.to_device(batch)
        nats = F.cross_entropy(module(*inputs), expected, reduction="sum", label_smoothing=self.config.label_smoothing)
        # Each token has the same weight, whichever process reads it.
        return nats * (self.fabric.world_size / tokens), tokens

    def validate(self, module: nn.Module, processes: Processes) -> Score:
        return evaluate_pairs(
            module, self.validation, self.held_out, self.ends, self.target.tokenizer, self.fabric.device, processes
        )

    def metadata(self) -> dict[str, int]:
        longest_source = _longest_source(self.config)
        return {"longest": self.longest} | ({} if longest_source is None else {"longest_source": longest_source})


def _longest_source(config: TranslationConfig) -> int | None:
    """Return the number of tokens to which sources are cut, or None if they are not."""
    return config.longest_source if isinstance(config, SummaryConfig) else None
