"""Training of a transcriber: the text of a sequence of vectors, by CTC or by a decoder with attention."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.splits import Indices
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.evaluation import Processes, Score
from llm_ext.cli.inference.transcriber import (
    ctc_nats,
    encode_texts,
    evaluate_transcripts,
    fits_ctc,
    make_transcript_batch,
)
from llm_ext.cli.training.config import TranscriptionConfig
from llm_ext.cli.training.samples import SampleData, SampleTask
from llm_ext.cli.training.task import InputFiles
from llm_ext.models import Seq2Seq, SequenceClassifier

__all__ = ["TranscriptionTask"]


class TranscriptionTask(SampleTask):
    """A transcriber and its samples.

    Args:
        fabric: The processes.
        config: The settings.
        data: The samples.
        model: The model to train.

    Raises:
        CommandError: There are too few samples, or a text cannot be encoded.
    """

    model: Seq2Seq | SequenceClassifier

    def __init__(
        self, fabric: Fabric, config: TranscriptionConfig, data: SampleData, model: Seq2Seq | SequenceClassifier
    ) -> None:
        super().__init__(fabric, config, data)
        assert data.tokenizer is not None
        self.model = self.module = model
        self.target = LineTokenizer(data.tokenizer)
        self.vocabularies = (data.tokenizer,)
        self.label_smoothing = config.label_smoothing
        self.ids = [encode_texts(part, self.target) for part in data.samples]
        self.chosen = self._that_fit(0, data.chosen)
        self.held_out = self._that_fit(len(self.ids) - 1, data.held_out)
        if not len(self.held_out):
            raise CommandError("no sample for validation has at least as many steps as its text needs")
        self.batches = self.make_batches(config, self.chosen)

    def _that_fit(self, part: int, indices: Indices) -> Indices:
        """Return the samples that are long enough for CTC, and note how many are not."""
        if isinstance(self.model, Seq2Seq):
            return indices
        lengths, ids = self.data.encoded[part].lengths, self.ids[part]
        fit = np.array([fits_ctc(int(lengths[index]), ids[index]) for index in indices.tolist()])
        if not fit.all():
            first = self.data.samples[part][int(indices[np.argmin(fit)])].name
            self.notes.append(f"left out {(~fit).sum():,} samples with fewer steps than their text needs ({first}, …)")
        fitting: Indices = indices[fit]
        return fitting

    @classmethod
    def create(
        cls,
        fabric: Fabric,
        config: TranscriptionConfig,
        run: Run,
        files: InputFiles,
        model: Seq2Seq | SequenceClassifier | None = None,
    ) -> TranscriptionTask:
        """Prepare the data and build the model, or continue with a saved `model`.

        Raises:
            CommandError: A file cannot be used, or there are too few samples.
        """
        save = (lambda training: None) if model is None else None
        data = SampleData.prepare(fabric, config, run, files, "text", save)
        return cls(fabric, config, data, model or cls._new_model(config, data))

    @staticmethod
    def _new_model(config: TranscriptionConfig, data: SampleData) -> Seq2Seq | SequenceClassifier:
        torch.manual_seed(config.seed)
        assert data.tokenizer is not None
        size, feature_dim = LineTokenizer(data.tokenizer).size, data.encoded[0].feature_dim
        if config.decoder == "ctc":
            return SequenceClassifier(
                size,
                config.hidden,
                config.layers,
                config.dropout,
                feature_dim=feature_dim,
                cell=config.cell,
                nonlinearity=config.nonlinearity,
                pooling="none",
            )
        return Seq2Seq(
            None,
            size,
            config.embedding,
            config.hidden,
            config.layers,
            config.dropout,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            attn_dim=config.attn_dim,
            source_feature_dim=feature_dim,
        )

    def summary(self) -> str:
        kind = self.target.tokenizer.kind
        return f"{self.target.tokenizer.size:,} tokens in the vocabulary ({kind}), {self.describe_sizes()}"

    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, int]:
        indices = self.batches.indices(step)
        ctc = isinstance(self.model, SequenceClassifier)
        # Each token has the same weight, whichever process reads it; the end of a text is one, but not of CTC.
        tokens = sum(len(self.ids[0][index]) + (not ctc) for index in indices.tolist())
        mine = indices[self.mine].tolist()
        x, lengths = self.read(mine)
        batch = self.fabric.to_device(
            make_transcript_batch(x, lengths, [self.ids[0][index] for index in mine], self.target.end)
        )
        if ctc:
            nats = ctc_nats(module(batch.x, batch.lengths), batch, self.target.end)
        else:
            scores = module(batch.x, batch.target, batch.lengths, batch.target_lengths, batch.keep)
            expected = batch.expected[batch.keep]
            nats = F.cross_entropy(scores, expected, reduction="sum", label_smoothing=self.label_smoothing)
        return nats * (self.fabric.world_size / tokens), tokens

    def validate(self, module: nn.Module, processes: Processes) -> Score:
        return evaluate_transcripts(
            module,
            isinstance(self.model, SequenceClassifier),
            self.validation,
            self.data.reader,
            self.held_out,
            self.ids[-1],
            self.target,
            self.fabric.device,
            processes,
        )
